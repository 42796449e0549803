"""Any bytes for header and map: opening, mapping, reading, checking and planning end well or in a one-line
`DriverError`, and writing never leaves the image's own blocks."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safeimg.drivers.errors import DriverError
from safeimg.drivers.formats.api import Kind
from safeimg.drivers.formats.vdi.driver import driver
from safeimg.drivers.formats.vdi.image import decode, encode, runs
from safeimg.drivers.formats.vdi.usage import used_blocks
from safeimg.drivers.transfer.view import View
from vdi_images import FS, MIB

BLOCKS = 6
WORDS = range(0x40, 0x1C8, 4)
NOTABLE = st.sampled_from(
    (0, 1, 2, 5, 6, 7, 511, 512, 513, 1024, 1536, MIB, BLOCKS * MIB, 0x1FFFFF80, 0x1FFFFF81, 0xFFFFFFFD, 0xFFFFFFFE,
     0xFFFFFFFF, 0xBEDA107F, 0x10001)
)  # fmt: skip
VALUES = st.one_of(NOTABLE, st.integers(0, 0xFFFFFFFF))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "image.vdi"


def build(path: Path, entries: list[int], words: dict[int, int], length: int | None) -> None:
    """A small image with this map; header words (by offset) and the file's length are changed."""
    driver.create(FS, str(path), BLOCKS * MIB - 512, {})
    with path.open("r+b") as file:
        count = sum(entry < BLOCKS for entry in entries)
        for offset, value in ({0x184: count} | words).items():
            file.seek(offset)
            file.write(struct.pack("<I", value))
        file.seek(512)
        file.write(struct.pack(f"<{BLOCKS}I", *entries))
        file.truncate(1024 + BLOCKS * MIB if length is None else length)


def attempt(action: object) -> object:
    """What the call answers; None if it ends in a proper error."""
    try:
        return action()  # type: ignore[operator]
    except DriverError as error:
        assert str(error) and "\n" not in str(error)
        return None


def exercise(path: Path) -> None:
    file = FS.open(str(path), write=True)
    try:
        for repair in (False, True):
            image = attempt(lambda repair=repair: driver.open(file, repair=repair))
            if image is None:
                continue
            position = 0
            for extent in attempt(lambda image=image: list(image.extents(0, 64 * MIB))) or ():
                assert extent.start == position and extent.length > 0
                assert (extent.offset is None) == (extent.kind is Kind.ZERO)
                position += extent.length
            attempt(lambda image=image: View([image]).read_into(0, memoryview(bytearray(8192))))
            attempt(lambda image=image: driver.check(image))
            attempt(lambda image=image: driver.used_end(image))
            attempt(lambda image=image: driver.referenced(image, [(0, 512), (1 << 40, 512)]))
        image = attempt(lambda: driver.open(file, write=True))
        if image is not None:
            attempt(lambda: plan(image))
    finally:
        file.close()


def plan(image: object) -> None:
    planner = driver.planner(image)  # type: ignore[arg-type]
    header = image.header  # type: ignore[attr-defined]
    used = {index for index, count in enumerate(used_blocks(image)) if count}  # type: ignore[arg-type]
    for place in planner.place(0, min(image.size, 3 * MIB)):  # type: ignore[attr-defined]
        first, last = ((at - header.data_offset) // MIB for at in (place.offset, place.offset + place.length - 1))
        blocks = set(range(first, last + 1))
        assert blocks <= set(range(header.blocks))
        assert not blocks & used if place.fresh else blocks <= used
        used |= blocks
    changes = planner.take()
    assert all(patch.offset == 0x184 for patch in changes.allocate)
    assert all(header.map_offset <= patch.offset < header.map_end for patch in changes.link)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.lists(st.one_of(st.integers(0, BLOCKS), st.just(0xFFFFFFFF), VALUES), min_size=BLOCKS, max_size=BLOCKS),
    words=st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=3),
    length=st.one_of(st.none(), st.none(), st.integers(0, 2048)),
)
def test_damaged_images(path: Path, entries: list[int], words: dict[int, int], length: int | None) -> None:
    build(path, entries, words, length)
    exercise(path)


@settings(max_examples=100, deadline=None)
@given(head=st.binary(max_size=2048))
def test_anything(path: Path, head: bytes) -> None:
    path.write_bytes(head)
    exercise(path)
    path.write_bytes(head[:64].ljust(64, b"\0") + struct.pack("<II", 0xBEDA107F, 0x10001) + head[72:])
    exercise(path)


@given(entries=st.lists(st.one_of(st.integers(0, 5), VALUES), max_size=40))
def test_runs_say_what_the_entries_say(entries: list[int]) -> None:
    found: list[int | None] = []
    expected = [None if entry >= 0xFFFFFFFE else entry for entry in entries]
    for at, count, entry in runs(decode(struct.pack(f"<{len(entries)}I", *entries))):
        assert at == len(found)
        found += [None if entry >= 0xFFFFFFFE else entry + index for index in range(count)]
    assert found == expected
    assert encode(decode(struct.pack(f"<{len(entries)}I", *entries))) == struct.pack(f"<{len(entries)}I", *entries)
