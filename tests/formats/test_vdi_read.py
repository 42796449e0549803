"""Reading VDI images: what qemu-img writes is read, what it refuses is refused in its words, and more."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from pathlib import Path

import pytest
from planner_harness import needs_qemu
from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Extent, Kind
from safeimg.drivers.formats.chain import OpenError, open_chain
from safeimg.drivers.formats.vdi import image as vdi_image
from safeimg.drivers.formats.vdi.driver import driver
from safeimg.drivers.transfer.view import View
from safeimg.ops.map import block_map as mapped
from vdi_images import FS, MIB, create, filled, guest, opened, poke, write

pytestmark = needs_qemu


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Blocks 1, 3, 5 and 6 of ten, allocated as 1, 0, 3 and 2."""
    path = create(tmp_path / "image.vdi", "10M")
    write(path, "write -P 1 3M 4k", "write -P 2 1M 1M", "write -P 5 7000k 512", "write -P 6 5M 1M")
    return path


def qemu_map(path: Path) -> list[dict[str, object]]:
    command = ["qemu-img", "map", "-f", "vdi", "--output=json", path]
    found: list[dict[str, object]] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


def our_map(path: Path) -> list[dict[str, object]]:
    layers = open_chain(FS, str(path), format="vdi")
    entries = [entry._asdict() for entry in mapped(layers, 0, layers[0].size)]
    return [{name: value for name, value in entry.items() if value is not None} for entry in entries]


def test_extents(image: Path) -> None:
    found = list(opened(image).extents(0, 1 << 40))
    assert found == [
        Extent(0, MIB, Kind.ZERO),
        Extent(MIB, MIB, Kind.DATA, 1024 + MIB),
        Extent(2 * MIB, MIB, Kind.ZERO),
        Extent(3 * MIB, MIB, Kind.DATA, 1024),
        Extent(4 * MIB, MIB, Kind.ZERO),
        Extent(5 * MIB, MIB, Kind.DATA, 1024 + 3 * MIB),
        Extent(6 * MIB, MIB, Kind.DATA, 1024 + 2 * MIB),
        Extent(7 * MIB, 3 * MIB, Kind.ZERO),
    ]
    assert list(opened(image).extents(MIB + 5, 20)) == [Extent(MIB + 5, 20, Kind.DATA, 1024 + MIB + 5)]
    assert list(opened(image).extents(10 * MIB, 1)) == []


@pytest.mark.parametrize("seed", range(4))
def test_content_and_map_are_qemu_s(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vdi_image, "_AT_ONCE", 3)  # several pieces of a small map
    path = filled(tmp_path / "image.vdi", random.Random(seed), static=seed == 3)
    if seed == 2:
        poke(path, (512 + 4 * 8, 0xFFFFFFFE), (512, 5))
    view = View([opened(path)])
    content = bytearray(view.size)
    view.read_into(0, memoryview(content))
    assert content == guest(path)
    assert our_map(path) == qemu_map(path)


def refusals(path: Path) -> tuple[str, str]:
    """What qemu-img and safeimg say of an image that cannot be opened."""
    command = ["qemu-img", "info", "-f", "vdi", path]
    theirs = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    try:
        open_chain(FS, str(path), format="vdi")[0].close()
    except OpenError as error:
        return theirs, f"qemu-img: {error}\n"
    return theirs, ""


FAULTS = [
    *([(0x40, value)] for value in (0, 0xBEDA107E)),
    *([(0x44, value)] for value in (0, 0x10000, 0x10002, 0x20001, 0xFFFF0001)),
    *([(0x154, value)] for value in (0x201, 0x400, 0, 0xFFFFFE00)),
    *([(0x158, value)] for value in (0x401, 0x200, 0)),
    *([(0x168, value)] for value in (0, 4096)),
    *([(0x170, value)] for value in (1, 0xA00001, 0xA00200, 0x900000)),
    *([(0x174, value)] for value in (1, 0xFFFFFFFF)),
    [(0x170, 1), (0x174, 0x1FFFF)],
    [(0x170, 0xF8000001), (0x174, 0x1FFFF)],
    *([(0x178, value)] for value in (0, 0x200000)),
    *([(0x180, value)] for value in (9, 11, 0x1FFFFF81, 0xFFFFFFFF)),
    [(0x180, 0xFFFFFFFF), (0x1B8, 1)],
    [(0x1A8, 1), (0x1B8, 1)],
    [(0x1B4, 1)],
    [(0x1C4, 1)],
    *([(offset, 1)] for offset in (0x48, 0x4C, 0x50, 0x15C, 0x16C, 0x17C, 0x184, 0x188, 0x1C8)),
]


