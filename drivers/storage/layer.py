"""A file on top of another one: every call is passed on. What differs is all that a layer has to say."""

from __future__ import annotations

from collections.abc import Iterator

from safeimg.drivers.storage import locks
from safeimg.drivers.storage.api import Buffer, File, FileStat, Span


class FileLayer:
    """Implements `api.File` with the one of `file`."""

    def __init__(self, file: File) -> None:
        self._file = file

    @property
    def path(self) -> str:
        return self._file.path

    @property
    def writable(self) -> bool:
        return self._file.writable

    @property
    def alignment(self) -> int:
        return self._file.alignment

    @property
    def locking(self) -> bool:
        return isinstance(self._file, locks.Lockable) and self._file.locking

    def lock(self, claim: locks.Claim) -> None:
        locks.lock(self._file, claim)

    def length(self) -> int:
        return self._file.length()

    def pread(self, offset: int, length: int) -> bytes:
        return self._file.pread(offset, length)

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        return self._file.pread_into(offset, buffer)

    def pwrite(self, offset: int, data: Buffer) -> None:
        self._file.pwrite(offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._file.write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self._file.discard(offset, length)

    def preallocate(self, offset: int, length: int, *, keep_size: bool) -> None:
        self._file.preallocate(offset, length, keep_size=keep_size)

    def truncate(self, length: int) -> None:
        self._file.truncate(length)

    def spans(self, offset: int, length: int) -> Iterator[Span]:
        return self._file.spans(offset, length)

    def sync(self) -> None:
        self._file.sync()

    def sync_all(self) -> None:
        self._file.sync_all()

    def start_writeback(self, offset: int, length: int) -> None:
        self._file.start_writeback(offset, length)

    def stat(self) -> FileStat:
        return self._file.stat()

    def get_attribute(self, name: str) -> bytes | None:
        return self._file.get_attribute(name)

    def set_attribute(self, name: str, value: bytes) -> bool:
        return self._file.set_attribute(name, value)

    def remove_attribute(self, name: str) -> None:
        self._file.remove_attribute(name)

    def close(self) -> None:
        self._file.close()
