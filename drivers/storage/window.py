"""A part of a file, as a file of its own to read: an image inside a tar archive, say."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from safeimg.drivers.errors import StorageError
from safeimg.drivers.storage.api import File, Span
from safeimg.drivers.storage.layer import FileLayer
from safeimg.drivers.storage.virtual import ReadOnly


class Window(ReadOnly, FileLayer):
    """Implements `api.File`. Without a size it reaches to the end of the file. What identifies it is the whole file."""

    def __init__(self, file: File, offset: int, size: int | None) -> None:
        ReadOnly.__init__(self, file.path)
        FileLayer.__init__(self, file)
        self._offset = offset
        self._size = size

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
