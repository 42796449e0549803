"""The fault layer: counts, fails at the chosen call, and stays failed after a sync."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safeimg.drivers.errors import LockError, StorageError, SyncFailed
from safeimg.drivers.storage import locks
from safeimg.drivers.storage.api import FileSystem
from safeimg.drivers.storage.faults import CHANGES, READS, Call, Faults, FaultyFileSystem
from safeimg.drivers.storage.file import LocalFileSystem


def job(fs: FileSystem, folder: Path) -> None:
    """One of each kind of call that changes something."""
    path = str(folder / "a")
    file = fs.create(path)
    try:
        file.preallocate(0, 4096, keep_size=True)
        file.pwrite(0, b"data")
        file.write_zeroes(4096, 4096, unmap=True)
        file.truncate(6000)
        file.sync()
        file.sync_all()
    finally:
        file.close()
    fs.rename(path, str(folder / "b"))
    fs.sync_directory(str(folder))
    fs.unlink(str(folder / "b"))


def test_every_call_in_turn(tmp_path: Path) -> None:
    counted = Faults()
    job(FaultyFileSystem(LocalFileSystem(), counted), tmp_path)
    assert {call.kind for call in counted.calls} == CHANGES
    for n, call in enumerate(counted.calls, 1):
        faults = Faults(at=n, code=errno.ENOSPC)
        with pytest.raises(StorageError) as caught:
            job(FaultyFileSystem(LocalFileSystem(), faults), tmp_path)
        assert caught.value.errno == errno.ENOSPC
        assert faults.calls[n - 1] == call
        assert isinstance(caught.value, SyncFailed) == call.kind.startswith("sync")


def test_once_or_from_then_on(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    file = FaultyFileSystem(LocalFileSystem(), Faults({"pwrite"}, at=2)).create(path)
    file.pwrite(0, b"1")
    with pytest.raises(StorageError):
        file.pwrite(1, b"2")
    file.pwrite(1, b"3")
    assert file.pread(0, 10) == b"13"
    file.close()
    faults = Faults({"pwrite"}, at=2, forever=True, partial=True, code=errno.EIO)
    file = FaultyFileSystem(LocalFileSystem(), faults).open(path, write=True)
    file.pwrite(0, b"abcd")
    for _ in range(2):
        with pytest.raises(StorageError):
            file.pwrite(4, b"efgh")
    assert file.pread(0, 10) == b"abcdef"
    file.close()
    assert faults.calls == [Call("pwrite", path)] * 3


def test_nothing_can_be_written_after_a_failed_sync(tmp_path: Path) -> None:
    fs = FaultyFileSystem(LocalFileSystem(), Faults({"sync"}, at=1, code=errno.EIO))
    file = fs.create(str(tmp_path / "a"))
    file.pwrite(0, b"1")
    with pytest.raises(SyncFailed):
        file.sync()
    for attempt in (file.sync, file.sync_all, lambda: file.pwrite(0, b"2"), lambda: file.truncate(0)):
        with pytest.raises(SyncFailed):
            attempt()
    assert file.pread(0, 10) == b"1"
    file.close()


def test_only_some_paths_and_reads(tmp_path: Path) -> None:
    faults = Faults(READS, at=1, forever=True, paths=lambda path: path.endswith("b"))
    fs = FaultyFileSystem(LocalFileSystem(), faults)
    for name in "ab":
        fs.create(str(tmp_path / name)).close()
    fs.open(str(tmp_path / "a")).close()
    with pytest.raises(StorageError):
        fs.open(str(tmp_path / "b"))
    with pytest.raises(ValueError, match="telepathy"):
        Faults({"telepathy"})


def test_locks_reach_the_file_below(tmp_path: Path) -> None:
    fs = FaultyFileSystem(LocalFileSystem(), Faults())
    first, second = fs.create(str(tmp_path / "a"), locking=True), fs.open(str(tmp_path / "a"), locking=True)
    with pytest.raises(LockError):
        locks.lock(second, locks.READER)
    assert locks.try_lock(first) and not locks.try_lock(second)
    first.close()
    second.close()
