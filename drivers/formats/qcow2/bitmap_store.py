"""Storing persistent bitmaps: a new directory, by one switch of the header (spec: docs/interop/qcow2, "Bitmaps").

New are: the directory; the tables, those of unchanged bitmaps too, as with QEMU; and every cluster of bits that differs
from what it was. All of it goes into space that nobody references. The bitmaps
extension in the header's first sector makes it live, together with its autoclear bit and, where that changes, with
the size of the virtual disk: tables have to fit it exactly, or QEMU does not open the image.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from safeimg.drivers.formats.api import Changes
from safeimg.drivers.formats.features import BitmapState, WantedBitmap
from safeimg.drivers.formats.granularity import read_as
from safeimg.drivers.formats.qcow2.bitmaps import (
    AUTO,
    TABLE_ALL_ONES,
    TABLE_OFFSET_MASK,
    Bitmap,
    directory_entry,
    table_entries,
)
from safeimg.drivers.formats.qcow2.dirty_bitmaps import read_table
from safeimg.drivers.formats.qcow2.entries import encode_table
from safeimg.drivers.formats.qcow2.extensions import EXT_BITMAPS, BitmapsExtension
from safeimg.drivers.formats.qcow2.header import BITMAPS, Header
from safeimg.drivers.formats.qcow2.pieces import Pieces
from safeimg.drivers.formats.qcow2.rewrite import current_header, stage_header, switch_header

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner


def state_of(bitmap: Bitmap) -> BitmapState:
    return BitmapState(bitmap.name, bitmap.granularity, bitmap.enabled, bitmap.in_use)


def all_kept(bitmaps: Sequence[Bitmap]) -> list[WantedBitmap]:
    """What is wanted if all bitmaps stay as they are."""
    return [WantedBitmap(state_of(bitmap), True) for bitmap in bitmaps]


def store(
    planner: Qcow2Planner, wanted: Sequence[WantedBitmap], *, size: int | None = None
) -> Iterator[Changes]:
    """See `features.Bitmapping.store`. `size`: what the virtual disk's is to be, if it changes; new bits are clear
    then. Only merged bits are `fresh` data. Raises `UnsupportedError` if the header has no room."""
    planner.ready()
    size = planner.current_size if size is None else size
    if size == planner.current_size and list(wanted) == all_kept(planner.bitmaps):
        return
    lost = {bitmap.name: bitmap for bitmap in planner.bitmaps}  # those that nothing carries on
    pairs = [(each, lost.pop(each.state.name, None) if each.kept else None) for each in wanted]
    while planner.allocator.reserve_run(_most_clusters(planner, pairs, size)):
        yield planner.take()
    header = current_header(planner)
    yield from stage_header(planner, _with_extension(header, BitmapsExtension(1, 0, 0) if wanted else None))
    merged = Pieces()
    stored: list[Bitmap] = []
    for each, before in pairs:
        if before is not None and before.in_use:
            stored.append(before)
            continue
        table = _entries_before(planner, each, before, size)
        for index in _touched(planner, each, len(table), size):
            table[index], content = _cluster_of_bits(planner, each, table[index], index, size)
            if not each.merged and content:
                planner.view.fresh(table[index], content)
            elif content and merged.add(table[index], content):
                yield planner.take()._replace(fresh=merged.take())
        stored.append(_with_table(planner, each, before, table))
    for bitmap in lost.values():
        _unlink(planner, bitmap)
    extension = _put_directory(planner, stored)
    switch_header(planner, _with_extension(header, extension)._replace(size=size))
    planner.current_size = size
    yield planner.take()._replace(fresh=merged.take())


def _with_extension(header: Header, extension: BitmapsExtension | None) -> Header:
    """The header with the bitmaps extension in front, where it is in the first sector."""
    others = tuple(each for each in header.extensions if each.type != EXT_BITMAPS)
    if extension is None:
        return header._replace(extensions=others, autoclear_features=header.autoclear_features & ~BITMAPS)
    return header._replace(
        extensions=(extension.extension(), *others),
        autoclear_features=header.autoclear_features | BITMAPS,
    )


def _entries(planner: Qcow2Planner, wanted: WantedBitmap, size: int) -> int:
    bits = wanted.state.granularity.bit_length() - 1
    return table_entries(size, bits, planner.header.cluster_bits)


def _clusters(planner: Qcow2Planner, length: int) -> int:
    return -(-length // planner.cluster_size)


def _most_clusters(
    planner: Qcow2Planner, pairs: Sequence[tuple[WantedBitmap, Bitmap | None]], size: int
) -> int:
    """Clusters that all new structures take, in the worst case."""
    total = _clusters(planner, sum(len(directory_entry(_named(wanted))) for wanted, _ in pairs))
    for wanted, _ in pairs:
        count = _entries(planner, wanted, size)
        total += _clusters(planner, 8 * count) + (count if wanted.merged else 1)
    return total


def _named(wanted: WantedBitmap) -> Bitmap:
    state = wanted.state
    flags = AUTO if state.enabled else 0
    return Bitmap(0, 0, flags, state.granularity.bit_length() - 1, state.name, 0, 0)


def _entries_before(
    planner: Qcow2Planner, wanted: WantedBitmap, old: Bitmap | None, size: int
) -> array[int]:
    """The table that the bitmap begins with: entries that it has already, none for what is new."""
    count = _entries(planner, wanted, size)
    table = array("Q", () if old is None else islice(read_table(planner, old), count))
    return table + array("Q", bytes(8 * (count - len(table))))


def _touched(planner: Qcow2Planner, wanted: WantedBitmap, count: int, size: int) -> range:
    """The entries whose bits may become others: with a smaller disk, what the last ones have behind its end is to
    be cleared."""
    if wanted.merged:
        return range(count)
    return range(count - 1, count) if count and size < planner.current_size else range(0)


def _cluster_of_bits(
    planner: Qcow2Planner, wanted: WantedBitmap, entry: int, index: int, size: int
) -> tuple[int, bytes]:
    """The new table entry instead of `entry`, and what its cluster is to hold if that is a new one."""
    length, state = planner.cluster_size, wanted.state
    offset = entry & TABLE_OFFSET_MASK
    if offset:
        before = int.from_bytes(planner.view.read(offset, length), "little")
    else:
        before = (1 << 8 * length) - 1 if entry & TABLE_ALL_ONES else 0
    bits = before
    for source in wanted.merged:
        bits |= int.from_bytes(read_as(source, state.granularity, index * length, length), "little")
    end = -(-size // state.granularity) - 8 * length * index
    if end < 8 * length:
        bits &= (1 << end) - 1  # the specification wants the rest to be zero
    if bits == before:
        return entry, b""
    _unlink_bits(planner, entry)
    if not bits:
        return 0, b""
    return planner.allocator.allocate(1)[0] << planner.header.cluster_bits, bits.to_bytes(length, "little")


def _with_table(
    planner: Qcow2Planner, wanted: WantedBitmap, old: Bitmap | None, table: array[int]
) -> Bitmap:
    """The bitmap's entry of the new directory, with a table of its own."""
    bits = planner.header.cluster_bits
    if old is not None:
        _unlink_table(planner, old)
        for entry in islice(read_table(planner, old), len(table), None):
            _unlink_bits(planner, entry)
    length = _clusters(planner, 8 * len(table))
    offset = planner.allocator.allocate_run(length) << bits
    planner.view.fresh(offset, encode_table(table).ljust(length << bits, b"\0"))
    return _named(wanted)._replace(bitmap_table_offset=offset, bitmap_table_size=len(table))


