"""The parts of the planner: refcount widths, the metadata view, allocation, packing, damaged metadata."""

from __future__ import annotations

import random
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner_harness import Engine, check, guest, needs_qemu, qemu_io, run
from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Changes, Patch, Placement
from safeimg.drivers.formats.metadata import TAKEN_BYTES, MetadataView, Phase
from safeimg.drivers.formats.qcow2.allocator import CapacityError
from safeimg.drivers.formats.qcow2.driver import driver
from safeimg.drivers.formats.qcow2.planner import Qcow2Planner
from safeimg.drivers.formats.qcow2.refcounts import RefcountLayout
from safeimg.drivers.storage.file import LocalFileSystem


@given(order=st.integers(0, 6), entry=st.integers(0, 40), data=st.data())
def test_counts_of_every_width(order: int, entry: int, data: st.DataObject) -> None:
    layout = RefcountLayout(9, order)
    values = data.draw(st.lists(st.integers(0, layout.maximum), min_size=1, max_size=20))
    block = data.draw(st.binary(min_size=512, max_size=512))
    start, length = layout.span(entry, len(values))
    changed = layout.encode(values, block[start:start + length], entry)
    after = block[:start] + changed + block[start + length:]
    assert bits(after, order)[entry:entry + len(values)] == values
    assert list(layout.decode(changed, entry, len(values))) == values
    others = slice(0, entry), slice(entry + len(values), None)
    for part in others:
        assert bits(after, order)[part] == bits(block, order)[part]


def bits(block: bytes, order: int) -> list[int]:
    """As the specification puts it: big-endian words in order; below a byte from the lowest bit up."""
    width = 1 << order
    if width >= 8:
        step = width // 8
        return [int.from_bytes(block[at:at + step], "big") for at in range(0, len(block), step)]
    return [byte >> shift & ((1 << width) - 1) for byte in block for shift in range(0, 8, width)]


def view(path: Path, content: bytes, cluster_size: int = 65536) -> MetadataView:
    path.write_bytes(content)
    return MetadataView(LocalFileSystem().open(str(path), write=True), cluster_size)


def test_patches_are_the_fewest_and_build_on_each_other(tmp_path: Path) -> None:
    metadata = view(tmp_path / "file", bytes(65536))
    metadata.write(4088, b"A" * 16, Phase.LINK)  # across pages
    metadata.write(4104, b"B" * 8, Phase.LINK)
    metadata.write(20, b"\0" * 8, Phase.LINK)  # changes nothing
    metadata.write(9000, b"C" * 2, Phase.ALLOCATE)
    patches, length = metadata.take()
    assert patches.link == (Patch(4088, bytes(24), b"A" * 16 + b"B" * 8),)
    assert patches.allocate == (Patch(9000, bytes(2), b"CC"),)
    assert length is None
    metadata.write(4090, b"D", Phase.LINK)
    metadata.write(4090, b"E", Phase.LINK)
    assert metadata.take()[0].link == (Patch(4090, b"A", b"E"),)
    assert metadata.read(4086, 6) == b"\0\0AAEA"
    assert not any(metadata.take()[0])


def test_new_structures_have_no_before_and_take_later_changes_in(tmp_path: Path) -> None:
    metadata = view(tmp_path / "file", b"z" * 65536)
    metadata.fresh(65536, bytes(65536))
    metadata.write(65544, b"entry...", Phase.LINK)
    patches, length = metadata.take()
    assert patches.link == ()
    assert patches.allocate == (Patch(65544, None, b"entry..."),)  # zeroes are there already
    assert length == 131072
    metadata.fresh(0, bytes(65536))
    metadata.write(8, b"entry...", Phase.LINK)
    assert metadata.take()[0].allocate == (Patch(0, None, bytes(8) + b"entry..." + bytes(65520)),)
    metadata.write(65544, b"another.", Phase.LINK)
    assert metadata.take()[0].link == (Patch(65544, b"entry...", b"another."),)


def test_one_page_cannot_be_in_both_phases(tmp_path: Path) -> None:
    metadata = view(tmp_path / "file", bytes(65536))
    metadata.write(0, b"a", Phase.LINK)
    with pytest.raises(RuntimeError, match="both phases"):
        metadata.write(9, b"a", Phase.ALLOCATE)


