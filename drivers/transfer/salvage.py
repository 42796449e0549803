"""convert --salvage: what cannot be read is zero, sector by sector, and a warning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from safeimg.drivers.errors import FormatError, StorageError
from safeimg.drivers.formats.api import Extent, Kind
from safeimg.drivers.transfer.view import SECTOR, LayerExtent, Source
from safeimg.drivers.transfer.zero import fill_zero

WINDOW = 16 << 20  # guest bytes whose map is looked up at once

Warn = Callable[[str], None]


class Salvaged:
    """Implements `view.Source`: another source that never fails. `warn` gets QEMU's words.

    Where the map cannot be read, each sector is an extent of its own without a place."""

    def __init__(self, source: Source, warn: Warn) -> None:
        self._source = source
        self._warn = warn

    @property
    def size(self) -> int:
        return self._source.size

    def survey(self) -> None:
        """Warns of all that the map does not tell. QEMU does, before it copies anything."""
        for _, extent in self.extents(0, self.size):
            if _is_lost(extent):
                self._warn_of_map(extent.start)

    def extents(self, start: int, length: int) -> Iterator[LayerExtent]:
        end = min(start + length, self.size)
        for at in range(start, end, WINDOW):
            yield from self._within(at, min(at + WINDOW, end))

    def _within(self, start: int, end: int) -> Iterator[LayerExtent]:
        """Halves what fails, until it is a sector."""
        try:
            found = list(self._source.extents(start, end - start))
        except (StorageError, FormatError):
            middle = start + (end - start) // 2 // SECTOR * SECTOR
            if middle > start:
                yield from self._within(start, middle)
                yield from self._within(middle, end)
            else:
                yield LayerExtent(0, Extent(start, min(SECTOR, end - start), Kind.DATA))
                if start + SECTOR < end:
                    yield from self._within(start + SECTOR, end)
            return
        yield from found

    def read_pieces(self, pieces: Iterable[LayerExtent], start: int, buffer: memoryview) -> None:
        end = start + len(buffer)
        for piece in pieces:
            low, high = max(piece.extent.start, start), min(piece.extent.start + piece.extent.length, end)
            if low >= high:
                continue
            part = buffer[low - start : high - start]
            if _is_lost(piece.extent):
                self._warn_of_map(low)
                self._zero(low, part, "Input/output error")
                continue
            try:
                self._source.read_pieces([piece], low, part)
            except (StorageError, FormatError):
                for at in range(low, high, SECTOR):
                    self._read_sector(piece, at, part[at - low : at - low + SECTOR])

    def read_into(self, start: int, buffer: memoryview) -> None:
        inside = max(0, min(len(buffer), self.size - start))
        self.read_pieces(self.extents(start, inside), start, buffer[:inside])
        fill_zero(buffer[inside:])

    def _read_sector(self, piece: LayerExtent, at: int, part: memoryview) -> None:
        try:
            self._source.read_pieces([piece], at, part)
        except StorageError as error:
            self._zero(at, part, error.strerror)
        except FormatError:
            self._zero(at, part, "Input/output error")

    def _zero(self, at: int, part: memoryview, reason: str) -> None:
        fill_zero(part)
        self._warn(f"error while reading offset {at}: {reason}")

    def _warn_of_map(self, at: int) -> None:
        self._warn(f"error while reading block status at offset {at}: Input/output error")


def _is_lost(extent: Extent) -> bool:
    return extent.kind is Kind.DATA and extent.offset is None
