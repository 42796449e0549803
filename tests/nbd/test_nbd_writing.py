"""What is written to a server: raw images by convert, dd and bench; anything else only where nobody wants a journal."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbd_fake as nbd
import pytest
from nbd_fake import Fake, serving
from nbd_servers import qemu_nbd
from safeimg.drivers.errors import StorageError, SyncFailed
from safeimg.drivers.storage.address import Unix
from safeimg.drivers.storage.nbd.file import NbdFile, open_export
from twin import Outcome, assert_same, qemu_img, qemu_io, safeimg

needs_qemu = pytest.mark.skipif(shutil.which("qemu-nbd") is None, reason="qemu-utils are not installed")

LINES = (
    "convert -O raw a.qcow2 nbd:unix:w", "convert -n -O raw a.qcow2 nbd:unix:w", "convert -n -O nbd a.qcow2 nbd:unix:w",
    "convert -O raw a.qcow2 nbd:unix:r", "convert -n -O raw a.qcow2 nbd:unix:r",
    "convert -O raw a.qcow2 nbd:unix:nothing", "convert -f raw -O raw big.raw nbd:unix:w",
    "convert -n -f raw -O raw big.raw nbd:unix:w", "convert -n -f raw -O raw small.raw nbd:unix:w",
    "convert -n --target-is-zero -O raw a.qcow2 nbd:unix:w", "convert -n -O raw -t none a.qcow2 nbd:unix:w",
    "convert -n -O raw -t directsync -S 0 a.qcow2 nbd:unix:w", "convert -n -O raw -t writethrough a.qcow2 nbd:unix:w",
    "convert -n --target-image-opts a.qcow2 driver=nbd,path=w", "dd -f raw -O raw if=small.raw of=nbd:unix:w",
    "dd -f raw -O raw if=small.raw of=nbd:unix:r", "dd -f raw -O raw if=big.raw of=nbd:unix:w",
    "resize -f raw nbd:unix:w +1M", "resize -f raw nbd:unix:w --shrink 1M", "resize -f raw nbd:unix:w 1M",
    "bench -c 3 -w -f raw nbd:unix:r", "commit -f raw nbd:unix:w",
)  # fmt: skip


def _fill(folder: Path) -> None:
    (folder / "t.raw").write_bytes(b"\x09" * (4 << 20))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With a raw image that can be written at `w`, one that cannot at `r`, and a qcow2 image at `q`."""
    folder = tmp_path_factory.mktemp("written")
    for name, size in (("a", "4M"), ("b", "4M")):
        qemu_img(["create", "-q", "-f", "qcow2", f"{name}.qcow2", size], folder)
    qemu_io(folder, "-c", "write -P 3 1M 64k", "a.qcow2")
    (folder / "small.raw").write_bytes(b"\x07" * 65536)
    (folder / "r.raw").write_bytes(bytes(1 << 20))
    with (folder / "big.raw").open("wb") as file:
        file.truncate(8 << 20)
    _fill(folder)
    with (
        qemu_nbd(folder, "-f", "raw", "t.raw", socket_name="w"),
        qemu_nbd(folder, "-r", "-f", "raw", "r.raw", socket_name="r"),
        qemu_nbd(folder, "-f", "raw", "b.qcow2", socket_name="q"),
    ):
        yield folder


@needs_qemu
@pytest.mark.parametrize("line", LINES)
def test_the_same_as_qemu_img(folder: Path, line: str) -> None:
    """The same output, and the same content afterwards, on the same content before."""
    results: list[tuple[Outcome, bytes]] = []
    for program in (qemu_img, lambda words, folder: safeimg(words, folder, name="qemu-img")):
        _fill(folder)
        results.append((program(line.split(), folder), (folder / "t.raw").read_bytes()))
    assert results[0] == results[1]


@needs_qemu
def test_benchmark(folder: Path) -> None:
    _fill(folder)
    line = ["bench", "-c", "3", "-w", "--pattern=5", "-f", "raw", "nbd:unix:w"]
    assert safeimg(line, folder).code == 0
    assert (folder / "t.raw").read_bytes() == b"\x05" * 12288 + b"\x09" * ((4 << 20) - 12288)


@needs_qemu
@pytest.mark.parametrize(
    "line",
    ["resize nbd:unix:q 8M", "convert -n -O qcow2 a.qcow2 nbd:unix:q", "bitmap --add nbd:unix:q b0",
     "convert -n --undo -O raw a.qcow2 nbd:unix:w", "convert -n --journal j -O raw a.qcow2 nbd:unix:w"],
)  # fmt: skip
def test_what_needs_a_journal_is_refused(folder: Path, line: str) -> None:
    before = (folder / "b.qcow2").read_bytes(), (folder / "t.raw").read_bytes()
    done = safeimg(line.split(), folder)
    assert done.code == 1 and b"there is no journal for an image that is no file of this machine" in done.stderr
    assert ((folder / "b.qcow2").read_bytes(), (folder / "t.raw").read_bytes()) == before
    assert not (folder / "j").exists()