def test_taken_pages_are_dropped_only_once_the_file_holds_them(tmp_path: Path) -> None:
    path, pages = tmp_path / "file", TAKEN_BYTES // 4096 + 500
    metadata = view(path, bytes(pages * 4096))
    for number in range(pages):
        metadata.write(number * 4096, b"x", Phase.LINK)
    patches, _ = metadata.take()
    assert all(metadata.read(number * 4096, 1) == b"x" for number in range(pages))
    with path.open("r+b") as file:
        for patch in patches.link[:900]:
            file.seek(patch.offset)
            file.write(patch.after)
    metadata.write(1, b"y", Phase.LINK)
    for _ in range(40):
        metadata.take()
    assert len(metadata._taken) < pages
    assert all(metadata.read(number * 4096, 1) == b"x" for number in range(pages))
    assert metadata.read(0, 2) == b"xy"


# On real images


def image(folder: Path, options: str = "cluster_size=4096", size: str = "2M") -> Path:
    path = folder / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    return path


def plan(path: Path) -> Qcow2Planner:
    return Qcow2Planner(driver.open(LocalFileSystem().open(str(path), write=True), write=True))


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@needs_qemu
def test_a_plan_without_reserve_is_the_caller_s_mistake(tmp_path: Path) -> None:
    planner = plan(image(tmp_path, "cluster_size=512,refcount_bits=64", "4M"))
    with pytest.raises(CapacityError):
        for start in range(0, 1 << 20, 512):
            planner.place(start, 512)


@needs_qemu
@pytest.mark.parametrize("clusters", [1, 63, 64, 500, 5000])
def test_reserve_makes_room_for_that_many(tmp_path: Path, clusters: int) -> None:
    """Blocks of 64 clusters and a table of 64 blocks: the larger ones need a new table."""
    path = image(tmp_path, "cluster_size=512,refcount_bits=64", "4M")
    engine = Engine(path, random.Random(clusters))
    engine.reserve(clusters, crashes=3)
    engine.write(0, engine.rng.randbytes(clusters * 512))
    engine.apply(engine.planner.take())
    assert not engine.planner.reserve(0)
    engine.apply(engine.planner.release())
    check(path, leaks=False)
    assert guest(path) == engine.model
    engine.roll_back()
    check(path, leaks=False)


