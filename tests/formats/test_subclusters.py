"""Extended L2 entries: clusters whose 32 parts are allocated, zero or the backing image's, in any mixture."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planner_harness import Engine, check, guest
from qcow2_images import FS, needs_qemu, open_path, patched, qemu_img, qemu_io, run, u64
from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Kind
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.formats.qcow2.entries import COPIED, OFFSET_MASK, ZERO
from safeimg.drivers.formats.qcow2.l2 import EVERY, L2Layout, runs, subcluster_runs
from safeimg.drivers.formats.qcow2.usage import referenced
from safeimg.ops.map import block_map
from test_qcow2_check import assert_same_as_qemu

CLUSTER, PART = 16384, 512
SIZE = 6 * CLUSTER + 5 * PART
BACKING = 5 * CLUSTER  # bytes of the backing image


# Entries

bitmaps = st.integers(0, EVERY)


@given(allocated=bitmaps, zeroes=bitmaps)
def test_runs_are_the_mask_again(allocated: int, zeroes: int) -> None:
    zeroes &= ~allocated
    found = subcluster_runs(allocated, zeroes, 32)
    assert [first for first, *_ in found] == [sum(run[1] for run in found[:number]) for number in range(len(found))]
    assert sum((1 << count) - 1 << first for first, count, is_set, _ in found if is_set) == allocated
    assert sum((1 << count) - 1 << first for first, count, _, is_zero in found if is_zero) == zeroes
    assert all(one[2] is not other[2] for one, other in pairwise(runs(allocated, 32)))


@given(entries=st.lists(st.tuples(st.integers(0, (1 << 64) - 1), bitmaps, bitmaps)), extended=st.booleans())
def test_entries_as_stored(entries: list[tuple[int, int, int]], extended: bool) -> None:
    layout = L2Layout(16, extended)
    whole = [word | (zeroes << 96 | allocated << 64 if extended else 0) for word, allocated, zeroes in entries]
    data = layout.encode(whole)
    assert len(data) == layout.entry_size * len(entries)
    assert list(layout.decode(data)) == whole
    if extended:
        assert [layout.masks(entry) for entry in whole] == [(allocated, zeroes) for _, allocated, zeroes in entries]


def test_a_standard_cluster_is_one_subcluster() -> None:
    layout = L2Layout(16, False)
    assert [layout.masks(entry) for entry in (0, ZERO, 0x50000 | ZERO, COPIED | 0x50000)] == [
        (0, 0), (0, 1), (0, 1), (1, 0)]
    assert layout.with_masks(0x50000, 0, 1) == 0x50001
    assert layout.with_masks(0x50001 | COPIED, 1, 0) == 0x50000 | COPIED


# What QEMU makes


class Command(NamedTuple):
    """What a guest does; in parts of 512 bytes."""

    kind: str
    start: int
    count: int

    def words(self, number: int) -> str:
        start = self.start - self.start % 32 if "-c" in self.kind else self.start
        count = 32 if "-c" in self.kind else min(self.count, SIZE // PART - start)
        pattern = f" -P {number % 250 + 1}" if self.kind in ("write", "write -c") else ""
        return f"{self.kind}{pattern} {start * PART} {count * PART}"


parts = st.integers(0, SIZE // PART - 1)
lengths = st.one_of(st.integers(1, 12), st.sampled_from([16, 31, 32, 33, 64]))
kinds = st.sampled_from(["write", "write", "write", "write -z", "write -z", "write -zu", "discard"])
commands = st.lists(st.builds(Command, kinds, parts, lengths), max_size=12)
packed = st.lists(st.builds(Command, st.just("write -c"), st.integers(0, BACKING // PART - 1), lengths), max_size=2)


def build(folder: Path, backed: bool, steps: list[Command]) -> Path:
    base, path = folder / "base", folder / "image.qcow2"
    base.write_bytes(b"\xfb" * BACKING)
    backing: tuple[str | Path, ...] = ("-b", base, "-F", "raw") if backed else ()
    path.unlink(missing_ok=True)
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER},extended_l2=on", *backing, path, str(SIZE))
    # QEMU refuses to compress over a cluster that is allocated, and goes on.
    words = [word for number, step in enumerate(steps) for word in ("-c", step.words(number))]
    run("qemu-io", "-f", "qcow2", *words, path)
    return path


def entries_of_map(path: Path) -> list[dict[str, Any]]:
    """Our map in qemu-img's words."""
    chain = open_chain(FS, str(path), format="qcow2")
    try:
        return [
            {name: value for name, value in entry._asdict().items() if name != "offset" or value is not None}
            for entry in block_map(chain, 0, chain[0].size)
        ]
    finally:
        close_chain(chain)


