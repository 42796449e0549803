"""An open VDI image: where the block map says that guest data lies."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Extent, Kind
from safeimg.drivers.formats.plain import PlainImage
from safeimg.drivers.formats.vdi.header import BLOCK, DISCARDED, ENTRY, SECTOR, STATIC, Header, parse_header
from safeimg.drivers.storage.api import File

_AT_ONCE = 16384  # entries of the map that are read at a time


class VdiImage(PlainImage):
    """Implements `formats.api.Image`. Keeps nothing of the map: it is read anew each time."""

    format = "vdi"

    def __init__(self, file: File, header: Header) -> None:
        super().__init__(file)
        self._header = header

    @property
    def header(self) -> Header:
        """As it was when the image was opened."""
        return self._header

    @property
    def size(self) -> int:
        return self._header.size

    @property
    def cluster_size(self) -> int:
        return BLOCK

    @property
    def data_may_be_holes(self) -> bool:
        return self._header.image_type == STATIC

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """See `formats.api.Image`. An entry may lead past the end of the file, as in QEMU: zeroes are read there."""
        end = min(start + length, self.size)
        if start >= end:
            return
        held: Extent | None = None
        for first, count, entry in self._runs(start // BLOCK, -(-end // BLOCK)):
            low, high = max(start, first * BLOCK), min(end, (first + count) * BLOCK)
            kind, offset = Kind.ZERO, None
            if entry < DISCARDED:
                kind, offset = Kind.DATA, self._header.data_offset + entry * BLOCK + low - first * BLOCK
            if held is not None and held.kind is kind and (offset is None or offset == _end(held)):
                held = held._replace(length=held.length + high - low)
                continue
            if held is not None:
                yield held
            held = Extent(low, high - low, kind, offset)
        if held is not None:
            yield held

    def _runs(self, first: int, end: int) -> Iterator[tuple[int, int, int]]:
        for at, entries in read_map(self._file, self._header, first, end):
            for index, count, entry in runs(entries):
                yield at + index, count, entry


def open_image(file: File, *, write: bool = False, repair: bool = False) -> VdiImage:
    """Parses the header; `repair` opens an unfinished image too. `FormatError`, `UnsupportedError`.

    With `write`, also if header, map and data overlap, or the map is not in the file."""
    header = parse_header(file, unfinished=repair)
    if write:
        if header.map_offset < SECTOR or header.data_offset < header.map_end:
            raise FormatError(file.path, "header, block map and data of the image overlap")
        if header.map_end > file.length():
            raise FormatError(file.path, "the block map ends behind the file", offset=header.map_offset)
    return VdiImage(file, header)


def read_map(file: File, header: Header, first: int, end: int) -> Iterator[tuple[int, array[int]]]:
    """The map's entries from block `first` up to `end`, in pieces: number of the first one, and entries.

    Raises `FormatError` where the file ends before."""
    for at in range(first, end, _AT_ONCE):
        count = min(_AT_ONCE, end - at)
        offset = header.map_offset + ENTRY * at
        data = file.pread(offset, ENTRY * count)
        if len(data) < ENTRY * count:
            raise FormatError(file.path, "the block map ends behind the file", offset=offset + len(data))
        yield at, decode(data)


def decode(data: bytes) -> array[int]:
    """Entries in the host's byte order."""
    entries = array("I", data)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def encode(entries: array[int]) -> bytes:
    if sys.byteorder == "big":
        entries = entries[:]
        entries.byteswap()
    return entries.tobytes()


def runs(entries: array[int]) -> Iterator[tuple[int, int, int]]:
    """Entries that lead to consecutive blocks, or to none: index and number of them, and the first one."""
    at, end = 0, len(entries)
    while at < end:
        entry, stop = entries[at], at + 1
        if entry >= DISCARDED:
            while stop < end and entries[stop] >= DISCARDED:
                stop += 1
        else:
            while stop < end and entries[stop] - entry == stop - at and entries[stop] < DISCARDED:
                stop += 1
        yield at, stop - at, entry
        at = stop


def _end(extent: Extent) -> int | None:
    return None if extent.offset is None else extent.offset + extent.length
