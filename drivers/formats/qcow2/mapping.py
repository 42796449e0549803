"""L1 and L2 tables to extents: where each guest range of one qcow2 layer lives (spec: "Cluster mapping")."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from threading import Lock

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Extent, Kind
from safeimg.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_STANDARD_RESERVED,
    MAX_HOST_OFFSET,
    OFFSET_MASK,
    ZERO,
    decode_compressed,
    decode_table,
    hexadecimal,
)
from safeimg.drivers.formats.qcow2.header import Header
from safeimg.drivers.formats.qcow2.l2 import EVERY, SUBCLUSTERS, subcluster_runs
from safeimg.drivers.storage.api import File

DEFAULT_CACHE_BYTES = 8 << 20
SLICE_WORDS = 8192  # tables are read and cached in pieces of at most 64 KiB

_DATA, _ZERO, _COMPRESSED, _UNALLOCATED = Kind.DATA, Kind.ZERO, Kind.COMPRESSED, Kind.UNALLOCATED


class Mapping:
    """The guest view through one L1 table: the active one, or an internal snapshot's.

    Tables are read when needed and kept in a cache of at most `cache_bytes`; `forget` drops it after somebody
    changed the image. Several threads may use it at once.
    """

    def __init__(self, file: File, header: Header, *, l1_table_offset: int, l1_size: int, size: int,
                 cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._file = file
        self._header = header
        self._l1_table_offset = l1_table_offset
        self._l1_size = l1_size
        self._size = size
        self._l2 = header.l2
        self._words = self._l2.entry_size // 8  # of an L2 entry
        self._slice_entries = min(SLICE_WORDS // self._words, self._l2.entries)
        self._capacity = max(4, cache_bytes // (8 * SLICE_WORDS))
        self._cache: OrderedDict[tuple[int, int], array[int] | None] = OrderedDict()
        self._lock = Lock()
        # With an external data file, a host offset of 0 means something where this flag is set.
        self._placed = COPIED if header.has_data_file else 0
        self._end = 0  # the file's end, rounded up to a cluster, when last looked at

    @property
    def size(self) -> int:
        return self._size

    def forget(self) -> None:
        """Drops what is cached: the tables on disk have changed."""
        with self._lock:
            self._cache.clear()
        self._end = 0

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """See `formats.api.Image.extents`. Compressed extents may begin or end inside their cluster, where
        the range or the virtual disk does."""
        end = min(start + length, self._size)
        if start < 0 or start >= end:
            return
        last: Extent | None = None
        for batch in self._batches(start, end):
            if last is not None:
                joined = _joined(last, batch[0])
                if joined is None:
                    yield last
                else:
                    batch[0] = joined
            last = batch.pop()
            yield from batch
        if last is not None:
            yield last

    def _batches(self, start: int, end: int) -> Iterator[list[Extent]]:
        """Extents of one table slice, or of what no table maps, at a time; none of the lists is empty."""
        coverage = self._header.l2_coverage
        position = start
        while position < end:
            index = position // coverage
            if index >= self._l1_size:  # a snapshot's table may be too small for the present virtual disk
                yield [Extent(position, end - position, _UNALLOCATED)]
                return
            page_start = index - index % SLICE_WORDS
            page_entries = min(SLICE_WORDS, self._l1_size - page_start)
            page_end = (page_start + page_entries) * coverage
            page = self._load(self._l1_table_offset + 8 * page_start, page_entries, "L1")
            if page is None:
                stop = min(end, page_end)
                yield [Extent(position, stop - position, _UNALLOCATED)]
                position = stop
                continue
            while position < end and position < page_end:
                index = position // coverage
                entry = page[index - page_start]
                stop = min(end, (index + 1) * coverage)
                if entry & L1_RESERVED:
                    raise self._reserved("L1 entry", entry, index)
                if entry & OFFSET_MASK:
                    yield from self._l2_batches(entry & OFFSET_MASK, index, position, stop)
                else:
                    yield [Extent(position, stop - position, _UNALLOCATED)]
                position = stop

    def _l2_batches(self, l2_offset: int, index: int, position: int, stop: int) -> Iterator[list[Extent]]:
        """The part of L2 table number `index` that maps [position, stop)."""
        if l2_offset % self._header.cluster_size:
            where = f"(L1 index: {hexadecimal(index)})"
            raise self._error(f"Image is corrupt: L2 table offset {l2_offset:#x} unaligned {where}")
        bits, words = self._header.cluster_bits, self._words
        extents_of = self._subcluster_extents if self._l2.extended else self._slice_extents
        table_start = index * self._header.l2_coverage
        entries = self._slice_entries
        while position < stop:
            l2_index = (position - table_start) >> bits
            slice_index = l2_index - l2_index % entries
            slice_stop = min(stop, table_start + ((slice_index + entries) << bits))
            table = self._load(l2_offset + 8 * words * slice_index, words * entries, "L2")
            if table is None:
                yield [Extent(position, slice_stop - position, _UNALLOCATED)]
            else:
                base = table_start + (slice_index << bits)
                yield extents_of(table, base, position, slice_stop, l2_offset, slice_index)
            position = slice_stop

    def _slice_extents(self, table: array[int], base: int, position: int, stop: int, l2_offset: int,
                       slice_index: int) -> list[Extent]:
        """The extents of [position, stop) in `table`, whose first entry maps guest offset `base`."""
        header = self._header
        bits = header.cluster_bits
        cluster_size = 1 << bits
        shift = 70 - bits
        offset_mask = (1 << shift) - 1
        extents: list[Extent] = []
        add = extents.append
        last_kind: Kind | None = None
        continues: int | None = None  # the host offset that would continue the last extent
        i = (position - base) >> bits
        last = (stop - base + cluster_size - 1) >> bits
        while i < last:
            entry = table[i]
            if entry & COMPRESSED:
                if self._placed:
                    raise self._compressed_outside(l2_offset, slice_index + i)
                i += 1
                run_end = min(stop, base + (i << bits))
                # decode_compressed, spelt out: one of these is made for every cluster of a compressed image
                at = entry & offset_mask
                stored = ((((entry & 0x3FFF_FFFF_FFFF_FFFF) >> shift) + 1) << 9) - (at & 511)
                if at >= self._end:
                    self._check_end(at, 1, "compressed cluster", l2_offset, slice_index + i - 1)
                add(Extent(position, run_end - position, _COMPRESSED, at, stored))
                position, last_kind = run_end, None
                continue
            if entry & L2_STANDARD_RESERVED:
                raise self._reserved("L2 entry", entry, slice_index + i)
            host = entry & OFFSET_MASK
            if entry & ZERO:
                kind = _ZERO
                if header.version == 2:
                    where = _where(l2_offset, slice_index + i)
                    raise self._error(f"Image is corrupt: Zero cluster entry found in pre-v3 image {where}")
            else:
                kind = _DATA if host or entry & self._placed else _UNALLOCATED
            step = 0
            placed = host or entry & self._placed
            if placed:
                if self._placed and host != base + (i << bits):
                    raise self._misplaced(host, base + (i << bits), slice_index + i)
                if host & (cluster_size - 1):
                    where = _where(l2_offset, slice_index + i)
                    problem = f"Image is corrupt: Cluster allocation offset {host:#x} unaligned {where}"
                    raise self._error(problem)
                step = cluster_size
            first = i
            expected = entry + step
            i += 1
            while i < last and table[i] == expected:
                expected += step
                i += 1
            run_end = min(stop, base + (i << bits))
            if kind is _DATA and not self._placed and host + ((i - first) << bits) > self._end:
                self._check_end(host, (i - first) << bits, "data cluster", l2_offset, slice_index + first)
            length = run_end - position
            offset = host + position - base - (first << bits) if placed else None
            if kind is last_kind and offset == continues:
                # Only the COPIED flag differs.
                before = extents.pop()
                add(Extent(before.start, before.length + length, kind, before.offset))
            else:
                add(Extent(position, length, kind, offset))
            last_kind = kind
            continues = None if offset is None else offset + length
            position = run_end
        return extents

    def _subcluster_extents(self, table: array[int], base: int, position: int, stop: int, l2_offset: int,
                            slice_index: int) -> list[Extent]:
        """Like `_slice_extents`, for a table of extended entries."""
        bits = self._header.cluster_bits
        cluster_size, unit = 1 << bits, self._l2.subcluster_size
        alike = (EVERY, EVERY << SUBCLUSTERS, 0)  # clusters whose subclusters are all the same: most of them
        extents: list[Extent] = []
        i = (position - base) >> bits
        last = (stop - base + cluster_size - 1) >> bits
        while i < last:
            entry, bitmap = table[2 * i], table[2 * i + 1]
            start = base + (i << bits)
            if entry & COMPRESSED:
                if self._placed:
                    raise self._compressed_outside(l2_offset, slice_index + i)
                offset, stored = decode_compressed(entry, bits)
                if offset >= self._end:
                    self._check_end(offset, 1, "compressed cluster", l2_offset, slice_index + i)
                i += 1
                run_end = min(stop, start + cluster_size)
                extents.append(Extent(position, run_end - position, _COMPRESSED, offset, stored))
                position = run_end
                continue
            host = self._subclustered(entry, bitmap, l2_offset, slice_index + i)
            placed = host or entry & self._placed
            if self._placed and placed and host != start:
                raise self._misplaced(host, start, slice_index + i)
            first = i
            i += 1
            if bitmap in alike:
                step = cluster_size if placed else 0
                expected = entry + step
                while i < last and table[2 * i] == expected and table[2 * i + 1] == bitmap:
                    expected += step
                    i += 1
            allocated, zeroes = bitmap & EVERY, bitmap >> SUBCLUSTERS
            if allocated and not self._placed and host + ((i - first) << bits) > self._end:
                self._check_end(host, (i - first) << bits, "data cluster", l2_offset, slice_index + first)
            for sub, count, is_data, is_zero in subcluster_runs(allocated, zeroes, SUBCLUSTERS):
                run_start = max(position, start + sub * unit)
                run_end = min(stop, base + (i << bits), start + (sub + count) * unit if i == first + 1 else stop)
                if run_start >= run_end:
                    continue
                kind = _DATA if is_data else _ZERO if is_zero else _UNALLOCATED
                piece = Extent(run_start, run_end - run_start, kind, host + run_start - start if placed else None)
                joined = _joined(extents[-1], piece) if extents else None
                if joined is None:
                    extents.append(piece)
                else:
                    extents[-1] = joined
            position = min(stop, base + (i << bits))
        return extents

    def _subclustered(self, entry: int, bitmap: int, l2_offset: int, l2_index: int) -> int:
        """The place of a standard cluster with an extended entry (0: none), which is checked."""
        host = entry & OFFSET_MASK
        if not self._l2.is_sound(entry | bitmap << 64):
            where = _where(l2_offset, l2_index)
            raise self._error(f"Image is corrupt: Invalid cluster entry found  {where}")
        if host & (self._header.cluster_size - 1):
            where = _where(l2_offset, l2_index)
            raise self._error(f"Image is corrupt: Cluster allocation offset {host:#x} unaligned {where}")
        if entry & L2_STANDARD_RESERVED:
            raise self._reserved("L2 entry", entry, l2_index)
        return host

    def _compressed_outside(self, l2_offset: int, l2_index: int) -> FormatError:
        where = _where(l2_offset, l2_index)
        return self._error(
            f"Image is corrupt: Compressed cluster entry found in image with external data file {where}"
        )

    def _misplaced(self, host: int, guest: int, l2_index: int) -> FormatError:
        return self._error(
            f"Image is corrupt: External data file host cluster offset {host:#x} does not match guest cluster "
            f"offset: {guest:#x}, L2 index: {hexadecimal(l2_index)})"
        )

    def _check_end(self, offset: int, length: int, what: str, l2_offset: int, l2_index: int) -> None:
        """Raises `FormatError` if the range's last cluster does not begin inside the file as it is now."""
        cluster_size = self._header.cluster_size
        self._end = -(-self._file.length() // cluster_size) * cluster_size
        if offset + length > min(self._end, MAX_HOST_OFFSET):
            where = _where(l2_offset, l2_index)
            raise self._error(f"{what} at {offset:#x} lies past the end of the file {where}")

    def _load(self, offset: int, entries: int, name: str) -> array[int] | None:
        """A slice of a table; None if all its entries are zero. `FormatError` if it is not in the file."""
        # With their length: a damaged image may use the same bytes as an L1 and as an L2 table.
        key = (offset, entries)
        with self._lock:
            cache = self._cache
            if key in cache:
                cache.move_to_end(key)
                return cache[key]
        length = 8 * entries
        data = self._file.pread(offset, length)
        if len(data) < length:
            raise FormatError(self._file.path, f"{name} table lies past the end of the file", offset=offset)
        table = decode_table(data) if data.strip(b"\0") else None
        with self._lock:
            cache[key] = table
            while len(cache) > self._capacity:
                cache.popitem(last=False)
        return table

    def _reserved(self, what: str, entry: int, index: int) -> FormatError:
        return self._error(f"{what} {entry:#018x} has reserved bits set (index {index:#x})")

    def _error(self, problem: str) -> FormatError:
        return FormatError(self._file.path, problem)


def _where(l2_offset: int, l2_index: int) -> str:
    return f"(L2 offset: {l2_offset:#x}, L2 index: {hexadecimal(l2_index)})"


def _joined(first: Extent, second: Extent) -> Extent | None:
    """Both as one if the second continues the first."""
    kind = first.kind
    if kind is not second.kind or kind is _COMPRESSED:
        return None
    if first.offset is None or second.offset is None:
        if first.offset is not second.offset:
            return None
    elif first.offset + first.length != second.offset:
        return None
    return Extent(first.start, first.length + second.length, kind, first.offset)
