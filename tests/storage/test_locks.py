"""QEMU's image locks: among our own files, and against real QEMU programs in both directions."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safeimg.drivers.errors import LockError
from safeimg.drivers.storage import locks
from safeimg.drivers.storage.file import LocalFile, LocalFileSystem
from safeimg.drivers.storage.locks import (
    INSPECTOR,
    NOTHING,
    RAW_READER,
    RAW_RESIZER,
    RAW_WRITER,
    READER,
    WRITER,
    Claim,
)

fs = LocalFileSystem()
needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-io") is None or shutil.which("qemu-img") is None, reason="no qemu-io, qemu-img"
)

GET_WRITE = 'Failed to get "write" lock'
GET_SHARED_WRITE = 'Failed to get shared "write" lock'


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return str(path)


@contextmanager
def held(path: str, claim: Claim) -> Iterator[LocalFile]:
    file = fs.open(path, write=True)
    try:
        file.lock(claim)
        yield file
    finally:
        file.close()


def refusal(path: str, claim: Claim) -> str | None:
    """What a newcomer with `claim` is told; None: let in."""
    try:
        with held(path, claim):
            return None
    except LockError as error:
        return str(error)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (READER, READER, None),
        (READER, INSPECTOR, None),
        (READER, RAW_READER, None),
        (READER, WRITER, GET_WRITE),
        (READER, RAW_WRITER, GET_WRITE),
        (INSPECTOR, WRITER, GET_WRITE),
        (WRITER, READER, GET_SHARED_WRITE),
        (WRITER, INSPECTOR, GET_SHARED_WRITE),
        (WRITER, WRITER, GET_WRITE),
        (WRITER, RAW_READER, None),
        (WRITER, NOTHING, None),
        (RAW_WRITER, RAW_WRITER, None),
        (RAW_WRITER, READER, GET_SHARED_WRITE),
        (RAW_RESIZER, Claim((), (locks.RESIZE,)), 'Failed to get shared "resize" lock'),
        (Claim((), (locks.RESIZE,)), RAW_RESIZER, 'Failed to get "resize" lock'),
        (Claim((), (locks.CONSISTENT_READ,)), READER, 'Failed to get "consistent read" lock'),
    ],
)
def test_who_gets_in(image: str, first: Claim, second: Claim, message: str | None) -> None:
    with held(image, first):
        expected = None if message is None else f"{message}\nIs another process using the image [{image}]?"
        assert refusal(image, second) == expected
    assert refusal(image, second) is None


def test_refused_change_keeps_what_was_held(image: str) -> None:
    with held(image, READER), held(image, READER) as file:
        with pytest.raises(LockError):
            file.lock(WRITER)
        assert refusal(image, WRITER) is not None
        file.lock(RAW_READER)  # weaker: always possible
    with held(image, READER) as file:
        file.lock(WRITER)  # its own locks are not in the way
        assert refusal(image, READER) is not None
        file.lock(NOTHING)
        assert refusal(image, WRITER) is None


def test_refused_newcomer_leaves_no_lock(image: str) -> None:
    with held(image, READER):
        file = fs.open(image, write=True)
        with pytest.raises(LockError):
            file.lock(WRITER)
        with held(image, READER):  # "write" is not in use
            pass
        file.close()


def test_open_and_create_lock(image: str) -> None:
    reader = fs.open(image, locking=True)
    locks.lock(reader, READER)
    with pytest.raises(LockError):
        fs.open(image, write=True, locking=True)
    with pytest.raises(LockError):
        fs.create(image, locking=True)
    assert Path(image).stat().st_size == 1 << 20  # refused before the truncation
    fs.open(image, locking=True).close()
    reader.close()
    writer = fs.create(image, locking=True)
    reader = fs.open(image, locking=True)  # of guest data alone
    with pytest.raises(LockError):
        locks.lock(reader, READER)
    for sharing in fs.open(image, locking=True, force_share=True), fs.open(image):
        locks.lock(sharing, READER)  # they put up with it
        sharing.close()
    reader.close()
    writer.close()


def test_exclusive_lock_of_somebody_else(image: str) -> None:
    fd = os.open(image, os.O_RDWR)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack("@hhqqi0q", fcntl.F_WRLCK, 0, 201, 1, 0))
        assert refusal(image, READER) == "Failed to lock byte 201"
    finally:
        os.close(fd)


def test_whole_file_lock(image: str) -> None:
    first, second = fs.open(image, write=True), fs.open(image)
    assert first.try_lock() and first.try_lock()
    assert not second.try_lock()
    assert locks.try_lock(second) is False
    assert locks.try_lock(object()) is True
    first.close()
    assert second.try_lock()
    second.close()


# ---- against QEMU


@contextmanager
def qemu_io(path: str, *options: str) -> Iterator[None]:
    """qemu-io with the image open, until the block ends."""
    process = subprocess.Popen(
        ["qemu-io", *options, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(b"length\n")
        process.stdin.flush()
        shown = b""
        while b"iB" not in shown and b"bytes" not in shown:  # the answer: the image is open and locked
            line = os.read(process.stdout.fileno(), 4096)
            assert line, f"qemu-io did not open {path}: {shown!r}"
            shown += line
        yield
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def qemu_says(*command: str) -> str:
    """stderr, without the program's name; empty if it succeeded."""
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode == 0) == (not result.stderr), result
    return result.stderr.strip()


