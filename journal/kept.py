"""What is kept of completed operations so that `undo` can take them back: their logs, and their undo files.

A folder of the state directory holds, for each operation, `OPERATION.log`, the log as it was when the operation was
settled, and, where there were before-images, `OPERATION.data`, its undo file. A record is there once its log is:
data without a log, and names that end in `-new`, are what a crash left.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

from safeimg.drivers.records import NamedTuple
from safeimg.journal.clock import now
from safeimg.journal.errors import JournalError, JournalUnavailable
from safeimg.journal.events import BeforeRecord
from safeimg.journal.files import File, FileStat, FileSystem, system_error
from safeimg.journal.history import UNDO, UNDOES, History
from safeimg.journal.log import Log, read_events
from safeimg.journal.place import make_state_directory, state_directory
from safeimg.journal.state import OperationState, fold
from safeimg.journal.trust import sidecar_stat
from safeimg.journal.undo import ALIGN, UndoFile

FOLDER = "undo"  # in the state directory
LOG = ".log"
DATA = ".data"
NEW = "-new"

_CHUNK = 1 << 20
_NAME = re.compile(r"([0-9a-f]{32})\.(log|data)(-new)?")


class Keeping(NamedTuple):
    """How much is kept, in bytes. `folder`: None is the one in the state directory, made when it is needed."""

    each: int  # of one operation; one that would take more is not kept
    total: int  # of all of them; the oldest are dropped
    folder: str | None = None

    def place(self) -> str | None:
        """The folder, whether it is there or not; None if there can be none."""
        if self.folder is not None:
            return self.folder
        directory = state_directory()
        return None if directory is None else os.path.join(directory, FOLDER)

    def make_place(self) -> str:
        """The folder, made if it is not there. Raises `JournalUnavailable`."""
        if self.folder is not None:
            return self.folder
        path = os.path.join(make_state_directory(), FOLDER)
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
        except OSError as error:
            raise JournalUnavailable(f"{path}: {error.strerror}") from None
        return path


class Entry(NamedTuple):
    """A file, or what belongs together, in the folder."""

    operation: str
    paths: tuple[str, ...]
    size: int  # bytes
    kept: float  # seconds since the epoch
    whole: bool  # False: what a crash left


class Record(NamedTuple):
    """A kept operation, open. `undo`: its before-images; None if there are none."""

    path: str
    state: OperationState
    undo: UndoFile | None

    @property
    def before_images(self) -> list[BeforeRecord]:
        """All that the operation overwrote or gave up, and that was kept."""
        state = self.state
        given_up = [each for records in state.given_up.values() for each in records]
        return given_up + [each for step in state.steps for each in step.prepared.before]

    def close(self) -> None:
        if self.undo is not None:
            self.undo.close()


def keep(files: FileSystem, history: History, keeping: Keeping, log: Log, undo: UndoFile | None) -> None:
    """Keeps a settled operation, and drops what is too much then. `undo` is moved if that takes no copying.

    Call it with the log locked and all of it durable."""
    folder = keeping.make_place()
    path = os.path.join(folder, log.operation + LOG)
    data = os.path.join(folder, log.operation + DATA)
    try:
        if undo is not None and undo.end > ALIGN:
            _move(files, undo.path, data)
        _copy(files, log.path, path + NEW, log.used)
        files.rename(path + NEW, path)
        files.sync_directory(folder)
    except BaseException:
        for left in (path + NEW, data):
            _remove_quietly(files, left)
        raise
    drop(files, keeping, total=keeping.total, spared=lambda: being_undone(files, history))


def find(files: FileSystem, keeping: Keeping, operation: str) -> str | None:
    """The path of the operation's record; None if nothing is kept of it."""
    folder = keeping.place()
    path = None if folder is None else os.path.join(folder, operation + LOG)
    return path if path is not None and files.stat(path) is not None else None


def load(files: FileSystem, path: str) -> Record:
    """The record at `path`. Raises `LogForeign`, `LogDamaged`, `LogVoid`, and `JournalError` if it is gone."""
    if sidecar_stat(files, path) is None:
        raise JournalError(f"{path}: what was kept of the operation is gone")
    log = Log.open(files, path)
    try:
        state = fold(log.replay())
        data = path.removesuffix(LOG) + DATA
        undo = None
        if files.stat(data) is not None:
            undo = UndoFile.open(files, data, state.declared.operation)
        return Record(path, state, undo)
    finally:
        log.close()