def _put_directory(planner: Qcow2Planner, bitmaps: Sequence[Bitmap]) -> BitmapsExtension | None:
    """A new directory instead of the one there is. The file may end with it, as with QEMU."""
    header = planner.header
    if header.bitmaps is not None:
        length = _clusters(planner, header.bitmaps.bitmap_directory_size)
        planner.unlink_clusters(planner.bitmap_directory_offset >> header.cluster_bits, length)
    entries = [directory_entry(bitmap) for bitmap in bitmaps]
    directory = b"".join(entries)
    clusters = _clusters(planner, len(directory))
    offset = planner.allocator.allocate_run(clusters, whole=False) << header.cluster_bits if clusters else 0
    planner.view.fresh(offset, directory)
    placed: list[Bitmap] = []
    at = offset
    for bitmap, entry in zip(bitmaps, entries, strict=True):
        placed.append(bitmap._replace(offset=at, length=len(entry)))
        at += len(entry)
    planner.bitmaps = tuple(placed)
    planner.bitmap_directory_offset = offset
    return BitmapsExtension(len(placed), len(directory), offset) if placed else None


def _unlink(planner: Qcow2Planner, bitmap: Bitmap) -> None:
    _unlink_table(planner, bitmap)
    for entry in read_table(planner, bitmap):
        _unlink_bits(planner, entry)


def _unlink_table(planner: Qcow2Planner, bitmap: Bitmap) -> None:
    bits = planner.header.cluster_bits
    planner.unlink_clusters(bitmap.bitmap_table_offset >> bits, _clusters(planner, 8 * bitmap.bitmap_table_size))


def _unlink_bits(planner: Qcow2Planner, entry: int) -> None:
    if entry & TABLE_OFFSET_MASK:
        planner.unlink_clusters((entry & TABLE_OFFSET_MASK) >> planner.header.cluster_bits, 1)
