"""The storage interface: everything safeimg writes to a disk, images and logs alike, goes through it.

Two implementations: `file.LocalFileSystem` (the real one) and `simulated.SimulatedFileSystem` (its recording
twin, which the power-cut simulation cuts anywhere). Offsets and lengths are bytes. All calls are synchronous
and may be made from several threads at once on one `File` (positional I/O only). System-call failures are
`StorageError`; a failed sync is `SyncFailed`.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Protocol

from safeimg.drivers.errors import StorageError
from safeimg.drivers.records import NamedTuple

Buffer = bytes | bytearray | memoryview

CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe")


class FileStat(NamedTuple):
    """What identifies a file and tells whether somebody changed it."""

    device: int
    inode: int
    size: int  # bytes; for a block device, its capacity
    mtime_ns: int
    ctime_ns: int
    mode: int
    uid: int
    gid: int
    allocated: int  # bytes really occupied (st_blocks × 512); -1 where there is no telling
    is_device: bool

    @property
    def is_here(self) -> bool:
        """Whether this is a file of this machine: others have no inode to be recognised by."""
        return self.inode != 0


class Span(NamedTuple):
    """A run of a file that is data, or a hole that reads as zeroes."""

    start: int
    length: int
    is_data: bool
    allocated: bool | None = None  # where a server tells it: zeroes may take space, holes hold anything


class File(Protocol):
    """An open regular file or block device."""

    @property
    def path(self) -> str: ...
    @property
    def writable(self) -> bool: ...
    @property
    def alignment(self) -> int:
        """What offsets, lengths and buffer addresses should be multiples of for speed (1 unless O_DIRECT).

        Unaligned requests work too (bounced through an aligned buffer)."""
        ...

    def length(self) -> int: ...
    def pread(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes: shorter only at the end of the file."""
        ...

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        """Fills `buffer` from `offset`; the number of bytes read, smaller only at the end of the file."""
        ...

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Writes all of `data`, extending the file if needed."""
        ...

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Makes the range read as zeroes: punches a hole if `unmap`, else keeps its space allocated.

        Extends the file if needed. Falls back to writing zeroes where fallocate cannot do it."""
        ...

    def discard(self, offset: int, length: int) -> None:
        """Gives the range's space back if the file system can; its content is undefined afterwards. Never fails."""
        ...

    def preallocate(self, offset: int, length: int, *, keep_size: bool) -> None:
        """Reserves space for the range (posix_fallocate); ENOSPC is raised, missing support is not."""
        ...

    def truncate(self, length: int) -> None: ...
    def spans(self, offset: int, length: int) -> Iterator[Span]:
        """Data and holes (SEEK_DATA, SEEK_HOLE) of the range clipped to the file, in order, without gaps."""
        ...

    def sync(self) -> None:
        """Data and length are on stable storage when this returns (fdatasync). No-op with cache mode `unsafe`."""
        ...

    def sync_all(self) -> None:
        """Like `sync`, and times and owner too (fsync). Works on files opened for reading."""
        ...

    def start_writeback(self, offset: int, length: int) -> None:
        """A hint: start writing the range to disk now. Never fails."""
        ...

    def stat(self) -> FileStat: ...
    def get_attribute(self, name: str) -> bytes | None:
        """An extended attribute (`user.` is part of the name), or None (also where they are not supported)."""
        ...

    def set_attribute(self, name: str, value: bytes) -> bool:
        """False where the file system has no extended attributes or refuses."""
        ...

    def remove_attribute(self, name: str) -> None: ...
    def close(self) -> None: ...


class FileSystem(Protocol):
    """Names and directories. Paths are as the user gave them."""

    def open(self, path: str, *, write: bool = False, cache: str = "writeback", locking: bool = False,
             force_share: bool = False) -> File:
        """Opens an existing file or block device.

        `locking` takes QEMU's image locks as a reader or writer would (`LockError` in QEMU's words if somebody
        holds them against us); `force_share` is `-U`. Logs are opened without."""
        ...

    def create(self, path: str, *, mode: int = 0o644, exclusive: bool = False, truncate: bool = True,
               cache: str = "writeback", locking: bool = False) -> File:
        """Creates a file (or opens and truncates the one there, keeping its inode) for reading and writing."""
        ...

    def stat(self, path: str) -> FileStat | None:
        """None if there is nothing at `path`, nor can be (names too long, links that lead nowhere). Follows links."""
        ...

    def unlink(self, path: str) -> None: ...
    def rename(self, source: str, target: str) -> None: ...
    def sync_directory(self, path: str) -> None:
        """Makes names created, renamed and removed in directory `path` durable."""
        ...

    def list_directory(self, path: str) -> list[str]: ...
    def resolve(self, path: str) -> str:
        """The absolute path without symbolic links."""
        ...

    def give_to(self, path: str, uid: int, gid: int) -> None:
        """Changes a file's owner where allowed; silently not where not."""
        ...


def look(fs: FileSystem, path: str) -> FileStat | None:
    """What `fs.stat` tells; None, too, where the folder may not be looked into: opening or making the file tells."""
    try:
        return fs.stat(path)
    except StorageError as error:
        if error.errno != errno.EACCES:
            raise
        return None
