"""Growing and shrinking the virtual disk (DESIGN, hazards 12 and 16).

Growing has three parts, each step a valid image: an L1 table that is large enough (`prepare_resize`), zeroes over what
would be exposed (the caller, with `exposed` and `zero`), the size (`resize`). Tables of persistent bitmaps
have to fit the size exactly or QEMU does not open the image, so size and bitmap directory change together, in
one sector (`bitmap_store`). Shrinking changes the size first, and then unmaps what lies behind it (`shrink`,
`forget`). """

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from safeimg.drivers.errors import UnsupportedError, UsageError
from safeimg.drivers.formats.api import Changes
from safeimg.drivers.formats.features import inconsistent
from safeimg.drivers.formats.qcow2.bitmap_store import all_kept, store
from safeimg.drivers.formats.qcow2.bitmaps import MAX_BITMAP_BYTES, Bitmap
from safeimg.drivers.formats.qcow2.entries import COMPRESSED
from safeimg.drivers.formats.qcow2.header import MAX_L1_BYTES
from safeimg.drivers.formats.qcow2.l2 import subcluster_runs

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner


def prepare_resize(planner: Qcow2Planner, size: int) -> Sequence[Changes]:
    """An L1 table that is large enough for `size` bytes, which may be planned for from now on. Each of the
    changes is a step of its own; the virtual disk stays as it is."""
    header = planner.header
    _check(planner, size)
    if size < planner.size:
        raise ValueError(f"{planner.path}: {size} bytes are less than {planner.size}")
    changes: list[Changes] = []
    _check_consistent(planner.bitmaps)
    entries = -(-size // header.l2_coverage)
    if 8 * entries > MAX_L1_BYTES:
        raise UsageError("Failed to grow the L1 table: File too large")
    _check_bitmaps(planner, size)
    if entries > planner.l1_size:
        clusters = -(-8 * entries // planner.cluster_size)
        changes += _reserve_run(planner, clusters)
        content = planner.view.read(planner.l1_table_offset, 8 * planner.l1_size)
        offset = planner.allocator.allocate_run(clusters) << header.cluster_bits
        planner.view.fresh(offset, content.ljust(clusters << header.cluster_bits, b"\0"))
        old_clusters = -(-8 * planner.l1_size // planner.cluster_size)
        planner.unlink_clusters(planner.l1_table_offset >> header.cluster_bits, old_clusters)
        planner.switch(l1_size=entries, l1_table_offset=offset)
        planner.restart_tables(offset, entries)
        changes.append(planner.take())
    planner.size = size
    return changes


def exposed(planner: Qcow2Planner, size: int, backing_size: int) -> Sequence[tuple[int, int]]:
    """Guest ranges (start, length) behind the present end that would not read as zeroes after growing to
    `size`: remains in this image, and what a backing image of `backing_size` bytes would show. After
    `prepare_resize`."""
    found: list[tuple[int, int]] = []
    for start, end in _exposed(planner, planner.current_size, size, backing_size):
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], end - found[-1][0])
        else:
            found.append((start, end - start))
    return found


def resize(planner: Qcow2Planner, size: int) -> Sequence[Changes]:
    """The virtual size, after `prepare_resize`, by the last of the changes. Each is a step of its own."""
    planner.ready()
    if size != planner.size:
        raise RuntimeError(f"{planner.path}: resize to {size} bytes was not prepared")
    if planner.bitmaps:
        return list(store(planner, all_kept(planner.bitmaps), size=size))
    planner.switch(size=size)
    planner.current_size = size
    return [planner.take()]


def shrink(planner: Qcow2Planner, size: int) -> Sequence[Changes]:
    """The virtual size becomes smaller by the last of the changes, each a step of its own. What lay behind is still
    mapped: see `forget`."""
    _check(planner, size)
    _check_consistent(planner.bitmaps)
    _check_bitmaps(planner, size)
    planner.size = size
    return resize(planner, size)


def forget(planner: Qcow2Planner, start: int, most: int) -> int | None:
    """Unmaps what lies in whole clusters behind the end of the virtual disk, of guest offset `start` and behind, in
    up to `most` L2 tables. Where it stopped; None if there is nothing left."""
    planner.ready()
    coverage, size = planner.header.l2_coverage, planner.cluster_size
    end = planner.l1_size * coverage
    position = max(start, -(-planner.size // size) * size)
    for _ in range(most):
        table = 0
        while position < end and not table:
            l1_index = position // coverage
            table, _copied = planner.tables.l2_table(l1_index)
            if not table:
                position = (l1_index + 1) * coverage
        if position >= end:
            return None
        stop = (l1_index + 1) * coverage
        ((cluster, entries),) = planner.tables.entries(position, stop - position)
        for number, entry in enumerate(entries, cluster):
            if entry:
                planner.tables.unlink(number, entry)
        if position % coverage == 0:
            planner.tables.drop(l1_index)
        elif any(entries):
            planner.tables.put(cluster, [0] * len(entries))
        position = stop
    return position if position < end else None


def _reserve_run(planner: Qcow2Planner, clusters: int) -> Iterator[Changes]:
    while planner.allocator.reserve_run(clusters):
        yield planner.take()


def _exposed(planner: Qcow2Planner, start: int, end: int, backing_size: int) -> Iterator[tuple[int, int]]:
    header = planner.header
    visible = backing_size if header.backing_file is not None else 0
    position = start
    while position < end:
        l1_index = position // header.l2_coverage
        limit = min(end, (l1_index + 1) * header.l2_coverage)
        table, _copied = planner.tables.l2_table(l1_index)
        if not table:
            if position < visible:
                yield position, min(limit, visible)
            position = limit
            continue
        for cluster, entries in planner.tables.entries(position, limit - position):
            for number, entry in enumerate(entries, cluster):
                yield from _exposed_in(planner, number, entry, position, limit, visible)
        position = limit


def _exposed_in(planner: Qcow2Planner, cluster: int, entry: int, start: int, end: int,
                visible: int) -> Iterator[tuple[int, int]]:
    """The part of one guest cluster: ranges (start, end)."""
    l2 = planner.header.l2
    allocated, zeroes = (l2.every, 0) if entry & COMPRESSED else l2.masks(entry)
    for first, count, is_data, is_zero in subcluster_runs(allocated, zeroes, l2.subclusters):
        left = max(start, cluster * planner.cluster_size + first * l2.subcluster_size)
        right = min(end, cluster * planner.cluster_size + (first + count) * l2.subcluster_size)
        if not is_data:
            right = left if is_zero else min(right, visible)
        if left < right:
            yield left, right


def _check(planner: Qcow2Planner, size: int) -> None:
    """Refuses what cannot have this size or any other."""
    planner.ready()
    if size % 512:
        raise UsageError("The new size must be a multiple of 512")
    if planner.header.version == 2 and planner.header.nb_snapshots:
        raise UnsupportedError("Can't resize a v2 image which has snapshots")


def _check_consistent(bitmaps: Sequence[Bitmap]) -> None:
    for bitmap in bitmaps:
        if bitmap.in_use:
            raise UsageError(inconsistent(bitmap.name))


def _check_bitmaps(planner: Qcow2Planner, size: int) -> None:
    for bitmap in planner.bitmaps:
        if -(-size >> bitmap.granularity_bits) > 8 * MAX_BITMAP_BYTES:
            raise UnsupportedError(
                f"{planner.path}: bitmap '{bitmap.name}' cannot grow to {size} bytes: remove it first"
            )
