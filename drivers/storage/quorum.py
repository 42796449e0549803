"""quorum: several copies of one file, of which as many have to agree as its threshold says. To read only."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Sequence

from safeimg.drivers.errors import StorageError
from safeimg.drivers.storage.api import File, FileStat
from safeimg.drivers.storage.virtual import VirtualFile


class Quorum(VirtualFile):
    """Implements `api.File`. The copies lie in different folders, so it has no path that others start at."""

    def __init__(self, files: Sequence[File], threshold: int, *, first_only: bool) -> None:
        """`first_only`: the first copy that can be read is believed (QEMU's read-pattern fifo)."""
        super().__init__("")
        self._files = files
        self._threshold = 1 if first_only else threshold
        self._first_only = first_only

    def length(self) -> int:
        return self._files[0].length()

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        part = self._clipped(offset, buffer)
        votes: Counter[bytes] = Counter()
        for file in self._files:
            try:
                votes[file.pread(offset, len(part))] += 1
            except StorageError:
                continue
            if self._first_only:
                break
        content, count = votes.most_common(1)[0] if votes else (b"", 0)
        if count < self._threshold:
            raise StorageError(self._path, "read", OSError(errno.EIO, "Input/output error"))
        part[: len(content)] = content
        return len(content)

    def stat(self) -> FileStat:
        allocated = sum(file.stat().allocated for file in self._files)
        return super().stat()._replace(allocated=allocated)

    def close(self) -> None:
        for file in self._files:
            file.close()
