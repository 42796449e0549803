"""Growing and shrinking the virtual disk (DESIGN, hazards 12 and 16).

Growing has three parts, each step a valid image: an L1 table that is large enough (`prepare_resize`), zeroes over what
would be exposed (the caller, with `exposed` and `zero`), the size (`resize`). Tables of persistent bitmaps
have to fit the size exactly or QEMU does not open the image, so size and bitmap directory change together, in
one sector. Where QEMU put the bitmaps extension further behind, it is moved to the front of the extensions
first. Shrinking changes the size first, and then unmaps what lies behind it (`shrink`, `forget`). """

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from safeimg.drivers.errors import UnsupportedError, UsageError
from safeimg.drivers.formats.api import Changes
from safeimg.drivers.formats.metadata import Phase
from safeimg.drivers.formats.qcow2.bitmaps import MAX_TABLE_ENTRIES, Bitmap, table_entries
from safeimg.drivers.formats.qcow2.entries import COMPRESSED, OFFSET_MASK, SECTOR
from safeimg.drivers.formats.qcow2.header import (
    EXT_BITMAPS,
    EXT_FEATURE_NAMES,
    MAX_L1_BYTES,
    Extension,
    parse_header_cluster,
    serialise_extension,
)
from safeimg.drivers.formats.qcow2.l2 import subcluster_runs

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner

MAX_BITMAP_BYTES = 512 << 20  # QEMU's limit
_TABLE = struct.Struct(">QI")  # how a bitmap directory entry begins: offset and entries of its table
_DIRECTORY_FIELD = 8 + 16  # bitmap_directory_offset, from the start of the bitmaps extension