@pytest.mark.parametrize("words", FAULTS, ids=lambda words: " ".join(f"{at:x}={value:x}" for at, value in words))
def test_what_opens_and_what_is_said_otherwise(image: Path, words: list[tuple[int, int]]) -> None:
    poke(image, *words)
    theirs, ours = refusals(image)
    assert ours == theirs


def test_the_first_fault_is_named(image: Path) -> None:
    """With everything wrong, and what was named put right one after the other."""
    good = image.read_bytes()
    wrong = (0x174, 0x40, 0x44, 0x154, 0x158, 0x168, 0x178, 0x180, 0x1A8, 0x1B8)
    poke(image, *((offset, 0xFFFFFFFF if offset == 0x174 else 1) for offset in wrong))
    for offset in wrong:
        theirs, ours = refusals(image)
        assert ours == theirs != ""
        poke(image, (offset, struct.unpack_from("<I", good, offset)[0]))
    assert refusals(image) == ("", "")


@pytest.mark.parametrize(
    "words",
    [
        [],
        [(0x184, 5)],
        [(0x184, 0)],
        [(0x200, 1)],
        [(0x200, 1), (0x208, 1), (0x210, 3)],
        [(0x200, 10)],
        [(0x208, 0xFFFFFFFD), (0x210, 11)],
        [(0x200, 0xFFFFFFFE)],
        [(0x200, 9), (0x184, 5)],
        [(0x180, 11), (0x228, 7)],
        [(0x170, 0x900000), (0x224, 7)],
    ],
    ids=str,
)
def test_check(image: Path, words: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vdi_image, "_AT_ONCE", 2)
    poke(image, *words)
    command = ["qemu-img", "check", "-f", "vdi", "--output=json", image]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = driver.check(opened(image))
    assert result.messages == tuple(done.stderr.splitlines())
    assert result.corruptions == json.loads(done.stdout).get("corruptions", 0)
    assert (result.leaks, result.check_errors, result.total_clusters) == (0, 0, 0)


def test_a_map_that_is_cut_off_is_an_error(image: Path) -> None:
    poke(image, (0x180, 1000))
    with image.open("r+b") as file:
        file.truncate(1024)
    found = opened(image)
    assert len(list(found.extents(0, 10 * MIB))) == 8
    with pytest.raises(FormatError, match="behind the file at offset 0x400"):
        driver.check(found)
    with image.open("r+b") as file:
        file.truncate(516)
    with pytest.raises(FormatError, match="behind the file at offset 0x204"):
        list(found.extents(0, 10 * MIB))
    poke(image, (0x180, 10))
    with pytest.raises(FormatError, match="behind the file"):
        opened(image, write=True)


@pytest.mark.parametrize("words", [[(0x154, 0)], [(0x158, 0x200)], [(0x154, 0x400)]], ids=str)
def test_structures_that_overlap_are_not_written_to(image: Path, words: list[tuple[int, int]]) -> None:
    poke(image, *words)
    opened(image)
    with pytest.raises(FormatError, match="overlap"):
        opened(image, write=True)


def test_many_faults_are_counted_and_not_all_named(tmp_path: Path) -> None:
    """A hole for a map: every entry is block 0."""
    path = tmp_path / "image.vdi"
    create(path, "1M")
    blocks = 1 << 20
    poke(path, (0x158, 512 + 4 * blocks), (0x180, blocks), (0x200, 0), (0x184, 1))
    with path.open("r+b") as file:
        file.truncate(512 + 4 * blocks)
    result = driver.check(opened(path))
    assert result.corruptions == blocks - 1 + 1
    assert len(result.messages) == 10_001
    assert result.messages[-1] == f"ERROR: allocated blocks mismatch, is {blocks}, should be 1"
