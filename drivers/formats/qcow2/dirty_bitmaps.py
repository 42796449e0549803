"""Marking guest ranges dirty in persistent bitmaps (spec: docs/interop/qcow2, "Bitmaps").

Incremental backups rely on an enabled bitmap covering every write: its bits are set, durably, before the data
changes. Only consistent bitmaps are touched: those whose extension has its autoclear bit set (otherwise the
planner knows of none) and that are not flagged "in use". """

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.metadata import Phase
from safeimg.drivers.formats.qcow2.bitmaps import TABLE_ALL_ONES, TABLE_OFFSET_MASK, TABLE_RESERVED, Bitmap

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner


def read_table(planner: Qcow2Planner, bitmap: Bitmap) -> Iterator[int]:
    """The entries of a bitmap's table. `FormatError` for those that the specification does not allow."""
    for first in range(0, bitmap.bitmap_table_size, 4096):
        count = min(4096, bitmap.bitmap_table_size - first)
        at = bitmap.bitmap_table_offset + 8 * first
        for entry in struct.unpack(f">{count}Q", planner.view.read(at, 8 * count)):
            _check_entry(planner, at, entry)
            yield entry


def mark(planner: Qcow2Planner, ranges: Sequence[tuple[int, int]]) -> None:
    """Plans setting the bits of guest ranges (start, length) in every enabled bitmap."""
    for bitmap in _enabled(planner):
        for index, first, last in _pieces(planner, bitmap, ranges):
            _set_bits(planner, bitmap, index, first, last)


def clusters_needed(planner: Qcow2Planner, ranges: Sequence[tuple[int, int]]) -> int:
    """Bitmap clusters that `mark` allocates (an upper bound)."""
    touched = {
        (bitmap.offset, index)
        for bitmap in _enabled(planner)
        for index, _first, _last in _pieces(planner, bitmap, ranges)
    }
    return len(touched)


def _enabled(planner: Qcow2Planner) -> Iterator[Bitmap]:
    return (bitmap for bitmap in planner.bitmaps if bitmap.enabled and not bitmap.in_use)


def _pieces(planner: Qcow2Planner, bitmap: Bitmap,
            ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """The ranges' bits by table entry: (index, first bit, last bit), bits counted within the entry's
    cluster."""
    per_cluster = planner.cluster_size * 8
    for start, length in ranges:
        if not length:
            continue
        bit = start >> bitmap.granularity_bits
        end = (start + length - 1) >> bitmap.granularity_bits
        while bit <= end:
            index = bit // per_cluster
            if index >= bitmap.bitmap_table_size:
                raise FormatError(
                    planner.path,
                    f"the table of bitmap '{bitmap.name}' does not reach guest offset {start:#x}",
                    offset=bitmap.bitmap_table_offset,
                )
            last = min(end, (index + 1) * per_cluster - 1)
            yield index, bit % per_cluster, last % per_cluster
            bit = last + 1


def _set_bits(planner: Qcow2Planner, bitmap: Bitmap, index: int, first: int, last: int) -> None:
    view, at = planner.view, bitmap.bitmap_table_offset + 8 * index
    entry = int.from_bytes(view.read(at, 8), "big")
    _check_entry(planner, at, entry)
    if entry == TABLE_ALL_ONES:
        return
    cluster = entry & TABLE_OFFSET_MASK
    if not cluster:
        cluster = planner.allocator.allocate(1)[0] << planner.header.cluster_bits
        view.fresh(cluster, bytes(planner.cluster_size))
        view.write(at, cluster.to_bytes(8, "big"), Phase.LINK)
    elif planner.refcounts.get(cluster >> planner.header.cluster_bits) != 1:
        raise FormatError(
            planner.path, "bitmap data whose refcount is not 1: run 'qemu-img check -r all'", offset=cluster
        )
    start, end = first // 8, last // 8 + 1
    bits = bytearray(view.read(cluster + start, end - start))
    head, tail = 0xFF << first % 8 & 0xFF, 0xFF >> 7 - last % 8
    if len(bits) == 1:
        bits[0] |= head & tail
    else:
        bits[0] |= head
        bits[1:-1] = b"\xff" * (len(bits) - 2)
        bits[-1] |= tail
    view.write(cluster + start, bytes(bits), Phase.LINK)


def _check_entry(planner: Qcow2Planner, at: int, entry: int) -> None:
    offset = entry & TABLE_OFFSET_MASK
    if entry & TABLE_RESERVED or offset % planner.cluster_size or (offset and entry & TABLE_ALL_ONES):
        raise FormatError(planner.path, f"bitmap table entry {entry:#x} is invalid", offset=at)
