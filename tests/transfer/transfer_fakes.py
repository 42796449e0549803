"""Images and files that live in memory, for tests of what moves guest data between them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from safeimg.drivers.formats.api import Cipher, Extent, Kind
from safeimg.drivers.storage.api import Buffer


class MemoryFile:
    """The part of `storage.api.File` that data goes through. Not for what a disk does: see
    `storage.simulated`."""

    def __init__(self, content: bytes = b"", path: str = "memory") -> None:
        self.path = path
        self.writable = True
        self.alignment = 1
        self.content = bytearray(content)
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def length(self) -> int:
        return len(self.content)

    def pread(self, offset: int, length: int) -> bytes:
        with self._lock:
            self.reads.append((offset, length))
            return bytes(self.content[offset : offset + length])

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        found = self.pread(offset, len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def pwrite(self, offset: int, data: Buffer) -> None:
        with self._lock:
            self.writes.append((offset, len(data)))
            if len(self.content) < offset + len(data):
                self.content.extend(bytes(offset + len(data) - len(self.content)))
            self.content[offset : offset + len(data)] = data

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.pwrite(offset, bytes(length))

    def start_writeback(self, offset: int, length: int) -> None:
        pass


@dataclass
class Layer:
    """An image made of runs: (length, kind, fill byte). Data lies in `file` in order of appearance.

    A run of COMPRESSED must be one cluster (or the clipped last one); its stored form is the fill byte,
    once."""

    runs: Sequence[tuple[int, Kind, int]]
    cluster_size: int = 16
    file: MemoryFile = field(default_factory=MemoryFile)
    format: str = "fake"
    cipher: Cipher | None = None
    backing_file: str | None = None
    backing_format: str | None = None
    inflated: int = 0

    @property
    def data(self) -> MemoryFile:
        return self.file

    def __post_init__(self) -> None:
        self.size = sum(length for length, _, _ in self.runs)
        self._extents: list[Extent] = []
        at = 0
        for length, kind, fill in self.runs:
            offset: int | None = len(self.file.content)
            if kind is Kind.DATA:
                self.file.content.extend(bytes([fill]) * length)
            elif kind is Kind.COMPRESSED:
                self.file.content.append(fill)
            else:
                offset = None
            self._extents.append(Extent(at, length, kind, offset, int(kind is Kind.COMPRESSED)))
            at += length

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        end = min(start + length, self.size)
        for extent in self._extents:
            low, high = max(extent.start, start), min(extent.start + extent.length, end)
            if low < high:
                offset = extent.offset
                if offset is not None and extent.kind is Kind.DATA:
                    offset += low - extent.start
                yield extent._replace(start=low, length=high - low, offset=offset)

    def decompress(self, extent: Extent, stored: Buffer) -> bytes:
        self.inflated += 1
        return bytes(stored[:1]) * extent.length

    def close(self) -> None:
        pass

    def content(self, below: bytes) -> bytes:
        """The guest content by the book, given that of the layers below (as long as it is)."""
        out = bytearray()
        for length, kind, fill in self.runs:
            if kind in (Kind.DATA, Kind.COMPRESSED):
                out += bytes([fill]) * length
            elif kind is Kind.ZERO:
                out += bytes(length)
            else:
                seen = below[len(out) : len(out) + length]
                out += seen + bytes(length - len(seen))
        return bytes(out)
