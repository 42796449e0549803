"""A part of a file, as a file of its own to read: an image inside a tar archive, say."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from safeimg.drivers.errors import StorageError
from safeimg.drivers.storage.api import File, FileStat, Span
from safeimg.drivers.storage.virtual import VirtualFile


class Window(VirtualFile):
    """Implements `api.File`. Without a size it reaches to the end of the file."""

    def __init__(self, file: File, offset: int, size: int | None) -> None:
        super().__init__(file.path)
        self._file = file
        self._offset = offset
        self._size = size

    @property
    def alignment(self) -> int:
        return self._file.alignment

    def length(self) -> int:
        return max(self._file.length() - self._offset, 0) if self._size is None else self._size

    def _inside(self, offset: int, length: int) -> int:
        """How much of a range lies inside."""
        if offset < 0:
            raise StorageError(self.path, "read", OSError(errno.EINVAL, "Invalid argument"))
        return length if self._size is None else max(min(length, self._size - offset), 0)

    def pread(self, offset: int, length: int) -> bytes:
        inside = self._inside(offset, length)
        return self._file.pread(self._offset + offset, inside) if inside else b""

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        inside = self._inside(offset, len(buffer))
        return self._file.pread_into(self._offset + offset, buffer[:inside]) if inside else 0

    def spans(self, offset: int, length: int) -> Iterator[Span]:
        for span in self._file.spans(self._offset + offset, self._inside(offset, length)):
            yield span._replace(start=span.start - self._offset)

    def sync(self) -> None:
        self._file.sync()

    def sync_all(self) -> None:
        self._file.sync_all()

    def stat(self) -> FileStat:
        """Of the whole file: what identifies it."""
        return self._file.stat()

    def get_attribute(self, name: str) -> bytes | None:
        return self._file.get_attribute(name)

    def set_attribute(self, name: str, value: bytes) -> bool:
        return self._file.set_attribute(name, value)

    def remove_attribute(self, name: str) -> None:
        self._file.remove_attribute(name)

    def close(self) -> None:
        self._file.close()