@needs_qemu
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packed=packed, steps=commands, backed=st.booleans(), seed=st.integers(0, 1 << 20))
def test_written_by_turns(
    tmp_path: Path, packed: list[Command], steps: list[Command], backed: bool, seed: int
) -> None:
    """QEMU writes, we read and write, QEMU goes on: content, map and `check` agree at each point."""
    path = build(tmp_path, backed, packed + steps)
    assert entries_of_map(path) == json.loads(qemu_img("map", "--output=json", path))
    assert_same_as_qemu(path)
    engine = Engine(path, random.Random(seed))
    for _ in range(2):
        engine.reserve(20, crashes=0)
        write_in_parts(engine)
        engine.apply(engine.planner.take(), crashes=0)
    engine.apply(engine.planner.release(), crashes=0)
    engine.image.close()
    assert guest(path) == engine.model
    result = assert_same_as_qemu(path)
    assert result is not None and not result.messages
    qemu_io(path, f"write -P 9 {3 * PART} {40 * PART}", f"write -z {50 * PART} {30 * PART}")
    check(path, leaks=False)


def write_in_parts(engine: Engine) -> None:
    """A step of data and zeroes in a few clusters; no part twice."""
    rng, touched = engine.rng, set[int]()
    for _ in range(6):
        start = rng.randrange(SIZE - PART)
        length = min(rng.choice((1, 500, 512, 1000, 4096, 9000, CLUSTER)), SIZE - start)
        zero = rng.random() < 0.5
        if rng.random() < 0.5:
            start -= start % PART
            length = min(-(-length // PART) * PART, SIZE - start)
        mine = set(range(start // PART, (start + length - 1) // PART + 1))
        if mine & touched:
            continue
        touched |= mine
        if zero:
            engine.zero(start, length)
        else:
            engine.write(start, rng.randbytes(length))


# Places


@needs_qemu
def test_data_goes_first_into_what_is_not_allocated(tmp_path: Path) -> None:
    path = build(tmp_path, True, [Command("write", 4, 4), Command("write -z", 10, 2)])
    engine = Engine(path, random.Random(0))
    assert not engine.planner.reserve(4)
    entry = u64(path.read_bytes(), l2_table(path))
    host = entry & OFFSET_MASK
    places = engine.planner.place(2 * PART + 100, 9 * PART)
    # Up to what is live and in place, then up to the end of the last part that is touched.
    assert [(place.start, place.length, place.offset - host, place.fresh) for place in places] == [
        (2 * PART, 2 * PART, 2 * PART, True), (4 * PART, 4 * PART, 4 * PART, False),
        (8 * PART, 4 * PART, 8 * PART, True),
    ]
    changes = engine.planner.take()
    assert not changes.allocate and not changes.unlinked
    (link,) = changes.link
    assert (link.offset, len(link.after)) == (l2_table(path), 16)
    assert link.before == entry.to_bytes(8, "big") + (0xC00 << 32 | 0xF0).to_bytes(8, "big")
    assert link.after == entry.to_bytes(8, "big") + 0xFFC.to_bytes(8, "big")


@needs_qemu
def test_hazard_24_zeroes_by_parts_keep_what_lay_there_until_the_end(tmp_path: Path) -> None:
    """What a step makes zero may be needed again: a later step's data must not go there, nor that of a new planner."""
    path = build(tmp_path, True, [Command("write", 0, 32)])
    engine = Engine(path, random.Random(0))
    engine.reserve(4)
    host = u64(path.read_bytes(), l2_table(path)) & OFFSET_MASK
    engine.zero(4 * PART, 8 * PART)
    assert not engine.fresh and not engine.in_place
    changes = engine.planner.take()
    assert changes.unlinked == ((host + 4 * PART, 8 * PART),)
    engine.apply(changes)
    for _ in range(2):
        (elsewhere,) = engine.planner.place(6 * PART, PART)
        assert elsewhere.fresh and elsewhere.offset // CLUSTER != host // CLUSTER
        assert (elsewhere.start, elsewhere.length) == (0, CLUSTER)
        engine.reopen()
        engine.reserve(4)
    (in_place,) = engine.planner.place(20 * PART, PART)
    assert (in_place.offset, in_place.fresh) == (host + 20 * PART, False)
    engine.apply(engine.planner.release())
    engine.unlinked.clear()  # another operation
    engine.reopen()
    engine.reserve(4)
    (there,) = engine.planner.place(6 * PART, PART)
    assert (there.offset, there.length, there.fresh) == (host + 6 * PART, PART, True)


@needs_qemu
def test_all_parts_zero_give_the_cluster_up(tmp_path: Path) -> None:
    path = build(tmp_path, True, [Command("write", 3, 2)])
    engine = Engine(path, random.Random(0))
    host = u64(path.read_bytes(), l2_table(path)) & OFFSET_MASK
    engine.zero(2 * PART, 8 * PART)
    changes = engine.planner.take()
    assert changes.unlinked == ((host, CLUSTER),)
    engine.apply(changes)
    engine.apply(engine.planner.release())
    check(path, leaks=False)
    assert guest(path) == engine.model


@needs_qemu
@pytest.mark.parametrize("extended", [True, False])
def test_hazard_25_places_that_nobody_reads_are_not_referred_to(tmp_path: Path, extended: bool) -> None:
    """What recovery asks before it takes a step back: data for a preallocated place lies in a counted cluster."""
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size=16k,extended_l2={'on' if extended else 'off'}", path,
             "1M")
    qemu_io(path, "write -P 1 0 16k", "write -P 2 16k 16k", "write -z 16k 16k" if not extended else "write -z 20k 4k")
    data = path.read_bytes()
    first, second = (u64(data, l2_table(path) + at) & OFFSET_MASK for at in (0, 16 if extended else 8))
    idle = (second + 4096, 4096)
    image = open_path(path)
    asked = [(first, 512), idle, (second, 4096), (second, 16384), (len(data) + CLUSTER, 512), (first, 32768)]
    expected = [(first, 512), (first, 32768)] if not extended else [asked[0], *asked[2:4], asked[5]]
    assert referenced(image, asked) == expected
    image.close()
    if extended:
        return
    qemu_img("snapshot", "-c", "one", path)
    image = open_path(path)
    assert idle in referenced(image, [idle])
    image.close()


# Damage


def l2_table(path: Path) -> int:
    data = path.read_bytes()
    return u64(data, u64(data, 40)) & OFFSET_MASK


BAD = [
    (0, None, EVERY | 1 << 32), (0, None, EVERY | 1 << 63), (0, 0, 1), (0, COPIED, 3 << 32 | 3), (0, 2, 0),
    (0, 3 << 56, 5),
    (0, 0x50200, EVERY | 1 << 40), (0, 0x50202 | COPIED, 1), (0, 0x50200, 0), (0, 0x50200, 1 << 32),
    (32, None, 1), (32, None, 1 << 63),
]


@needs_qemu
@pytest.mark.parametrize(("at", "descriptor", "bitmap"), BAD)
def test_mistakes_are_described_as_by_qemu(tmp_path: Path, at: int, descriptor: int | None, bitmap: int) -> None:
    path = build(tmp_path, False, [Command("write", 0, 32), Command("write", 40, 2), Command("write -c", 64, 32)])
    data, table = path.read_bytes(), l2_table(path)
    entry = u64(data, table + at) if descriptor is None else descriptor
    path.write_bytes(patched(data, (">Q", table + at, entry), (">Q", table + at + 8, bitmap)))
    result = assert_same_as_qemu(path)
    assert result is not None and result.corruptions
    read = run("qemu-io", "-r", "-c", "read 0 512", path)
    image = open_path(path)
    if "corrupt" in read.stderr:
        with pytest.raises(FormatError) as caught:
            list(image.extents(0, SIZE))
        assert f"qcow2: {caught.value.problem};" in read.stderr
    elif not entry & 3 << 56 and not entry & 2:  # reserved bits stop us, but not QEMU
        assert sum(extent.length for extent in image.extents(0, SIZE)) == SIZE
    image.close()


@needs_qemu
def test_the_zero_flag_means_nothing(tmp_path: Path) -> None:
    """As in QEMU: the bitmap alone says what is zero."""
    path = build(tmp_path, False, [Command("write", 0, 32)])
    data, table = path.read_bytes(), l2_table(path)
    path.write_bytes(patched(data, (">Q", table, u64(data, table) | ZERO)))
    result = assert_same_as_qemu(path)
    assert result is not None and not result.corruptions
    image = open_path(path)
    assert next(image.extents(0, CLUSTER)).kind is Kind.DATA
    image.close()


@needs_qemu
def test_clusters_too_small_are_refused_in_qemus_words(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=8k", path, "1M")
    path.write_bytes(patched(path.read_bytes(), (">Q", 72, 1 << 4)))
    with pytest.raises(Exception, match="Unsupported subcluster size: 256") as caught:
        open_path(path)
    assert str(caught.value) in run("qemu-img", "info", path).stderr
