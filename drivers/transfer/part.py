"""A part of a source, as `dd` copies it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from safeimg.drivers.errors import StorageError
from safeimg.drivers.formats.api import Extent, Kind
from safeimg.drivers.transfer.view import SECTOR, LayerExtent, Source
from safeimg.drivers.transfer.zero import fill_zero


class PartialView:
    """`length` bytes of `source` from `offset` on, as a disk of whole sectors: what its last one lacks is zero.

    Implements `view.Source`. The part must lie inside the source."""

    def __init__(self, source: Source, offset: int, length: int) -> None:
        self._source = source
        self._offset = offset
        self._length = length
        self._size = -(-length // SECTOR) * SECTOR

    @property
    def size(self) -> int:
        return self._size

    def extents(self, start: int, length: int) -> Iterator[LayerExtent]:
        end = min(start + length, self._size)
        inside = min(end, self._length)
        if start < inside:
            for layer, extent in self._source.extents(self._offset + start, inside - start):
                yield LayerExtent(layer, extent._replace(start=extent.start - self._offset))
        if max(start, inside) < end:
            yield LayerExtent(0, Extent(max(start, inside), end - max(start, inside), Kind.ZERO))

    def read_pieces(self, pieces: Iterable[LayerExtent], start: int, buffer: memoryview) -> None:
        inside = max(0, min(len(buffer), self._length - start))
        own = [
            LayerExtent(layer, extent._replace(start=extent.start + self._offset))
            for layer, extent in pieces
            if extent.start < self._length
        ]
        if inside:
            try:
                self._source.read_pieces(own, self._offset + start, buffer[:inside])
            except StorageError as error:
                error.shift(-self._offset)
                raise
        fill_zero(buffer[inside:])

    def read_into(self, start: int, buffer: memoryview) -> None:
        inside = max(0, min(len(buffer), self._length - start))
        if inside:
            self._source.read_into(self._offset + start, buffer[:inside])
        fill_zero(buffer[inside:])
