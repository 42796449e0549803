"""QEMU's image locks: byte-range locks that keep running QEMU programs and safeimg out of each other's way.

Every permission on an image has two bytes of the file (never read or written, just locked): byte 100 + n
says "somebody uses permission n", byte 200 + n "somebody denies permission n to others". All locks are
*shared*, so taking them never fails among QEMU programs; conflicts are found by asking whether an exclusive
lock would be possible on the opposite byte:

    I use write    → read-lock 101, then probe 201: does anybody deny it?
    I deny write   → read-lock 201, then probe 101: does anybody use it?

Locking before probing closes the race: of two that start together at least one sees the other. The locks
belong to the open file description, so two opens of one file exclude each other even within a process, and
the kernel drops them however the process ends. The sets below are what QEMU 7.2's programs were observed to
take (strace of qemu-img, qemu-io, qemu-nbd). Locks are advisory: programs that know nothing of them are not
kept out.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from typing import Final, Protocol, runtime_checkable

from safeimg.drivers.errors import LockError, NoLocks
from safeimg.drivers.records import NamedTuple

CONSISTENT_READ: Final = 0
WRITE: Final = 1
WRITE_UNCHANGED: Final = 2  # writing what is already there
RESIZE: Final = 3

_NAMES: Final = ("consistent read", "write", "write unchanged", "resize")
_USES_BYTE: Final = 100
_DENIES_BYTE: Final = 200
_FLOCK: Final = struct.Struct("@hhqqi0q")  # struct flock: type, whence, start, length, pid


class Claim(NamedTuple):
    """What an open file is used for, and what others may not do meanwhile."""

    uses: tuple[int, ...] = ()
    denies: tuple[int, ...] = ()


READER: Final = Claim((CONSISTENT_READ,), (WRITE, RESIZE))
"""Reading an image with metadata, alone or as a backing file; also the source of a convert, raw or not."""

WRITER: Final = Claim((CONSISTENT_READ, WRITE, RESIZE), (WRITE, RESIZE))
"""Writing an image with metadata; also a new file of any format while it is made."""

INSPECTOR: Final = Claim((), (WRITE, RESIZE))
"""`info`: looks at metadata, never at guest data. (`info` of a raw image takes no locks: `NOTHING`.)"""

RAW_READER: Final = Claim((CONSISTENT_READ,), ())
"""Reading an image that is nothing but guest data, as compare, map, dd or a backing file do; with any format, `-U`
(force share)."""

RAW_WRITER: Final = Claim((CONSISTENT_READ, WRITE), ())
"""Writing into a raw image that may be shared, as `convert -n` and `commit` do."""

RAW_RESIZER: Final = Claim((CONSISTENT_READ, WRITE, RESIZE), ())
"""`resize` of a raw image."""

DATA_READER: Final = Claim((CONSISTENT_READ,), (RESIZE,))
"""Reading an external data file."""

DATA_WRITER: Final = Claim((CONSISTENT_READ, WRITE, RESIZE), (RESIZE,))
"""Writing an external data file."""

NOTHING: Final = Claim()


@runtime_checkable
class Lockable(Protocol):
    """A `File` whose storage has QEMU's locks. Others (patched, network) have nothing to lock."""

    locking: bool  # opened with locks, and not to put up with whatever others do

    def lock(self, claim: Claim) -> None: ...


def lock(file: object, claim: Claim) -> None:
    """Changes what `file` is locked for, once its format is known. `LockError` if somebody is in the way;
    the claim held before stays then. Does nothing for files that have no locks, or were opened without."""
    if isinstance(file, Lockable) and file.locking:
        file.lock(claim)


@runtime_checkable
class WholeLockable(Protocol):
    """A `File` that can be locked as a whole, as logs are."""

    def try_lock(self) -> bool: ...


def try_lock(file: object) -> bool:
    """Takes the exclusive lock on all of `file` until it is closed: False if somebody else has it. True for
    files that have no such lock."""
    return file.try_lock() if isinstance(file, WholeLockable) else True


class ImageLocks:
    """The locks of one open file description. Dropped by the kernel when that is closed."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self._held: set[int] = set()

    def change(self, claim: Claim) -> None:
        """Holds `claim` instead of the one before. `LockError`: nothing has changed.

        `NoLocks` where the file system has no byte-range locks (an NFS server without lockd)."""
        wanted = [_USES_BYTE + n for n in claim.uses] + [_DENIES_BYTE + n for n in claim.denies]
        taken: list[int] = []
        try:
            for byte in wanted:
                if byte not in self._held:
                    self._set(byte, fcntl.F_RDLCK)
                    taken.append(byte)
            for permission in claim.uses:
                if self._conflicts(_DENIES_BYTE + permission):
                    raise self._refusal(f'Failed to get "{_NAMES[permission]}" lock')
            for permission in claim.denies:
                if self._conflicts(_USES_BYTE + permission):
                    raise self._refusal(f'Failed to get shared "{_NAMES[permission]}" lock')
        except BaseException:
            for byte in taken:
                self._set(byte, fcntl.F_UNLCK)
            raise
        for byte in self._held.difference(wanted):
            self._set(byte, fcntl.F_UNLCK)
        self._held = set(wanted)

    def _refusal(self, problem: str) -> LockError:
        return LockError(f"{problem}\nIs another process using the image [{self._path}]?")

    def _set(self, byte: int, kind: int) -> None:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, 0, byte, 1, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):  # locked exclusively: not by QEMU
                raise LockError(f"Failed to lock byte {byte}") from None
            raise NoLocks(f"Failed to lock byte {byte}: {error.strerror}") from None

    def _conflicts(self, byte: int) -> bool:
        try:
            answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
        except OSError as error:
            raise NoLocks(f"Failed to lock byte {byte}: {error.strerror}") from None
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