@needs_qemu
def test_without_a_journal_all_goes(folder: Path) -> None:
    assert safeimg(["amend", "--no-journal", "-o", "lazy_refcounts=on", "nbd:unix:q"], folder).code == 0
    assert b"lazy refcounts: true" in assert_same(["info", "nbd:unix:q"], folder).stdout
    assert_same(["check", "nbd:unix:q"], folder)


@needs_qemu
def test_a_conversion_from_a_server_is_resumed(folder: Path) -> None:
    """Its log names a source that is no file."""
    (folder / "t.raw").write_bytes(random.Random(3).randbytes(4 << 20))
    line = ["convert", "-f", "raw", "-O", "qcow2", "-r", "1M", "nbd:unix:w", "new.qcow2"]
    with subprocess.Popen([sys.executable, "-m", "safeimg.cli.main", *line], cwd=folder) as process:
        end = time.monotonic() + 30
        while not (folder / "new.qcow2.safeimg").exists() and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
    assert (folder / "new.qcow2.safeimg").exists()
    done = safeimg(["resume", "new.qcow2"], folder)
    assert done.code == 0, done.stderr
    assert safeimg(["compare", "-f", "raw", "nbd:unix:w", "new.qcow2"], folder).code == 0


def opened(path: Path, cache: str = "writeback") -> NbdFile:
    return open_export("nbd", Unix(str(path)), "", write=True, cache=cache)


@pytest.mark.parametrize("flags", [nbd.ALL_FLAGS, 1])
@pytest.mark.parametrize("blocks", [None, (1, 512, 1000), (4096, 4096, 8192)])
@pytest.mark.parametrize("cache", ["writeback", "writethrough", "unsafe"])
def test_writes_anywhere(tmp_path: Path, flags: int, blocks: tuple[int, int, int] | None, cache: str) -> None:
    model = bytearray(random.Random(1).randbytes(20480))
    fake = Fake(bytearray(model), flags=flags, blocks=blocks)
    with serving(fake, tmp_path / "f"):
        file = opened(tmp_path / "f", cache)
        for number, (start, length) in enumerate(((0, 20480), (1, 4095), (4095, 2), (5000, 10000), (20479, 1), (7, 0))):
            if number % 2:
                file.write_zeroes(start, length, unmap=bool(number % 3))
                model[start : start + length] = bytes(length)
            else:
                file.pwrite(start, bytes([number + 1]) * length)
                model[start : start + length] = bytes([number + 1]) * length
        file.discard(0, 0)
        file.sync()
        for start in (-1, 20480):
            with pytest.raises(StorageError):
                file.pwrite(start, b"x")
        file.close()
    assert fake.content == model
    unit, most = (1, 32 << 20) if blocks is None else (blocks[0], blocks[2])
    writes = [asked for asked in fake.seen if asked.command in (nbd.WRITE, nbd.WRITE_ZEROES)]
    assert all(asked.offset % unit == asked.length % unit == 0 for asked in writes)
    assert all(asked.length <= most for asked in writes if asked.command == nbd.WRITE)
    assert any(asked.flags & 1 for asked in writes) == (cache == "writethrough" and flags != 1)
    flushes = sum(asked.command == nbd.FLUSH for asked in fake.seen)
    assert flushes == (0 if flags == 1 or cache == "unsafe" else 1)


def test_a_failed_flush_is_not_forgotten(tmp_path: Path) -> None:
    fake = Fake(bytearray(4096), commands={nbd.FLUSH: lambda it, asked: it.simple(asked, error=5)})
    with serving(fake, tmp_path / "f"):
        file = opened(tmp_path / "f")
        file.pwrite(0, b"x")
        with pytest.raises(SyncFailed):
            file.sync()
        fake.commands.clear()
        for again in (file.sync, lambda: file.pwrite(0, b"y"), lambda: file.write_zeroes(0, 1, unmap=True)):
            with pytest.raises(SyncFailed):
                again()
        file.close()
    assert fake.content[:1] == b"x"


def test_errors_of_writes(tmp_path: Path) -> None:
    (tmp_path / "in.raw").write_bytes(b"x" * 4096)
    failing = dict.fromkeys((nbd.WRITE, nbd.WRITE_ZEROES), lambda it, asked: it.simple(asked, error=28))
    with serving(Fake(bytearray(4096), commands=failing), tmp_path / "f"):
        done = safeimg(["convert", "-n", "-f", "raw", "-O", "raw", "in.raw", "nbd:unix:f"], tmp_path, name="qemu-img")
    assert done == (1, b"", b"qemu-img: error while writing at byte 0: No space left on device\n")


def test_an_export_opened_to_read_is_not_written(tmp_path: Path) -> None:
    fake = Fake(bytearray(4096))
    with serving(fake, tmp_path / "f"):
        file = open_export("nbd", Unix(str(tmp_path / "f")), "", write=False)
        with pytest.raises(StorageError):
            file.pwrite(0, b"x")
        with pytest.raises(StorageError):
            file.write_zeroes(0, 512, unmap=True)
        file.discard(0, 4096)
        file.close()
    assert all(asked.command == nbd.DISCONNECT for asked in fake.seen)
