"""null-co and null-aio: a disk without content, to measure with or to have zeroes from."""

from __future__ import annotations

from collections.abc import Iterator

from safeimg.drivers.storage.api import Buffer, FileStat, Span
from safeimg.drivers.storage.virtual import VirtualFile

DEFAULT_SIZE = 1 << 30


class NullFile(VirtualFile):
    """Implements `api.File`: zeroes, which are known to be that if it `reads_zeroes`; what is written is lost."""

    def __init__(self, path: str, size: int, *, reads_zeroes: bool, write: bool) -> None:
        super().__init__(path)
        self._size = size
        self._reads_zeroes = reads_zeroes
        self._writable = write

    @property
    def writable(self) -> bool:
        return self._writable

    def length(self) -> int:
        return self._size

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        part = self._clipped(offset, buffer)
        part[:] = bytes(len(part))
        return len(part)

    def spans(self, offset: int, length: int) -> Iterator[Span]:
        for span in super().spans(offset, length):
            yield span._replace(is_data=not self._reads_zeroes, allocated=None if self._reads_zeroes else False)

    def pwrite(self, offset: int, data: Buffer) -> None:
        if not self._writable:
            self._refuse()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.pwrite(offset, b"")

    def preallocate(self, offset: int, length: int, *, keep_size: bool) -> None:
        self.pwrite(offset, b"")

    def stat(self) -> FileStat:
        return super().stat()._replace(allocated=0)
