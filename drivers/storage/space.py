"""A file's space: holes, zeroes, reservations, by system calls that the standard library lacks.

ctypes is loaded at the first call only: reading an image needs none of this, and importing it takes 3 ms.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from functools import cache

from safeimg.drivers.storage.buffered import PositionalIO

# linux/falloc.h
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

# linux/fs.h
_BLKDISCARD = 0x1277
_BLKSSZGET = 0x1268

_ZEROES = 1 << 20  # bytes a write, where zeroes have to be written

# What a file system says that cannot do it. EINVAL: devices answer it for ranges or modes they do not like.
UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM})


@cache
def _libc_fallocate() -> Callable[[int, int, int, int], int]:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, "fallocate64", None) or libc.fallocate  # musl: only the latter, always 64 bits
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int

    def call(fd: int, mode: int, offset: int, length: int) -> int:
        return 0 if function(fd, mode, offset, length) == 0 else ctypes.get_errno()

    return call


def _check_range(offset: int, length: int) -> None:
    if not (0 <= offset < 1 << 63 and 0 <= length < 1 << 63):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) itself. Not `os.posix_fallocate`: where the file system has no support, that one reads and
    rewrites a byte of every block, and takes back what another thread writes there meanwhile."""
    _check_range(offset, length)  # ctypes would cut them to 64 bits
    while (number := _libc_fallocate()(fd, mode, offset, length)) == errno.EINTR:
        pass
    if number:
        raise OSError(number, os.strerror(number))


def device_size(number: int) -> int:
    """The capacity of a block device, by its device number, unopened; 0 if the system does not say."""
    try:
        with open(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/size") as told:
            text = told.read()
        return int(text) * 512  # the kernel counts in 512-byte units whatever the sector size
    except (OSError, ValueError):
        return 0


class Space:
    """The space of one open file or block device. Raises `OSError`."""

    def __init__(self, fd: int, *, is_device: bool) -> None:
        self._fd = fd
        self._is_device = is_device
        self._refused: set[int] = set()  # fallocate modes that the file system does not have

    def allocate(self, offset: int, length: int, *, keep_size: bool) -> None:
        """Does nothing where that is not supported."""
        self._fallocate(KEEP_SIZE if keep_size else 0, offset, length)

    def discard(self, offset: int, length: int) -> None:
        if self._is_device:
            _check_range(offset, length)
            fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("@QQ", offset, length))
        else:
            self._fallocate(PUNCH_HOLE | KEEP_SIZE, offset, length)

    def zero(self, io: PositionalIO, offset: int, length: int, *, unmap: bool) -> None:
        """Makes the range (not empty) read as zeroes, and the file as long as that takes; through `io` where
        nothing else works."""
        end = offset + length
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if self._is_device:
            if end > size:
                # What a write there would say; fallocate does what it can and says nothing
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._zero_device(io, offset, end, unmap)
            return
        punch = PUNCH_HOLE | KEEP_SIZE
        if unmap and PUNCH_HOLE not in self._refused:
            if end > size:
                # Not ftruncate, which could cut off what another thread has just appended. The hole takes the
                # block again.
                io.write(end - 1, memoryview(b"\0"))
            if self._fallocate(punch, offset, length):
                return
        if self._fallocate(ZERO_RANGE, offset, length):
            return
        if not unmap and self._fallocate(punch, offset, length) and self._fallocate(0, offset, length):
            return  # tmpfs
        _write_zeroes(io, offset, end)

    def _zero_device(self, io: PositionalIO, start: int, end: int, unmap: bool) -> None:
        (sector,) = struct.unpack("@i", fcntl.ioctl(self._fd, _BLKSSZGET, struct.pack("@i", 0)))
        first = min(end, -(-start // sector) * sector)
        last = max(first, end // sector * sector)
        _write_zeroes(io, start, first)
        if first < last:
            kinds = (PUNCH_HOLE, ZERO_RANGE) if unmap else (ZERO_RANGE,)
            if not any(self._fallocate(kind | KEEP_SIZE, first, last - first) for kind in kinds):
                _write_zeroes(io, first, last)
        _write_zeroes(io, last, end)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """False if it cannot be done with this file."""
        kind = mode & ~KEEP_SIZE
        if kind in self._refused:
            return False
        try:
            fallocate(self._fd, mode, offset, length)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            if error.errno != errno.EINVAL:  # that may be about this range only
                self._refused.add(kind)
            return False
        return True


def _write_zeroes(io: PositionalIO, start: int, end: int) -> None:
    zeroes = memoryview(bytes(min(max(end - start, 0), _ZEROES)))
    while start < end:
        size = min(end - start, _ZEROES)
        io.write(start, zeroes[:size])
        start += size