@needs_qemu
def test_what_is_freed_is_not_handed_out_again(tmp_path: Path) -> None:
    path = image(tmp_path)
    qemu_io(path, "write -P 1 0 1M")
    engine = Engine(path, random.Random(0))
    taken: set[int] = set()
    for _ in range(4):
        engine.reserve(300)
        engine.zero(0, 512 << 10)
        engine.apply(engine.planner.take(), crashes=0)
        engine.reserve(300)
        engine.write(0, engine.rng.randbytes(512 << 10))
        assert not engine.in_place
        for write in engine.fresh:
            clusters = set(range(write.offset // 4096, (write.offset + len(write.after)) // 4096))
            assert not clusters & taken
            taken |= clusters
        engine.apply(engine.planner.take(), crashes=0)
    assert len(taken) == 512
    engine.planner.release()
    with pytest.raises(RuntimeError, match="nothing can be planned"):
        engine.planner.reserve(1)


@needs_qemu
def test_free_clusters_in_the_middle_are_used_first(tmp_path: Path) -> None:
    path = image(tmp_path, "cluster_size=4096,compat=0.10")
    qemu_io(path, "write -P 1 0 1M", "discard 256K 256K")
    length = path.stat().st_size
    planner = plan(path)
    assert not planner.reserve(64)
    places = planner.place(1 << 20, 256 << 10)
    assert all(place.fresh and place.offset + place.length <= length for place in places)


@needs_qemu
def test_kinds_of_clusters(tmp_path: Path) -> None:
    """In place is what was asked for; fresh is the whole cluster; preallocated space is used where it is."""
    path = image(tmp_path)
    qemu_io(path, "write -P 1 0 8K", "write -P 2 64K 4K", "write -z 64K 4K", "write -c -P 3 128K 4K")
    planner = plan(path)
    planner.reserve(10)
    (in_place,) = planner.place(1000, 5000)
    assert (in_place.start, in_place.length, in_place.fresh) == (1000, 5000, False)
    assert planner.take() == Changes()
    (preallocated,) = planner.place((64 << 10) + 512, 512)
    changes = planner.take()
    assert preallocated[:2] == (64 << 10, 4096)
    assert preallocated.fresh
    assert changes.allocate == ()
    assert [(entry.before, len(entry.after)) for entry in changes.link] == [
        (((1 << 63) | preallocated.offset | 1).to_bytes(8, "big"), 8)
    ]
    (compressed,) = planner.place(128 << 10, 512)
    assert compressed[:2] == (128 << 10, 4096)
    assert compressed.fresh
    assert len(planner.take().unlinked) == 1
    (beyond,) = planner.place((1 << 20) - 100, 5000)
    assert beyond == Placement((1 << 20) - 4096, 12288, beyond.offset, True)


@needs_qemu
def test_the_end_of_the_disk_keeps_no_remains(tmp_path: Path) -> None:
    """A reused cluster that reaches past the virtual end is cleared there: growing would show it."""
    path = image(tmp_path, "cluster_size=4096,compat=0.10", str((1 << 20) + 1024))
    qemu_io(path, "write -P 1 0 1M", "discard 256K 256K")
    planner = plan(path)
    planner.reserve(1)
    (place,) = planner.place(1 << 20, 512)
    assert place.length == 1024
    assert Patch(place.offset + 1024, None, bytes(3072)) in planner.take().allocate


def _touched(offset: int, stored: int) -> set[int]:
    """The host clusters of 4096 bytes that compressed data lies in."""
    return set(range(offset // 4096, (offset + stored - 1) // 4096 + 1))


@needs_qemu
@pytest.mark.parametrize("bits", [1, 2, 16])
def test_hazard_17_compressed_clusters_of_two_steps_share_no_host_cluster(tmp_path: Path, bits: int) -> None:
    path = image(tmp_path, f"cluster_size=4096,refcount_bits={bits}")
    planner = plan(path)
    planner.reserve(100)
    steps: list[set[int]] = []
    packed: list[tuple[int, int]] = []
    for step in range(3):
        hosts: set[int] = set()
        for number in range(9):
            stored = 1000 + 300 * number
            (offset,) = planner.place_compressed((step * 9 + number) * 4096, [stored])
            hosts |= _touched(offset, stored)
            packed.append((offset, stored))
        planner.take()
        steps.append(hosts)
    assert not steps[0] & steps[1] | steps[0] & steps[2] | steps[1] & steps[2]
    packed.sort()
    assert all(left + stored <= right for (left, stored), (right, _) in pairwise(packed))
    users = Counter(host for place in packed for host in _touched(*place))
    assert (max(users.values()) > 1) == (bits > 1)
    assert max(users.values()) < 1 << bits


@needs_qemu
@pytest.mark.parametrize("bits", [1, 2, 16])
@pytest.mark.parametrize("seed", range(4))
def test_compressed_clusters_lie_where_they_would_one_by_one(tmp_path: Path, bits: int, seed: int) -> None:
    """Free space in pieces, counts that are full, L2 tables that end within."""
    rng = random.Random(seed)
    path = image(tmp_path, f"cluster_size=512,refcount_bits={bits}")
    before = Engine(path, rng)
    before.reserve(200)
    for cluster in range(0, 200, 2):
        before.write(cluster << 9, bytes([1]) * 1024)
    before.apply(before.planner.take())
    for cluster in range(200):
        if rng.random() < 0.4:
            before.zero(cluster << 9, 512)
    before.apply(before.planner.take())
    before.apply(before.planner.release())
    at_once, singly = plan(path), plan(path)
    for planner in (at_once, singly):
        changes = planner.reserve(150)
        assert not changes, "the free clusters are those in between"
        assert len(planner.allocator._runs) > 20
    start = 150 << 9
    for count in (5, 70, 25):
        sizes = [rng.choice([rng.randrange(1, 512), 128, 511]) for _ in range(count)]
        found = at_once.place_compressed(start, sizes)
        each = [singly.place_compressed(start + (number << 9), [stored]) for number, stored in enumerate(sizes)]
        assert [[offset] for offset in found] == each
        assert at_once.allocator.available == singly.allocator.available
        start += count << 9
    assert at_once.take() == singly.take()


@needs_qemu
@pytest.mark.parametrize("stored", [0, 4096, 5000])
def test_compressed_data_is_smaller_than_a_cluster(tmp_path: Path, stored: int) -> None:
    planner = plan(image(tmp_path))
    with pytest.raises(ValueError, match="not a compressed cluster"):
        planner.place_compressed(0, [stored])


@needs_qemu
@pytest.mark.parametrize("preallocation", ["metadata", "falloc"])
def test_preallocated_images(tmp_path: Path, preallocation: str) -> None:
    path = image(tmp_path, f"cluster_size=4096,preallocation={preallocation}")
    engine = Engine(path, random.Random(1))
    engine.reserve(300)
    engine.write(5000 & ~511, engine.rng.randbytes(300 << 10))
    engine.zero(1 << 20, 64 << 10)
    engine.apply(engine.planner.take())
    engine.apply(engine.planner.release())
    check(path, leaks=False)
    assert guest(path) == engine.model


# Damaged metadata: one line, no patches


def l2_offset(path: Path) -> int:
    data = path.read_bytes()
    l1 = int.from_bytes(data[40:48], "big")
    return int.from_bytes(data[l1:l1 + 8], "big") & ~(1 << 63)


@needs_qemu
@pytest.mark.parametrize(("entry", "message"), [
    (0x8000_0000_0000_5200, "L2 entry .* is invalid"),  # not aligned
    (0x8000_0000_0000_5002, "L2 entry .* is invalid"),  # reserved bit
    (0x8100_0000_0000_5000, "L2 entry .* is invalid"),
    (0x8000_0000_0000_0000, "L2 entry .* is invalid"),  # copied, and nothing there
    (0xC000_0000_0000_5000, "L2 entry .* is invalid"),  # copied and compressed
    (0x4000_00FF_0000_5000, "refcount 0"),  # compressed, far away
    (0x8000_0000_FFFF_F000, "refcount 0 is flagged as copied"),
    (0x0000_0000_0000_5000, "refcount 1 is not flagged as copied"),
])
def test_bad_entries_are_refused(tmp_path: Path, entry: int, message: str) -> None:
    path = image(tmp_path)
    qemu_io(path, "write 0 64K")
    patch(path, l2_offset(path), struct.pack(">Q", entry))
    planner = plan(path)
    planner.reserve(10)
    with pytest.raises(FormatError, match=message):
        planner.place(0, 4096)


@needs_qemu
def test_structures_that_look_free_are_refused(tmp_path: Path) -> None:
    path = image(tmp_path)
    qemu_io(path, "write 0 64K")
    data = path.read_bytes()
    block = int.from_bytes(data[int.from_bytes(data[48:56], "big"):][:8], "big")
    patch(path, block + 2 * (l2_offset(path) // 4096), b"\0\0")
    with pytest.raises(FormatError, match="metadata has refcount 0: run 'qemu-img check -r all'"):
        plan(path).reserve(1)


@needs_qemu
@pytest.mark.parametrize("table", [0x1200, 1 << 55, (1 << 63) | 0x10_0000_0000])
def test_bad_l2_tables_are_refused(tmp_path: Path, table: int) -> None:
    path = image(tmp_path)
    l1 = int.from_bytes(path.read_bytes()[40:48], "big")
    patch(path, l1, struct.pack(">Q", table))
    planner = plan(path)
    with pytest.raises(FormatError):
        planner.reserve(1)
        planner.place(0, 4096)


@needs_qemu
@pytest.mark.parametrize("ranges", [[(512, 4096)], [(0, 1 << 60)], [(-4096, 4096)], [(4096, 0)]])
def test_a_hostile_log_frees_nothing(tmp_path: Path, ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(FormatError, match="no clusters to free"):
        plan(image(tmp_path)).recall(ranges)


@needs_qemu
def test_release_never_frees_what_is_referenced(tmp_path: Path) -> None:
    """Even if the log says so."""
    path = image(tmp_path)
    qemu_io(path, "write -P 7 0 64K")
    engine = Engine(path, random.Random(0))
    engine.planner.recall([(0, path.stat().st_size // 4096 * 4096)])
    engine.apply(engine.planner.release())
    check(path, leaks=False)
    assert not engine.planner.freed()