def prepare_resize(planner: Qcow2Planner, size: int) -> Sequence[Changes]:
    """An L1 table that is large enough for `size` bytes, which may be planned for from now on. Each of the
    changes is a step of its own; the virtual disk stays as it is."""
    planner.ready()
    header = planner.header
    if size % 512:
        raise UsageError("The new size must be a multiple of 512")
    if header.version == 2 and header.nb_snapshots:
        raise UnsupportedError("Can't resize a v2 image which has snapshots")
    if size < planner.size:
        raise ValueError(f"{planner.path}: {size} bytes are less than {planner.size}")
    changes: list[Changes] = []
    entries = -(-size // header.l2_coverage)
    if 8 * entries > MAX_L1_BYTES:
        raise UnsupportedError(f"{planner.path}: {size} bytes need an L1 table larger than 32 MiB")
    bitmaps = _resized(planner, size)
    for bitmap in bitmaps:
        _check_limits(planner, bitmap, size)
    if bitmaps:
        _front_sector(planner)
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
    bitmaps = _resized(planner, size)
    changes: list[Changes] = []
    if bitmaps:
        changes += _reserve_run(planner, _bitmap_clusters(planner, bitmaps, size))
        moved = _front_sector(planner)
        if moved is not None:
            front, behind = moved[:SECTOR], moved[SECTOR:]
            planner.view.write(0, front, Phase.LINK)
            changes.append(planner.take())
            # Only names of features are cut in half until this is written, too.
            planner.view.write(SECTOR, behind, Phase.LINK)
        offset = _resize_bitmaps(planner, bitmaps, size)
        planner.switch((_extensions(planner)[EXT_BITMAPS] + _DIRECTORY_FIELD, offset), size=size)
    else:
        planner.switch(size=size)
    planner.current_size = size
    changes.append(planner.take())
    return changes


def shrink(planner: Qcow2Planner, size: int) -> Sequence[Changes]:
    """The virtual size becomes smaller by the last of the changes, each a step of its own. What lay behind is still
    mapped: see `forget`."""
    planner.ready()
    if size % 512:
        raise UsageError("The new size must be a multiple of 512")
    if planner.header.version == 2 and planner.header.nb_snapshots:
        raise UnsupportedError("Can't resize a v2 image which has snapshots")
    if _resized(planner, size):
        _front_sector(planner)
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


# Bitmaps


def _entries(planner: Qcow2Planner, bitmap: Bitmap, size: int) -> int:
    return table_entries(size, bitmap.granularity_bits, planner.header.cluster_bits)


def _resized(planner: Qcow2Planner, size: int) -> list[Bitmap]:
    """Consistent bitmaps whose tables do not fit `size`."""
    return [
        bitmap for bitmap in planner.bitmaps
        if not bitmap.in_use and bitmap.bitmap_table_size != _entries(planner, bitmap, size)
    ]


def _check_limits(planner: Qcow2Planner, bitmap: Bitmap, size: int) -> None:
    too_large = -(-size >> bitmap.granularity_bits) > 8 * MAX_BITMAP_BYTES
    if too_large or _entries(planner, bitmap, size) > MAX_TABLE_ENTRIES:
        raise UnsupportedError(
            f"{planner.path}: bitmap '{bitmap.name}' cannot grow to {size} bytes: remove it first"
        )


def _table_clusters(planner: Qcow2Planner, bitmap: Bitmap, size: int) -> int:
    return -(-8 * _entries(planner, bitmap, size) // planner.cluster_size)


def _directory(planner: Qcow2Planner) -> bytes:
    extension = planner.header.bitmaps
    length = 0 if extension is None else extension.bitmap_directory_size
    return planner.view.read(planner.bitmap_directory_offset, length)


def _bitmap_clusters(planner: Qcow2Planner, bitmaps: Sequence[Bitmap], size: int) -> int:
    """Clusters for the new directory and tables."""
    directory = -(-len(_directory(planner)) // planner.cluster_size)
    return directory + sum(_table_clusters(planner, bitmap, size) for bitmap in bitmaps)


def _resize_bitmaps(planner: Qcow2Planner, bitmaps: Sequence[Bitmap], size: int) -> int:
    """New tables, and a new directory for them: its offset. New bits are clear, as QEMU's resize has them."""
    bits, cluster_size = planner.header.cluster_bits, planner.cluster_size
    old_offset = planner.bitmap_directory_offset
    directory = bytearray(_directory(planner))
    directory_clusters = -(-len(directory) // cluster_size)
    first = planner.allocator.allocate_run(_bitmap_clusters(planner, bitmaps, size))
    offset, position = first << bits, first + directory_clusters
    known = {bitmap.offset: bitmap for bitmap in planner.bitmaps}
    for bitmap in bitmaps:
        count, length = _entries(planner, bitmap, size), _table_clusters(planner, bitmap, size)
        content = planner.view.read(bitmap.bitmap_table_offset, 8 * bitmap.bitmap_table_size)
        for (entry,) in struct.iter_unpack(">Q", content[8 * count:]):
            planner.unlink_clusters((entry & OFFSET_MASK) >> bits, 1 if entry & OFFSET_MASK else 0)
        content = content[:8 * count]
        planner.view.fresh(position << bits, content.ljust(length << bits, b"\0"))
        _TABLE.pack_into(directory, bitmap.offset - old_offset, position << bits, count)
        old_clusters = -(-8 * bitmap.bitmap_table_size // cluster_size)
        planner.unlink_clusters(bitmap.bitmap_table_offset >> bits, old_clusters)
        known[bitmap.offset] = replace(bitmap, bitmap_table_offset=position << bits, bitmap_table_size=count)
        position += length
    planner.view.fresh(offset, bytes(directory).ljust(directory_clusters << bits, b"\0"))
    planner.unlink_clusters(old_offset >> bits, directory_clusters)
    planner.bitmap_directory_offset = offset
    planner.bitmaps = tuple(
        replace(bitmap, offset=bitmap.offset - old_offset + offset) for bitmap in known.values()
    )
    return offset


def _extensions(planner: Qcow2Planner, extensions: Sequence[Extension] | None = None) -> dict[int, int]:
    """Where each header extension starts, in the file; of several of a type the last, which is the valid
    one."""
    if extensions is None:
        extensions = _header_extensions(planner)
    offsets: dict[int, int] = {}
    at = planner.header.header_length
    for extension in extensions:
        offsets[extension.type] = at
        at += len(serialise_extension(extension))
    return offsets


def _header_extensions(planner: Qcow2Planner) -> tuple[Extension, ...]:
    return parse_header_cluster(planner.view.read(0, planner.cluster_size), planner.path).extensions


def _front_sector(planner: Qcow2Planner) -> bytes | None:
    """The header up to the end of its extensions with the bitmaps extension moved to the front of them, where
    its directory offset lies in the first sector; None if it does already.

    Written sector by sector this is safe if only the feature name table leaves the first sector: for a while
    its last names may be wrong. `UnsupportedError` otherwise. """
    extensions = _header_extensions(planner)
    if _extensions(planner, extensions)[EXT_BITMAPS] + _DIRECTORY_FIELD + 8 <= SECTOR:
        return None
    position = max(index for index, extension in enumerate(extensions) if extension.type == EXT_BITMAPS)
    moved = (extensions[position], *extensions[:position])
    at = planner.header.header_length
    for extension in moved:
        length = len(serialise_extension(extension))
        if at + (8 if extension.type == EXT_FEATURE_NAMES else length) > SECTOR:
            raise UnsupportedError(
                f"{planner.path}: no room for the bitmaps extension in the header's first sector: remove the "
                "bitmaps before the image grows"
            )
        at += length
    head = planner.view.read(0, planner.header.header_length)
    return head + b"".join(map(serialise_extension, moved))
