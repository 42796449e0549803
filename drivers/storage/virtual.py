"""What files have in common that are no files of this machine, or several: read-only, without times and attributes.

A protocol's file inherits from `VirtualFile`, says how long it is and how it is read, and replaces what it has more."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import NoReturn

from safeimg.drivers.errors import StorageError
from safeimg.drivers.storage.api import Buffer, FileStat, Span

UNKNOWN = -1  # `FileStat.allocated` where there is no telling


class ReadOnly:
    """The part of `api.File` that files answer which nobody can write to."""

    def __init__(self, path: str) -> None:
        self._path = path

    @property
    def path(self) -> str:
        return self._path

    @property
    def writable(self) -> bool:
        return False

    def _refuse(self) -> NoReturn:
        raise StorageError(self._path, "write", OSError(errno.EBADF, "open for reading only"))

    def pwrite(self, offset: int, data: Buffer) -> None:
        self._refuse()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._refuse()

    def discard(self, offset: int, length: int) -> None:
        """A hint that is not taken."""

    def preallocate(self, offset: int, length: int, *, keep_size: bool) -> None:
        self._refuse()

    def truncate(self, length: int) -> None:
        self._refuse()

    def start_writeback(self, offset: int, length: int) -> None:
        """Nothing was written."""


class VirtualFile(ReadOnly):
    """Implements `api.File`, but for `length` and `pread_into`."""

    @property
    def alignment(self) -> int:
        return 1

    def length(self) -> int:
        raise NotImplementedError

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        raise NotImplementedError

    def pread(self, offset: int, length: int) -> bytes:
        buffer = bytearray(max(min(length, self.length() - offset), 0))
        return bytes(buffer[: self.pread_into(offset, memoryview(buffer))])

    def _clipped(self, offset: int, buffer: memoryview) -> memoryview:
        """What of a buffer lies inside the file."""
        if offset < 0:
            raise StorageError(self._path, "read", OSError(errno.EINVAL, "Invalid argument"))
        return buffer[: max(self.length() - offset, 0)]

    def spans(self, offset: int, length: int) -> Iterator[Span]:
        length = min(length, self.length() - offset)
        if length > 0:
            yield Span(offset, length, True)

    def sync(self) -> None:
        """Nothing was written."""

    def sync_all(self) -> None:
        """Nothing was written."""

    def stat(self) -> FileStat:
        """No device and no inode: what identifies it is its name."""
        return FileStat(
            device=0, inode=0, size=self.length(), mtime_ns=0, ctime_ns=0, mode=0, uid=0, gid=0, allocated=UNKNOWN,
            is_device=False,
        )  # fmt: skip

    def get_attribute(self, name: str) -> bytes | None:
        return None

    def set_attribute(self, name: str, value: bytes) -> bool:
        return False

    def remove_attribute(self, name: str) -> None:
        """There are none."""

    def close(self) -> None:
        """Nothing is open."""
