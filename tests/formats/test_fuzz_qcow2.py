"""Mutated qcow2 images: opening, mapping, reading, inflating and checking end well or in a one-line
`DriverError`.

A quick slice runs with the suite. `python tests/formats/test_fuzz_qcow2.py --seconds 600 --seed 1` goes on
for longer; it prints the seed of each failure, which `--only SEED` runs alone."""

from __future__ import annotations

import argparse
import random
import resource
import tempfile
import time
import traceback
from pathlib import Path

import pytest
from qcow2_damage import fuzz, spots
from qcow2_images import FS, RECIPES, build, needs_qemu
from safeimg.drivers.errors import DriverError
from safeimg.drivers.formats.api import Kind
from safeimg.drivers.formats.qcow2.bitmaps import read_bitmap_table
from safeimg.drivers.formats.qcow2.check import check
from safeimg.drivers.formats.qcow2.header import serialise
from safeimg.drivers.formats.qcow2.image import Qcow2Image, open_image
from safeimg.drivers.formats.qcow2.info import specific_info
from safeimg.drivers.formats.qcow2.mapping import Mapping

MAX_EXTENTS = 5000
MAX_SECONDS = 20.0  # for one image, on a slow machine; the usual is a few milliseconds
# The large clusters of one recipe make for large files, slow to write and not more interesting.
SMALL = [recipe for recipe in RECIPES if recipe.cluster_size <= 65536]


def exercise(path: Path) -> bool:
    """Does everything that reads; False if the image could not be opened."""
    file = FS.open(str(path))
    try:
        try:
            image = open_image(file)
        except DriverError as error:
            assert "\n" not in str(error)
            return False
        serialise(image.header)
        for action in (read, look_inside, check):
            try:
                action(image)
            except DriverError as error:
                assert "\n" not in str(error) and str(error)
        return True
    finally:
        file.close()


def read(image: Qcow2Image) -> None:
    walk(image, Mapping(
        image.file, image.header, l1_table_offset=image.header.l1_table_offset, l1_size=image.header.l1_size,
        size=image.size, cache_bytes=1 << 16,
    ))


def walk(image: Qcow2Image, mapping: Mapping | Qcow2Image) -> None:
    position = 0
    for number, extent in enumerate(mapping.extents(0, mapping.size)):
        assert extent.start == position and extent.length > 0
        position += extent.length
        if extent.kind is Kind.COMPRESSED:
            assert extent.offset is not None and extent.length <= image.cluster_size
            assert extent.stored <= 2 * image.cluster_size
            stored = image.file.pread(extent.offset, extent.stored)
            try:
                assert len(image.decompress(extent, stored)) == extent.length
            except DriverError:
                pass
        elif extent.kind is Kind.DATA:
            assert extent.offset is not None and extent.offset < image.file.length()
        if number > MAX_EXTENTS:
            return
    assert position == mapping.size


def look_inside(image: Qcow2Image) -> None:
    for snapshot in image.snapshots:
        try:
            walk(image, image.at(snapshot))
        except DriverError:
            pass
    specific_info(image)
    for bitmap in image.bitmaps:
        read_bitmap_table(image.file, image.header, bitmap)


def run_seed(seed: int, originals: list[bytes], path: Path) -> bool:
    generator = random.Random(seed)
    data = generator.choice(originals)
    path.write_bytes(fuzz(generator, data, spots(data)))
    started = time.monotonic()
    opened = exercise(path)
    assert time.monotonic() - started < MAX_SECONDS, "took too long"
    return opened


def make_originals(folder: Path) -> list[bytes]:
    return [build(folder / f"{number}.qcow2", recipe).read_bytes() for number, recipe in enumerate(SMALL)]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return make_originals(tmp_path_factory.mktemp("fuzz"))


@needs_qemu
@pytest.mark.parametrize("first", range(0, 300, 100))
def test_mutated_images(originals: list[bytes], tmp_path: Path, first: int) -> None:
    opened = 0
    for seed in range(first, first + 100):
        try:
            opened += run_seed(seed, originals, tmp_path / "image.qcow2")
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
    assert opened > 20  # most mutations have to get past the header, or nothing is tested


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--only", type=int, help="runs this seed alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        originals = make_originals(Path(folder))
        path = Path(folder) / "image.qcow2"
        if options.only is not None:
            run_seed(options.only, originals, path)
            return 0
        end = time.monotonic() + options.seconds
        seed, failures, opened = options.seed, 0, 0
        while time.monotonic() < end:
            try:
                opened += run_seed(seed, originals, path)
            except Exception:
                failures += 1
                print(f"seed {seed}:\n{traceback.format_exc()}")
            seed += 1
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"seeds {options.seed} to {seed - 1}: {opened} opened, {failures} failed; {memory} MiB at most")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
