"""A server that says something wrong: safeimg says the same of it as qemu-img, or refuses what that takes."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import nbd_fake as nbd
import pytest
from nbd_fake import ABOUT, ACK, CONTEXT, GO, LIST, META, SERVER, STRUCTURE, UNSUPPORTED, Fake, serving
from twin import assert_same, qemu_img, safeimg

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils are not installed")

pack = struct.pack
GREETING = b"NBDMAGIC" + pack(">Q", nbd.OPTION)
SIZE = 65536


def refused(code: int, words: bytes = b"some words", length: int | None = None) -> dict[str, Any]:
    return {"options": {GO: lambda it, data: it.answer(GO, code, words, length=length)}}


def told(kind: int, *datas: bytes, last: bytes | None = b"") -> dict[str, Any]:
    """Answers to GO after the export was told."""

    def answer(it: nbd.Connection, asked: bytes) -> bool:
        it.about()
        for data in datas:
            it.answer(GO, kind, data)
        if last is not None:
            it.answer(GO, ACK, last)
        return True

    return {"options": {GO: answer}}


def go(kind: int, data: bytes = b"") -> dict[str, Any]:
    return {"options": {GO: lambda it, asked: it.answer(GO, kind, data) or True}}


def listed(*names: bytes) -> dict[str, Any]:
    def answer(it: nbd.Connection, asked: bytes) -> None:
        for name in names:
            it.answer(LIST, SERVER, pack(">I", len(name)) + name)
        it.answer(LIST, ACK)

    return {"options": {GO: lambda it, asked: it.answer(GO, UNSUPPORTED), LIST: answer}}


def contexts(*datas: bytes, last: bytes = b"") -> dict[str, Any]:
    def answer(it: nbd.Connection, asked: bytes) -> None:
        for data in datas:
            it.answer(META, CONTEXT, data)
        it.answer(META, ACK, last)

    return {"options": {META: answer}}


ALLOCATION = pack(">I", 1) + b"base:allocation"
HANDSHAKES: dict[str, dict[str, Any]] = {
    "initial magic": {"greeting": b"NBDMAGIX" + bytes(10)},
    "server magic": {"greeting": b"NBDMAGIC" + bytes(10)},
    "not fixed": {"greeting": GREETING + pack(">H", 2)},
    "other flags": {"greeting": GREETING + pack(">H", 0xFF03)},
    "zeroes": {"greeting": GREETING + pack(">H", 1)},
    "old": {"oldstyle": True},
    "no go": {"options": {GO: lambda it, data: it.answer(GO, UNSUPPORTED)}},
    "in no list": listed(b"abc"),
    "in a list": listed(b"abc", b""),
    **{f"error {code}": refused(0x80000000 + code) for code in (*range(1, 10), 16)},
    "no words": refused(0x80000002, b""),
    "words end early": refused(0x80000002, b"a\nb\0c"),
    "many words": refused(0x80000002, b"x" * 5000),
    "too many words": refused(0x80000002, b"x", 50_000_000),
    "other option": {"options": {GO: lambda it, data: it.answer(GO + 1, ACK)}},
    "reply magic": {"options": {GO: lambda it, data: it.send(bytes(20))}},
    "data with ack": told(ABOUT, last=b"abc"),
    "no export": go(ACK),
    "short info": go(ABOUT, b"\0"),
    "short export": go(ABOUT, b"\0\0abc"),
    "short sizes": told(ABOUT, b"\0\3abc"),
    "unknown info": told(ABOUT, b"\0\7abc"),
    "unknown reply": go(77),
    "other reply": go(SERVER),
    "no flags": {"flags": 0},
    "too large": {"size": (1 << 63) - 512},
    "no size": {"size": 0},
    **{
        f"sizes {minimum} {preferred} {maximum}": {"blocks": (minimum, preferred, maximum)}
        for minimum, preferred, maximum in (
            (3, 4096, 1 << 20), (0, 4096, 1 << 20), (1 << 15, 1 << 15, 1 << 20), (1, 3, 1 << 20),
            (4096, 512, 1 << 20), (4096, 8192, 4096), (4096, 4096, 10000), (1, 4096, 0), (1, 4096, 0xFFFFFFFF),
        )
    },
    "no structure": {"structured": False},
    "closed": {"options": {STRUCTURE: None}},
    "data with structure": {"options": {STRUCTURE: lambda it, data: it.answer(STRUCTURE, ACK, b"abcd")}},
    "structure refused": {"options": {STRUCTURE: lambda it, data: it.answer(STRUCTURE, 0x80000002, b"no")}},
    "odd structure": {"options": {STRUCTURE: lambda it, data: it.answer(STRUCTURE, 9)}},
    "no contexts": {"options": {META: lambda it, data: it.answer(META, UNSUPPORTED)}},
    "context refused": {"options": {META: lambda it, data: it.answer(META, 0x80000002, b"no")}},
    "empty context": contexts(),
    "other context": contexts(pack(">I", 1) + b"base:foo"),
    "short context": contexts(b"ab"),
    "two contexts": contexts(ALLOCATION, ALLOCATION),
    "data with context": contexts(ALLOCATION, last=b"ab"),
}  # fmt: skip

READS: dict[str, Any] = {
    "closed": None,
    "magic": lambda it, asked: it.send(bytes(100)),
    "simple": lambda it, asked: it.simple(asked, bytes(asked.length)),
    "simple error": lambda it, asked: it.simple(asked, error=28),
    "handle": lambda it, asked: it.chunk(asked, nbd.DATA, pack(">Q", asked.offset) + b"x", handle=asked.handle + 1),
    **{
        f"error {code}": lambda it, asked, code=code: it.chunk(asked, nbd.ERROR, pack(">IH", code, 5) + b"words")
        for code in (0, 1, 5, 12, 22, 28, 75, 95, 108, 12345)
    },
    "error there": lambda it, asked: it.chunk(
        asked, nbd.ERROR_OFFSET, pack(">IH", 5, 5) + b"words" + pack(">Q", asked.offset)
    ),
    "short error": lambda it, asked: it.chunk(asked, nbd.ERROR, pack(">I", 5)),
    "error with wrong length": lambda it, asked: it.chunk(asked, nbd.ERROR, pack(">IH", 5, 5000) + b"words"),
    "unknown error": lambda it, asked: it.chunk(asked, 0x8055, pack(">IH", 5, 5) + b"words"),
    "nothing, with data": lambda it, asked: it.chunk(asked, nbd.NONE, b"abc"),
    "nothing, not done": lambda it, asked: it.chunk(asked, nbd.NONE, done=False),
    "behind": lambda it, asked: it.chunk(asked, nbd.DATA, pack(">Q", asked.offset + 1) + bytes(asked.length)),
    "short data": lambda it, asked: it.chunk(asked, nbd.DATA, pack(">I", 4)),
    "empty data": lambda it, asked: it.chunk(asked, nbd.DATA, pack(">Q", asked.offset)),
    "hole": lambda it, asked: it.chunk(asked, nbd.HOLE, pack(">QI", asked.offset, asked.length)),
    "hole behind": lambda it, asked: it.chunk(asked, nbd.HOLE, pack(">QI", asked.offset + 1, asked.length)),
    "empty hole": lambda it, asked: it.chunk(asked, nbd.HOLE, pack(">QI", asked.offset, 0)),
    "short hole": lambda it, asked: it.chunk(asked, nbd.HOLE, pack(">Q", asked.offset)),
    "unknown": lambda it, asked: it.chunk(asked, 55, b"abc"),
    "status": lambda it, asked: it.chunk(asked, nbd.STATUS, pack(">III", 7, 10, 0)),
}

STATUS: dict[str, Any] = {
    "closed": None,
    "error": lambda it, asked: it.chunk(asked, nbd.ERROR, pack(">IH", 28, 5) + b"words"),
    "simple error": lambda it, asked: it.simple(asked, error=22),
    "simple": lambda it, asked: it.simple(asked),
    "none": lambda it, asked: it.chunk(asked, nbd.NONE),
    "empty": lambda it, asked: it.chunk(asked, nbd.STATUS, pack(">I", 7)),
    "other context": lambda it, asked: it.chunk(asked, nbd.STATUS, pack(">III", 8, 4096, 0)),
    "no length": lambda it, asked: it.chunk(asked, nbd.STATUS, pack(">III", 7, 0, 0)),
    "too long": lambda it, asked: it.chunk(asked, nbd.STATUS, pack(">III", 7, 1 << 30, 0)),
    "half": lambda it, asked: it.chunk(asked, nbd.STATUS, pack(">IIH", 7, 1 << 30, 0)),
}


def fake(**wrong: Any) -> Fake:
    return Fake(bytearray(b"x" * SIZE), **wrong)


@pytest.mark.parametrize("name", HANDSHAKES)
def test_handshake(tmp_path: Path, name: str) -> None:
    with serving(fake(**HANDSHAKES[name]), tmp_path / "f"):
        assert_same(["map", "--output=json", "-f", "raw", "nbd:unix:f"], tmp_path)


@pytest.mark.parametrize("context", ["base:allocation", "foo:bar"])
@pytest.mark.parametrize("name", [name for name in HANDSHAKES if "context" in name])
def test_handshake_of_a_bitmap(tmp_path: Path, name: str, context: str) -> None:
    with serving(fake(**HANDSHAKES[name]), tmp_path / "f"):
        assert_same(["map", f'json:{{"driver": "nbd", "path": "f", "x-dirty-bitmap": "{context}"}}'], tmp_path)


@pytest.mark.parametrize("name", READS)
def test_read(tmp_path: Path, name: str) -> None:
    with serving(fake(commands={nbd.READ: READS[name]}), tmp_path / "f"):
        assert_same(["convert", "-f", "raw", "-O", "raw", "nbd:unix:f", "out.raw"], tmp_path)


@pytest.mark.parametrize("name", STATUS)
def test_status(tmp_path: Path, name: str) -> None:
    with serving(fake(commands={nbd.BLOCK_STATUS: STATUS[name]}), tmp_path / "f"):
        assert_same(["map", "--output=json", "-f", "raw", "nbd:unix:f"], tmp_path)
        assert_same(["convert", "-f", "raw", "-O", "raw", "nbd:unix:f", "out.raw"], tmp_path)


def test_every_kind_of_extent(tmp_path: Path) -> None:
    extents = [(4096, flags) for flags in range(5)] + [(SIZE - 5 * 4096, 0)]
    with serving(fake(extents=extents), tmp_path / "f"):
        assert_same(["map", "--output=json", "-f", "raw", "nbd:unix:f"], tmp_path)
        assert_same(["map", "-f", "raw", "nbd:unix:f"], tmp_path)
        for program in (qemu_img, safeimg):
            program(["convert", "-f", "raw", "-O", "raw", "nbd:unix:f", f"{program.__name__}.raw"], tmp_path)
    assert (tmp_path / "safeimg.raw").read_bytes() == (tmp_path / "qemu_img.raw").read_bytes()


def test_what_qemu_takes_and_safeimg_refuses(tmp_path: Path) -> None:
    line = ["convert", "-f", "raw", "-O", "raw", "nbd:unix:f", "out.raw"]
    never_sent = fake(commands={nbd.READ: lambda it, asked: it.chunk(asked, nbd.NONE)})
    with serving(never_sent, tmp_path / "f"):
        done = safeimg(line, tmp_path, name="qemu-img")
    assert (done.code, done.stderr) == (1, b"qemu-img: error while reading at byte 0: Input/output error\n")
    with serving(fake(size=1 << 63), tmp_path / "f"):
        done = safeimg(line, tmp_path)
    assert done.stderr.endswith(b"Could not refresh total sector count: File too large\n")
    with serving(fake(**refused(0x80000002, b"\x1b[2J")), tmp_path / "f"):
        done = safeimg(line, tmp_path)
    assert done.stderr.endswith(b"server reported: ?[2J\n")


@pytest.mark.parametrize("length", [0xFFFFFFFF, 1 << 30])
def test_lengths_cost_no_memory(tmp_path: Path, length: int) -> None:
    """Refused at once: nobody waits for what is announced."""
    for wrong in (
        {"options": {GO: lambda it, data: it.answer(GO, ABOUT, b"\0\7", length=length)}},
        {"options": {META: lambda it, data: it.answer(META, CONTEXT, length=length)}},
        {"commands": {nbd.READ: lambda it, asked: it.chunk(asked, nbd.DATA, bytes(8), length=length)}},
        {"commands": {nbd.READ: lambda it, asked: it.chunk(asked, nbd.ERROR, length=length)}},
        {"commands": {nbd.BLOCK_STATUS: lambda it, asked: it.chunk(asked, nbd.STATUS, length=length)}},
    ):
        with serving(fake(**wrong), tmp_path / "f"):
            assert safeimg(["convert", "-f", "raw", "-O", "raw", "nbd:unix:f", "out.raw"], tmp_path).code == 1