def forget(files: FileSystem, path: str, operation: str) -> None:
    """Removes the record at `path`, durably, if it is there and of that operation."""
    if files.stat(path) is None or sidecar_stat(files, path) is None:
        return
    log = Log.open(files, path)
    log.close()
    if log.operation != operation:
        return
    for each in (path, path.removesuffix(LOG) + DATA):
        if files.stat(each) is not None:
            files.unlink(each)
    files.sync_directory(os.path.dirname(path))


def entries(files: FileSystem, keeping: Keeping) -> list[Entry]:
    """Everything in the folder that is ours, oldest first."""
    folder = keeping.place()
    if folder is None or files.stat(folder) is None:
        return []
    found: dict[str, list[tuple[str, FileStat]]] = {}
    for name in files.list_directory(folder):
        match = _NAME.fullmatch(name)
        there = files.stat(os.path.join(folder, name)) if match else None
        if match and there is not None:
            key = match[1] if not match[3] else name
            found.setdefault(key, []).append((os.path.join(folder, name), there))
    listed = []
    for key, each in found.items():
        whole = any(path.endswith(LOG) for path, _ in each)
        size = sum(_occupied(there) for _, there in each)
        kept = max(there.mtime_ns for _, there in each) / 1e9
        listed.append(Entry(key[:32], tuple(path for path, _ in each), size, kept, whole))
    return sorted(listed, key=lambda entry: (entry.kept, entry.operation))


def drop(
    files: FileSystem,
    keeping: Keeping,
    *,
    total: int | None = None,
    older_than: float | None = None,
    orphans: bool = False,
    spared: Callable[[], frozenset[str]] = frozenset,
    dry: bool = False,
) -> list[Entry]:
    """Drops the oldest records until no more than `total` bytes are kept, and all those kept for more than
    `older_than` seconds; with `orphans` what crashes left. Not the operations that `spared` tells of, which is asked
    if anything is to be dropped. What was dropped, or would be (`dry`)."""
    listed = entries(files, keeping)
    dropped = list(_chosen(listed, total, older_than, orphans))
    needed = spared() if dropped else frozenset()
    dropped = [entry for entry in dropped if entry.operation not in needed]
    if not dry:
        for entry in dropped:
            for path in sorted(entry.paths, reverse=True):  # the log goes first
                files.unlink(path)
        if dropped:
            files.sync_directory(os.path.dirname(dropped[0].paths[0]))
    return dropped


def being_undone(files: FileSystem, history: History) -> frozenset[str]:
    """Operations whose undo is pending: it needs what is kept of them."""
    found = set()
    for row in history.pending():
        if row.command == UNDO:
            try:
                started = fold(read_events(files, row.log)).started
            except Exception as error:
                if not isinstance(error, JournalError) and system_error(error) is None:
                    raise
                continue
            if started is not None:
                found.add(str(started.settings.get(UNDOES)))
    return frozenset(found)


def _chosen(
    listed: list[Entry], total: int | None, older_than: float | None, orphans: bool
) -> Iterator[Entry]:
    left = sum(entry.size for entry in listed)
    present = now()
    for entry in listed:
        aged = older_than is not None and entry.kept < present - older_than
        surplus = total is not None and left > total
        if (orphans and not entry.whole) or (entry.whole and (aged or surplus)):
            left -= entry.size
            yield entry


def _occupied(there: FileStat) -> int:
    """Holes take no space."""
    allocated = getattr(there, "allocated", -1)
    return there.size if allocated < 0 else min(there.size, allocated)


def _move(files: FileSystem, source: str, target: str) -> None:
    """A new name for a file, durable; a copy where that is in another file system."""
    try:
        files.rename(source, target)
    except Exception as error:
        if system_error(error) is None:
            raise
        _copy(files, source, target, None)
        return
    files.give_to(target, os.geteuid(), os.getegid())
    files.sync_directory(os.path.dirname(target))
    files.sync_directory(os.path.dirname(source) or ".")


def _copy(files: FileSystem, source: str, target: str, used: int | None) -> None:
    """Copies the first `used` bytes of a file (None: all); what follows is a hole. Durable but for its name."""
    origin = files.open(source)
    try:
        length = origin.length()
        copy = files.create(target, mode=0o600)
        try:
            _copy_bytes(origin, copy, length if used is None else min(used, length))
            copy.truncate(length)
            copy.sync_all()
        finally:
            copy.close()
    finally:
        origin.close()


def _copy_bytes(origin: File, copy: File, length: int) -> None:
    for at in range(0, length, _CHUNK):
        data = origin.pread(at, min(_CHUNK, length - at))
        if data.strip(b"\0"):
            copy.pwrite(at, data)


def _remove_quietly(files: FileSystem, path: str) -> None:
    try:
        if files.stat(path) is not None:
            files.unlink(path)
    except Exception as error:
        if system_error(error) is None:
            raise