@pytest.fixture
def qcow2(tmp_path: Path) -> str:
    path = str(tmp_path / "disk.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"], check=True)
    return path


def qemu_text(message: str, path: str) -> str:
    return f"{message}\nIs another process using the image [{path}]?"


@needs_qemu
def test_running_qemu_writer_keeps_us_out(qcow2: str) -> None:
    with qemu_io(qcow2):
        for claim in (READER, INSPECTOR):
            assert refusal(qcow2, claim) == qemu_text(GET_SHARED_WRITE, qcow2)
        assert refusal(qcow2, WRITER) == qemu_text(GET_WRITE, qcow2)
        assert refusal(qcow2, RAW_READER) is None
    assert refusal(qcow2, WRITER) is None


@needs_qemu
def test_running_qemu_reader_lets_readers_in(qcow2: str) -> None:
    with qemu_io(qcow2, "-r"):
        assert refusal(qcow2, READER) is None
        assert refusal(qcow2, WRITER) == qemu_text(GET_WRITE, qcow2)
        with pytest.raises(LockError):
            fs.create(qcow2, locking=True)


@needs_qemu
def test_overlay_in_use_protects_its_backing_file(qcow2: str, tmp_path: Path) -> None:
    overlay = str(tmp_path / "overlay.qcow2")
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", qcow2, "-F", "qcow2", overlay], check=True
    )
    with qemu_io(overlay):
        assert refusal(qcow2, READER) is None
        assert refusal(qcow2, WRITER) == qemu_text(GET_WRITE, qcow2)


@needs_qemu
def test_raw_writers_of_qemu_share(image: str) -> None:
    with qemu_io(image, "-f", "raw"):
        assert refusal(image, RAW_WRITER) is None
        assert refusal(image, RAW_READER) is None
        assert refusal(image, READER) == qemu_text(GET_SHARED_WRITE, image)


@needs_qemu
def test_our_writer_keeps_qemu_out(qcow2: str) -> None:
    file = fs.open(qcow2, write=True, locking=True)
    refused = f"qemu-img: Could not open '{qcow2}': " + qemu_text(GET_SHARED_WRITE, qcow2)
    assert qemu_says("qemu-img", "info", qcow2) == refused
    assert qemu_says("qemu-img", "check", qcow2) == refused
    for options, message in (((), GET_WRITE), (("-r",), GET_SHARED_WRITE)):
        result = subprocess.run(["qemu-io", *options, "-c", "quit", qcow2], capture_output=True, text=True)
        assert result.returncode == 1
        assert qemu_text(message, qcow2) in result.stdout + result.stderr
    assert qemu_says("qemu-img", "info", "-U", qcow2) == ""
    file.close()
    assert qemu_says("qemu-img", "check", qcow2) == ""


@needs_qemu
def test_our_reader_keeps_qemu_writers_out(qcow2: str) -> None:
    file = fs.open(qcow2, locking=True)
    locks.lock(file, READER)
    assert qemu_says("qemu-img", "check", qcow2) == ""
    assert qemu_says("qemu-img", "resize", "-q", qcow2, "+1M") == (
        f"qemu-img: Could not open '{qcow2}': " + qemu_text(GET_WRITE, qcow2)
    )
    file.close()
    assert qemu_says("qemu-img", "resize", "-q", qcow2, "+1M") == ""


@needs_qemu
def test_our_claims_on_raw_images(image: str) -> None:
    with held(image, RAW_WRITER):
        assert qemu_says("qemu-img", "info", "-f", "raw", image) == ""
        assert qemu_says("qemu-img", "resize", "-q", "-f", "raw", image, "2M") == ""
        assert GET_SHARED_WRITE in qemu_says("qemu-img", "convert", "-f", "raw", image, image + ".copy")
    with held(image, WRITER):
        assert GET_WRITE in qemu_says("qemu-img", "resize", "-q", "-f", "raw", image, "3M")


@needs_qemu
@pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="no qemu-nbd")
def test_qemu_nbd_and_we_exclude_each_other(qcow2: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    server = ["qemu-nbd", "-k", str(tmp_path / "socket"), f"--pid-file={pid_file}", "-f", "qcow2"]
    with held(qcow2, READER):
        assert GET_WRITE in qemu_says(*server, qcow2)
    with subprocess.Popen([*server, qcow2]) as process:
        try:
            while not pid_file.exists():  # written once the image is open
                assert process.poll() is None
                time.sleep(0.01)
            assert refusal(qcow2, READER) == qemu_text(GET_SHARED_WRITE, qcow2)
            assert refusal(qcow2, WRITER) == qemu_text(GET_WRITE, qcow2)
        finally:
            process.kill()
    assert refusal(qcow2, WRITER) is None
