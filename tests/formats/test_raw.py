"""Raw images: the file is the disk."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from safeimg.drivers.errors import UnsupportedError, UsageError
from safeimg.drivers.formats.api import Changes, Extent, Kind, Placement
from safeimg.drivers.formats.raw import RawImage, RawPlanner, driver
from safeimg.drivers.storage.file import LocalFileSystem


def opened(path: Path) -> RawImage:
    return RawImage(LocalFileSystem().open(str(path), write=True))


def test_holes_are_zeroes_with_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(4 << 20)
        file.seek(1 << 20)
        file.write(b"x" * (1 << 20))
    image = opened(path)
    extents = list(image.extents(0, 1 << 40))
    assert extents == [
        Extent(0, 1 << 20, Kind.ZERO, 0),
        Extent(1 << 20, 1 << 20, Kind.DATA, 1 << 20),
        Extent(2 << 20, 2 << 20, Kind.ZERO, 2 << 20),
    ]
    assert list(image.extents(512, 1024)) == [Extent(512, 1024, Kind.ZERO, 512)]
    assert list(image.extents(4 << 20, 512)) == []


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="needs qemu-img")
@pytest.mark.parametrize("length", [1, 511, 512, 513, 70001])
def test_size_and_map_are_qemu_s(tmp_path: Path, length: int) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"y" * length)
    image = opened(path)
    command = ["qemu-img", "info", "--output=json", "-f", "raw", str(path)]
    info = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert image.size == info["virtual-size"]
    assert sum(extent.length for extent in image.extents(0, image.size)) == image.size
    command = ["qemu-img", "map", "--output=json", "-f", "raw", str(path)]
    mapped = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert [(piece["start"], piece["zero"]) for piece in mapped] == [
        (extent.start, extent.kind is Kind.ZERO) for extent in image.extents(0, image.size)
    ]


def test_every_write_is_in_place(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    planner = RawPlanner(opened(path))
    assert not planner.reserve(100)
    assert planner.place(700, 3000) == [Placement(700, 3000, 700, False)]
    assert planner.zero(4096, 4096) == [Placement(4096, 4096, 4096, False)]
    assert planner.place(5, 0) == []
    assert planner.take() == Changes()
    assert not planner.release()
    assert not planner.freed()
    with pytest.raises(ValueError, match="not in 0x100000"):
        planner.place(1 << 20, 1)
    with pytest.raises(UnsupportedError):
        planner.place_compressed(0, [100])


def test_growing_changes_the_length(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    planner = RawPlanner(opened(path))
    assert not planner.prepare_resize(8192)
    assert not planner.exposed(8192, 1 << 30)
    assert planner.resize(8192) == (Changes(length=8192),)
    assert planner.place(4096, 4096) == [Placement(4096, 4096, 4096, False)]
    assert planner.shrink(4096) == ()
    assert planner.place(0, 4096) == [Placement(0, 4096, 0, False)]
    with pytest.raises(ValueError, match="not in 0x1000"):
        planner.place(4096, 1)


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_create(tmp_path: Path, preallocation: str) -> None:
    path = tmp_path / "disk.raw"
    driver.create(LocalFileSystem(), str(path), 100_000, {"preallocation": preallocation})
    assert path.read_bytes() == bytes(100_352)
    allocated = path.stat().st_blocks * 512
    assert allocated == 4096 if preallocation == "off" else allocated >= 100_352


def test_create_refuses_unknown_preallocation(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="metadata"):
        driver.create(LocalFileSystem(), str(tmp_path / "disk"), 512, {"preallocation": "metadata"})
    assert not (tmp_path / "disk").exists()
