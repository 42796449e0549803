"""System calls about a file's space that the standard library lacks.

ctypes is loaded at the first call only: reading an image needs none of this, and importing it takes 3 ms.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

# linux/falloc.h
KEEP_SIZE = 0x01
PUNCH_HOLE = 0x02
ZERO_RANGE = 0x10

# linux/fs.h
_BLKDISCARD = 0x1277
_BLKSSZGET = 0x1268

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


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) itself. Not `os.posix_fallocate`: where the file system has no support, that one reads and
    rewrites a byte of every block, and takes back what another thread writes there meanwhile."""
    if not (0 <= offset < 1 << 63 and 0 <= length < 1 << 63):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))  # ctypes would cut them to 64 bits
    while (number := _libc_fallocate()(fd, mode, offset, length)) == errno.EINTR:
        pass
    if number:
        raise OSError(number, os.strerror(number))


def discard_device(fd: int, offset: int, length: int) -> None:
    """Tells a block device that the range is not needed (BLKDISCARD)."""
    fcntl.ioctl(fd, _BLKDISCARD, struct.pack("@QQ", offset, length))


def sector_size(fd: int) -> int:
    """The logical sector of a block device (BLKSSZGET)."""
    (size,) = struct.unpack("@i", fcntl.ioctl(fd, _BLKSSZGET, struct.pack("@i", 0)))
    return int(size)


def device_size(number: int) -> int:
    """The capacity of a block device, by its device number, unopened; 0 if the system does not say."""
    try:
        text = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/size").read_text()
        return int(text) * 512  # the kernel counts in 512-byte units whatever the sector size
    except (OSError, ValueError):
        return 0
