"""What is read from a server: by all commands that read, and by many threads at once."""

from __future__ import annotations

import random
import shutil
import struct
import threading
from pathlib import Path

import nbd_fake as nbd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbd_fake import Fake, serving
from nbd_servers import qemu_nbd
from safeimg.drivers.errors import DriverError, StorageError
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.storage.address import Unix
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.storage.nbd.file import NbdFile, open_export
from twin import assert_same, qemu_img, qemu_io, safeimg

BITMAP = "driver=nbd,server.type=unix,server.path=b,x-dirty-bitmap=qemu:dirty-bitmap:{}"
LINES = (
    "map nbd:unix:s", "map --output=json nbd:unix:s", "map -f raw --output=json nbd:unix:s", "map -f raw nbd:unix:s",
    "map --output=json --image-opts driver=nbd,path=s", "map -f raw --start-offset=200k --max-length=64k nbd:unix:s",
    "check nbd:unix:s", "check -f raw nbd:unix:s", "check -r all nbd:unix:s", "measure -O qcow2 nbd:unix:s",
    "measure -O qcow2 -f raw nbd:unix:s", "compare nbd:unix:s a.qcow2", "compare -f raw -F qcow2 nbd:unix:s a.qcow2",
    "snapshot -l nbd:unix:s", "info --backing-chain top.qcow2", "map top.qcow2", "map --output=json top.qcow2",
    "compare top.qcow2 a.qcow2", "check top.qcow2", "convert -O raw top.qcow2 out.raw", "map lost.qcow2",
    "info lost.qcow2", "dd -f raw -O raw if=nbd:unix:s of=out.raw bs=64k count=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def layered(exported: Path) -> Path:
    """With overlays of exports, one of which is not there."""
    for name, backing in (("top", "nbd:unix:s"), ("lost", "nbd:unix:nothing")):
        qemu_img(["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", f"{name}.qcow2", "4M"], exported)
    return exported


@pytest.mark.parametrize("line", LINES)
def test_the_same_as_qemu_img(layered: Path, line: str) -> None:
    assert_same(line.split(), layered)


def test_bitmaps(exported: Path) -> None:
    folder = exported
    qemu_img(["create", "-q", "-f", "qcow2", "bits.qcow2", "4M"], folder)
    qemu_img(["bitmap", "--add", "-g", "512", "bits.qcow2", "b0"], folder)
    qemu_io(folder, "-c", "write 1M 64k", "-c", "write 3M 512", "bits.qcow2")
    with qemu_nbd(folder, "-r", "-f", "qcow2", "-B", "b0", "bits.qcow2", socket_name="b"):
        for name in ("b0", "b1"):
            assert_same(["map", "--output=json", "--image-opts", BITMAP.format(name)], folder)
        done = assert_same(["map", "--output=json", "--image-opts", BITMAP.format("b0")], folder)
    assert done.stdout.count(b'"present": false') == 2


def test_both_read_the_same(exported: Path) -> None:
    for fmt in ("raw", "qcow2"):
        qemu_img(["convert", "-f", fmt, "-O", "raw", "a.qcow2", "theirs.raw"], exported)
        assert safeimg(["convert", "-f", fmt, "-O", "raw", "nbd:unix:s", "ours.raw"], exported).code == 0
        assert (exported / "ours.raw").read_bytes() == (exported / "theirs.raw").read_bytes()


def opened(fake: Fake, path: Path, **more: str) -> NbdFile:
    return open_export("nbd", Unix(str(path)), "", write=False, **more)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("oldstyle", [True, False])
@pytest.mark.parametrize("blocks", [None, (1, 512, 1000), (4096, 4096, 8192)])
def test_reads_of_any_place(
    tmp_path: Path, structured: bool, oldstyle: bool, blocks: tuple[int, int, int] | None
) -> None:
    content = random.Random(1).randbytes(20480)
    fake = Fake(bytearray(content), structured=structured, oldstyle=oldstyle, blocks=blocks)
    with serving(fake, tmp_path / "f"):
        file = opened(fake, tmp_path / "f")
        for start, length in ((0, 20480), (1, 4095), (4095, 2), (5000, 10000), (20479, 5), (20480, 1), (7, 0)):
            assert file.pread(start, length) == content[start : start + length]
        with pytest.raises(StorageError):
            file.pread_into(-1, memoryview(bytearray(1)))
        file.close()
    if blocks is not None and not oldstyle:
        reads = [asked for asked in fake.seen if asked.command == nbd.READ]
        assert all(asked.offset % blocks[0] == asked.length % blocks[0] == 0 for asked in reads)
        assert all(asked.length <= blocks[2] for asked in reads)


def test_replies_in_another_order(tmp_path: Path) -> None:
    """Two requests are collected, and answered in pieces, the last first."""
    held: list[nbd.Request] = []

    def late(it: nbd.Connection, asked: nbd.Request) -> None:
        held.append(asked)
        while len(held) == 2 or (held and len(it.fake.seen) == 20):
            first = held.pop()
            middle = first.length // 2
            for start, end in ((middle, first.length), (0, middle)):
                data = bytes(it.fake.content[first.offset + start : first.offset + end])
                it.chunk(first, nbd.DATA, struct.pack(">Q", first.offset + start) + data, done=False)
            it.chunk(first, nbd.NONE)

    content = random.Random(2).randbytes(20 * 1024)
    fake = Fake(bytearray(content), commands={nbd.READ: late})
    found: dict[int, bytes] = {}
    with serving(fake, tmp_path / "f"):
        file = opened(fake, tmp_path / "f")
        threads = [
            threading.Thread(target=lambda at=at: found.__setitem__(at, file.pread(at * 1024, 1024)))
            for at in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        file.close()
    assert b"".join(found[at] for at in range(20)) == content


def test_a_lost_connection_is_an_error_for_all(tmp_path: Path) -> None:
    fake = Fake(bytearray(4096), commands={nbd.READ: None})
    with serving(fake, tmp_path / "f"):
        file = opened(fake, tmp_path / "f")
        for _ in range(2):
            with pytest.raises(StorageError, match="Input/output error"):
                file.pread(0, 512)
        file.close()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_a_server_sends(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """An error that is one of ours, or content; never anything else."""
    noise = st.binary(max_size=60)
    kinds = st.sampled_from((1, 2, 3, 4, 0x80000001, 0x80000006, 99))
    chunks = st.sampled_from((0, 1, 2, 5, 0x8001, 0x8002, 77))
    # What is announced but never sent, a client waits for: the connection ends behind it.
    answers = {
        option: (data.draw(kinds), data.draw(noise))
        for option in data.draw(st.sets(st.sampled_from((nbd.GO, nbd.STRUCTURE, nbd.META, nbd.LIST))))
    }
    replies = {
        command: (data.draw(chunks), data.draw(noise), data.draw(st.booleans()))
        for command in data.draw(st.sets(st.sampled_from((nbd.READ, nbd.BLOCK_STATUS))))
    }

    def option(it: nbd.Connection, number: int) -> None:
        it.answer(number, *answers[number])
        it.client.shutdown(1)

    def command(it: nbd.Connection, asked: nbd.Request) -> None:
        kind, told, done = replies[asked.command]
        it.chunk(asked, kind, told, done=done)
        it.client.shutdown(1)

    fake = Fake(
        bytearray(4096),
        options={number: lambda it, told, number=number: option(it, number) for number in answers},
        commands=dict.fromkeys(replies, command),
    )
    folder = tmp_path_factory.mktemp("noise")
    with serving(fake, folder / "f"):
        try:
            images = open_chain(LocalFileSystem(), f"nbd:unix:{folder / 'f'}")
        except DriverError:
            return
        try:
            assert all(extent.length > 0 for extent in images[0].extents(0, images[0].size))
            images[0].file.pread(0, 4096)
        except DriverError:
            pass
        finally:
            close_chain(images)
    shutil.rmtree(folder)
