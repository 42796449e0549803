"""Positional I/O on a file descriptor, through the page cache."""

from __future__ import annotations

import errno
import os
from typing import Protocol

# Bytes of one write call. For larger ones newer Linux looks for 2 MiB of memory in one piece, to cache them in, which
# can take ten times as long as the write.
AT_ONCE = 1 << 20


class PositionalIO(Protocol):
    """Whole requests: short and interrupted system calls are continued. Raises `OSError`."""

    @property
    def alignment(self) -> int: ...
    def read_into(self, offset: int, view: memoryview) -> int:
        """The number of bytes read, smaller than the view only at the end of the file."""
        ...

    def write(self, offset: int, view: memoryview) -> None: ...


class BufferedIO:
    """Through the page cache."""

    alignment = 1

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read_into(self, offset: int, view: memoryview) -> int:
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def write(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = os.pwrite(self._fd, view[done : done + AT_ONCE], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "nothing written")
            done += count
