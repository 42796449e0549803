"""Calls that fail on purpose: a layer over any `FileSystem`.

For tests, ours and those of programs built on safeimg: what happens when the disk fills up, or a sync fails,
at the n-th call? Count first, then let every call fail in turn:

    counted = Faults()
    operation(FaultyFileSystem(LocalFileSystem(), counted))
    for n in range(1, len(counted.calls) + 1):
        faults = Faults(at=n, code=errno.ENOSPC)
        try:
            operation(FaultyFileSystem(LocalFileSystem(), faults))
        except StorageError:
            ...  # judge what is left; faults.calls[n - 1] says what failed

A call that fails has not happened (but see `partial`). A sync that fails raises `SyncFailed`, and from then
on that file refuses to be written or synced, as a real one does. For power cuts take
`simulated.SimulatedFileSystem`.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Collection, Iterator

from safeimg.drivers.errors import StorageError, SyncFailed
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage import locks
from safeimg.drivers.storage.api import Buffer, File, FileStat, FileSystem, Span
from safeimg.drivers.storage.layer import FileLayer

SYNCS = frozenset({"sync", "sync_all", "sync_directory"})
CHANGES = SYNCS | {"create", "pwrite", "write_zeroes", "preallocate", "truncate", "rename", "unlink"}
READS = frozenset({"open", "pread", "spans"})  # "pread" is `pread_into` as well


class Call(NamedTuple):
    """A call that was counted."""

    kind: str
    path: str


class Faults:
    """Which calls fail, and a count of the calls; shared by a file system and all files opened through it."""

    def __init__(
        self,
        kinds: Collection[str] = CHANGES,
        *,
        at: int | None = None,
        code: int = errno.ENOSPC,
        forever: bool = False,
        partial: bool = False,
        paths: Callable[[str], bool] | None = None,
    ) -> None:
        """`at`: the call that fails, counted from 1 among those of `kinds` whose path satisfies `paths`.
        `forever`: all later ones too. `partial`: a write that fails has written its first half."""
        unknown = set(kinds) - CHANGES - READS
        if unknown:
            raise ValueError(f"no such kind of call: {', '.join(sorted(unknown))}")
        self._kinds = frozenset(kinds)
        self._at = at
        self._code = code
        self._forever = forever
        self._paths = paths
        self._lock = threading.Lock()
        self.partial = partial
        self.calls: list[Call] = []

    def strikes(self, kind: str, path: str) -> OSError | None:
        """Counts a call. The error it has to fail with, or None."""
        if kind not in self._kinds or (self._paths is not None and not self._paths(path)):
            return None
        with self._lock:
            self.calls.append(Call(kind, path))
            number = len(self.calls)
        if self._at is None or number < self._at or (number > self._at and not self._forever):
            return None
        return OSError(self._code, os.strerror(self._code))

    def check(self, kind: str, path: str) -> None:
        """Counts a call, and raises what it has to fail with."""
        error = self.strikes(kind, path)
        if error is not None:
            raise (SyncFailed if kind in SYNCS else StorageError)(path, kind, error)


class FaultyFile(FileLayer):
    """A file whose calls fail as `faults` says."""

    def __init__(self, file: File, faults: Faults) -> None:
        super().__init__(file)
        self._faults = faults
        self._sync_failure: SyncFailed | None = None

    def _check_change(self, kind: str) -> None:
        if self._sync_failure is not None:
            raise self._sync_failure
        try:
            self._faults.check(kind, self.path)
        except SyncFailed as error:
            self._sync_failure = error
            raise

    def pread(self, offset: int, length: int) -> bytes:
        self._faults.check("pread", self.path)
        return self._file.pread(offset, length)

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        self._faults.check("pread", self.path)
        return self._file.pread_into(offset, buffer)

    def pwrite(self, offset: int, data: Buffer) -> None:
        try:
            self._check_change("pwrite")
        except SyncFailed:
            raise
        except StorageError:
            if self._faults.partial:
                whole = memoryview(data).cast("B")
                self._file.pwrite(offset, whole[: len(whole) // 2])
            raise
        self._file.pwrite(offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._check_change("write_zeroes")
        self._file.write_zeroes(offset, length, unmap=unmap)

    def preallocate(self, offset: int, length: int, *, keep_size: bool) -> None:
        self._check_change("preallocate")
        self._file.preallocate(offset, length, keep_size=keep_size)

    def truncate(self, length: int) -> None:
        self._check_change("truncate")
        self._file.truncate(length)

    def spans(self, offset: int, length: int) -> Iterator[Span]:
        self._faults.check("spans", self.path)
        return self._file.spans(offset, length)

    def sync(self) -> None:
        self._check_change("sync")
        self._file.sync()

    def sync_all(self) -> None:
        self._check_change("sync_all")
        self._file.sync_all()

    def try_lock(self) -> bool:
        return locks.try_lock(self._file)


class FaultyFileSystem:
    """A file system whose calls, and those of its files, fail as `faults` says."""

    def __init__(self, inner: FileSystem, faults: Faults) -> None:
        self.inner = inner
        self.faults = faults

    def open(self, path: str, *, write: bool = False, cache: str = "writeback", locking: bool = False,
             force_share: bool = False) -> FaultyFile:
        self.faults.check("open", path)
        file = self.inner.open(path, write=write, cache=cache, locking=locking, force_share=force_share)
        return FaultyFile(file, self.faults)

    def create(self, path: str, *, mode: int = 0o644, exclusive: bool = False, truncate: bool = True,
               cache: str = "writeback", locking: bool = False) -> FaultyFile:
        self.faults.check("create", path)
        file = self.inner.create(
            path, mode=mode, exclusive=exclusive, truncate=truncate, cache=cache, locking=locking
        )
        return FaultyFile(file, self.faults)

    def stat(self, path: str) -> FileStat | None:
        return self.inner.stat(path)

    def unlink(self, path: str) -> None:
        self.faults.check("unlink", path)
        self.inner.unlink(path)

    def rename(self, source: str, target: str) -> None:
        self.faults.check("rename", source)
        self.inner.rename(source, target)

    def sync_directory(self, path: str) -> None:
        self.faults.check("sync_directory", path)
        self.inner.sync_directory(path)

    def list_directory(self, path: str) -> list[str]:
        return self.inner.list_directory(path)

    def resolve(self, path: str) -> str:
        return self.inner.resolve(path)

    def give_to(self, path: str, uid: int, gid: int) -> None:
        self.inner.give_to(path, uid, gid)
