"""The undo file: before-images of guest data that an operation overwrites in place, beside its log.

A header of 4 KiB, then extents of raw bytes, each starting at a multiple of 4 KiB. What lies where, and what
it must be, is only in the log (`BeforeRecord`): space that no durable event names means nothing.
"""

from __future__ import annotations

import errno
import os
import struct
import threading

from blake3 import blake3
from safeimg.journal.errors import JournalError, LogDamaged, LogForeign
from safeimg.journal.files import Buffer, File, FileStat, FileSystem, remove_durably
from safeimg.journal.trust import check_trusted, sidecar_stat

UNDO_MAGIC = b"safeimg und\r\n\x1a\n\0"
VERSION = 1
ALIGN = 4096
MAX_EXTENT = 64 << 20
SUFFIX = "-undo"  # of the log's path

_HEADER = struct.Struct("<16sII16s")  # magic, version, header's length, operation
_HASH = 32
_ZEROES = bytes(1 << 20)


class UndoFile:
    """An open undo file. `append` and `read` may be called from several threads at once.

    Errors of the storage layer propagate. After a failed sync nothing may be appended any more."""

    def __init__(self, files: FileSystem, file: File, operation: str) -> None:
        """Private: see `create` and `open`."""
        self._files = files
        self._file = file
        self._operation = operation
        self._lock = threading.Lock()
        self._end = max(_up(file.length()), ALIGN)
        self._broken = False

    @classmethod
    def create(cls, files: FileSystem, path: str, operation: str, like: FileStat) -> UndoFile:
        """A new undo file, mode 0600, durable, of the owner and group of `like` (the image).

        Call it with the operation's log locked. One that an abandoned log left behind is replaced; anything
        else at `path` is refused with `LogForeign`.
        """
        if sidecar_stat(files, path, like.uid) is not None:
            _check_replaceable(files, path)
            files.unlink(path)
        file = files.create(path, mode=0o600, exclusive=True)
        try:
            files.give_to(path, like.uid, like.gid)
            start = _HEADER.pack(UNDO_MAGIC, VERSION, ALIGN, bytes.fromhex(operation)).ljust(
                ALIGN - _HASH, b"\0"
            )
            file.pwrite(0, start + blake3(start).digest())
            file.sync_all()
            files.sync_directory(os.path.dirname(path) or ".")
            return cls(files, file, operation)
        except BaseException:
            file.close()
            raise

    @classmethod
    def open(
        cls,
        files: FileSystem,
        path: str,
        operation: str,
        *,
        write: bool = False,
        image_owner: int | None = None,
    ) -> UndoFile:
        """The undo file of `operation`. Raises `LogForeign` (not trusted, or another operation's),
        `LogDamaged`."""
        if sidecar_stat(files, path, image_owner) is None:
            raise LogForeign(
                f"{path}: the undo file of the pending operation is gone; put it back, or give the operation up "
                "with `safeimg abandon`"
            )
        file = files.open(path, write=write)
        try:
            check_trusted(file.stat(), path, image_owner)
            found = _read_header(file)
            if found != operation:
                raise LogForeign(f"{path}: belongs to operation {found}, not to {operation}; move it away")
            return cls(files, file, operation)
        except BaseException:
            file.close()
            raise

    @property
    def path(self) -> str:
        return self._file.path

    @property
    def operation(self) -> str:
        return self._operation

    @property
    def end(self) -> int:
        """Where the next extent goes."""
        return self._end

    def reserve(self, length: int) -> None:
        """Allocates disk space for `length` more bytes: a full disk shows before a step is begun, not within
        it."""
        if length > 0:
            self._file.preallocate(self._end, _up(length), keep_size=True)

    def append(self, data: Buffer) -> tuple[int, bytes]:
        """Keeps `data` (1 byte to 64 MiB); its offset here and its BLAKE3-256. Durable after the next
        `sync`."""
        size = len(memoryview(data).cast("B")) if not isinstance(data, bytes) else len(data)
        if not 0 < size <= MAX_EXTENT:
            raise JournalError(f"{self.path}: an extent of {size} bytes, expected 1 to {MAX_EXTENT}")
        if self._broken:
            raise JournalError(f"{self.path}: nothing can be kept any more after a failed sync")
        digest = blake3(data).digest()
        with self._lock:
            offset = self._end
            self._end = _up(offset + size)
        self._file.pwrite(offset, data)
        return offset, digest

    def read(self, offset: int, length: int, digest: bytes) -> bytes:
        """The extent that `append` put at `offset`. Raises `LogDamaged` if these are not its bytes any
        more."""
        end = self._file.length()
        if not (offset >= ALIGN and 0 < length <= MAX_EXTENT and offset + length <= end):
            raise LogDamaged(
                self.path, f"{length} bytes of undo data expected, the file ends at {end:#x}", offset
            )
        data = self._file.pread(offset, length)
        if len(data) != length or blake3(data).digest() != digest:
            raise LogDamaged(self.path, f"{length} bytes of undo data do not match their digest", offset)
        return data

    def sync(self) -> None:
        """All that was appended is on stable storage when this returns."""
        if self._broken:
            raise JournalError(f"{self.path}: nothing can be kept any more after a failed sync")
        try:
            self._file.sync()
        except BaseException:
            self._broken = True
            raise

    def erase(self, offset: int, length: int) -> None:
        """Overwrites an extent that held a secret, durably: best effort where the medium copies on write."""
        length = min(length, self._file.length() - offset)
        for at in range(offset, offset + length, len(_ZEROES)):
            self._file.pwrite(at, _ZEROES[: offset + length - at])
        self._file.sync()

    def remove(self) -> None:
        """Takes its name away, durably, and gives the space back on `close`."""
        remove_durably(self._files, self.path)

    def close(self) -> None:
        self._file.close()


def _up(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def _read_header(file: File) -> str:
    """The operation it belongs to."""
    data = file.pread(0, ALIGN)
    if data[: len(UNDO_MAGIC)] != UNDO_MAGIC:
        raise LogForeign(f"{file.path}: not an undo file of safeimg's; move it away")
    if len(data) < ALIGN or blake3(data[: ALIGN - _HASH]).digest() != data[ALIGN - _HASH :]:
        raise LogDamaged(file.path, "the header of the undo file does not match its checksum", 0)
    _, version, size, operation = _HEADER.unpack_from(data)
    if version != VERSION or size != ALIGN:
        raise LogForeign(
            f"{file.path}: an undo file of format version {version}; this safeimg knows {VERSION}"
        )
    return str(operation.hex())


def _check_replaceable(files: FileSystem, path: str) -> None:
    """An undo file without its log, or what a crash while creating one left: empty, or its first bytes
    missing."""
    file = files.open(path)
    try:
        head = file.pread(0, len(UNDO_MAGIC))
    finally:
        file.close()
    if head.strip(b"\0") and head != UNDO_MAGIC:
        raise LogForeign(
            f"{path}: {os.strerror(errno.EEXIST)}, and it is not an undo file of safeimg's; move it away"
        )
