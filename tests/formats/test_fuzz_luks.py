"""Any bytes for a LUKS header: opening, reading and planning end well or in a one-line `DriverError`, and writing never
leaves the guest disk."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from luks_images import FS, KIB, SECRETS, made
from safeimg.drivers.crypto.luks import HEADER_BYTES
from safeimg.drivers.errors import DriverError
from safeimg.drivers.formats.api import PLAIN, Kind, Opening
from safeimg.drivers.formats.luks.amend import LuksAmending
from safeimg.drivers.formats.luks.driver import driver
from safeimg.drivers.transfer.view import View

SIZE = 8 * KIB
WORDS = st.sampled_from((0, 1, 2, 7, 8, 32, 64, 512, 0xAC71F3, 0xDEAD, 1 << 31, (1 << 32) - 1))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = made(tmp_path_factory.mktemp("fuzz") / "image.luks", SIZE, iter_time="0", cipher_alg="aes-128")
    return path, path.read_bytes()


def attempt(action: Callable[[], Any]) -> Any:
    """What the call answers; None if it ends in a proper error."""
    try:
        return action()
    except DriverError as error:
        assert str(error) and "\n" not in str(error)
        return None


def exercise(path: Path) -> None:
    file = FS.open(str(path), write=True)
    unlocking = Opening({"key-secret": "s"}, SECRETS, open_file=lambda _: file)
    try:
        for given, repair in ((PLAIN, False), (PLAIN, True), (unlocking, False)):
            image = attempt(lambda given=given, repair=repair: driver.open(file, repair=repair, given=given))
            if image is None:
                continue
            assert image.size == 0 or image.header.payload_offset + image.size <= -(-file.length() // 512) * 512
            for extent in image.extents(0, 1 << 62):
                assert (extent.start, extent.length, extent.kind) == (0, image.size, Kind.DATA)
            attempt(lambda image=image: View([image]).read_into(0, memoryview(bytearray(4096))))
            assert json_like(driver.specific_info(image))
            driver.referenced(image, [(0, 512), (1 << 40, 512)])
            for place in driver.planner(image).place(0, image.size):
                assert place.offset >= HEADER_BYTES and place.offset == image.header.payload_offset
            for values in ({"state": "active", "new-secret": "n"}, {"state": "inactive", "keyslot": "0"}):
                attempt(lambda image=image, values=values: LuksAmending().check(image, values, force=False))
    finally:
        file.close()


def json_like(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and json_like(each) for name, each in value.items())
    if isinstance(value, list):
        return all(map(json_like, value))
    return isinstance(value, str | int | bool)


@settings(max_examples=60, deadline=None)
@given(
    words=st.dictionaries(st.sampled_from([104, 108, 164, *range(208, HEADER_BYTES, 4)]), WORDS, max_size=3),
    pieces=st.dictionaries(st.integers(0, HEADER_BYTES - 1), st.binary(min_size=1, max_size=12), max_size=2),
    length=st.one_of(st.none(), st.none(), st.integers(0, 1 << 20)),
)
def test_damaged_images(
    sound: tuple[Path, bytes], words: dict[int, int], pieces: dict[int, bytes], length: int | None
) -> None:
    path, content = sound
    damaged = bytearray(content)
    for offset, word in words.items():
        if offset != 164 and (offset - 208) % 48 != 4:  # iterations: so many take their time, in QEMU too
            damaged[offset : offset + 4] = struct.pack(">I", word)
    for offset, piece in pieces.items():
        if not any(offset <= at + 3 and at < offset + len(piece) for at in (164, *range(212, HEADER_BYTES, 48))):
            damaged[offset : offset + len(piece)] = piece
    path.write_bytes(damaged[: len(content) if length is None else length])
    exercise(path)


@settings(max_examples=30, deadline=None)
@given(head=st.binary(max_size=700))
def test_anything(sound: tuple[Path, bytes], head: bytes) -> None:
    path, _ = sound
    path.write_bytes(head)
    exercise(path)
    path.write_bytes(b"LUKS\xba\xbe\0\1" + head[8:])
    exercise(path)
