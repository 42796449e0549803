"""Finding what is pending on an image: its log, or the pointer to the log it takes part in."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from safeimg.drivers.records import NamedTuple
from safeimg.journal import frames, place
from safeimg.journal.errors import JournalError, LogLost, LogVoid
from safeimg.journal.events import (
    Abandoned,
    Completed,
    Declared,
    Event,
    Identity,
    Owner,
    RecoveryStarted,
    RolledBack,
    Started,
)
from safeimg.journal.files import FileStat, FileSystem, remove_durably, system_error
from safeimg.journal.history import PendingRow
from safeimg.journal.identity import identify_at, same_file
from safeimg.journal.log import read_log, remove_void
from safeimg.journal.owner import current_owner, liveness
from safeimg.journal.pointer import NEW_SUFFIX, Pointer, read_pointer
from safeimg.journal.undo import SUFFIX as UNDO_SUFFIX


class LogFound(NamedTuple):
    """A log, and what its events come to."""

    path: str
    declared: Declared
    started: bool
    outcome: Completed | RolledBack | Abandoned | None
    owner: Owner  # who was at work last

    @property
    def operation(self) -> str:
        return self.declared.operation


class PointerFound(NamedTuple):
    path: str
    pointer: Pointer

    @property
    def operation(self) -> str:
        return self.pointer.operation


class VoidFound(NamedTuple):
    """A log or pointer file in which nothing was ever durable: see `clear_void`."""

    path: str


Found = LogFound | PointerFound | VoidFound


class Resolved(NamedTuple):
    """What a pointer comes to.

    - pending: the operation has to be settled, through its home.
    - unstarted: it was declared, by a process that is dead, and never began: only tidying up is left.
    - decided: completed, rolled back or abandoned; only tidying up is left, through its home (a fence may
    still be
      up). The pointer is void otherwise.
    - settled: the home image is at another operation already, or the pointer has just been removed: it is void.
    """

    kind: Literal["pending", "unstarted", "decided", "settled"]
    home: str  # path of the home image
    log: LogFound | None


def look(files: FileSystem, path: str, *, image_owner: int | None = None) -> Found | None:
    """What stands at `path`, where a log or pointer may be. Raises `LogForeign`, `LogDamaged`."""
    if files.stat(path) is None:  # of a pointer that was being written, either name may be lost
        return None if files.stat(path + NEW_SUFFIX) is None else VoidFound(path)
    pointer = read_pointer(files, path, image_owner=image_owner)
    if pointer is not None:
        return PointerFound(path, pointer)
    summary = _Summary()
    try:
        read_log(files, path, summary, image_owner=image_owner)
    except LogVoid:
        return VoidFound(path)
    return summary.found(path)


def find(files: FileSystem, image: str, *, explicit: str | None = None) -> Found | None:
    """What is pending on `image`: beside it, in the state directory, or beside a name that it had (hazard
    20).

    None means that nothing is, or that the image is out of reach: it cannot be opened, either. `VoidFound` only if
    there is nothing else. Raises `LogForeign`, `LogDamaged`."""
    try:
        there = files.stat(image)
    except Exception as error:
        if system_error(error) == errno.EACCES:
            return None
        raise
    owner = None if there is None else there.uid
    void: Found | None = None
    for path in place.candidates(files, image, explicit=explicit):
        found = look(files, path, image_owner=owner)
        if found is not None and not isinstance(found, VoidFound):
            return found
        void = void or found
    renamed = None if there is None else _under_another_name(files, image, there)
    return renamed or void


def indexed(files: FileSystem, pending: Iterable[PendingRow], image: str) -> tuple[str, LogFound] | None:
    """What is pending on a file that `image` is another name of, whose folder holds no log: a hard link, or a file that
    is mounted there. The home image's name, and the log; None if this host's index, `pending`, knows of none.

    Raises `LogForeign`, `LogDamaged`."""
    there = files.stat(image)
    if there is None:
        return None
    for row in pending:
        home = files.stat(row.home)
        if home is not None and (home.device, home.inode) == (there.device, there.inode):
            found = look(files, row.log, image_owner=there.uid)
            if isinstance(found, LogFound) and found.operation == row.operation:
                return row.home, found
    return None


def clear_void(files: FileSystem, void: VoidFound, *, image_owner: int | None = None) -> None:
    """Removes what an operation that never began left. Raises `LogBusy` if it is just beginning."""
    if files.stat(void.path) is not None:
        remove_void(files, void.path, image_owner=image_owner)
    if files.stat(void.path) is None:
        remove_durably(files, void.path + UNDO_SUFFIX)
        if files.stat(void.path + NEW_SUFFIX) is not None:
            remove_durably(files, void.path + NEW_SUFFIX)


def resolve_pointer(
    files: FileSystem, found: PointerFound, *, alive: Callable[[Owner], str] = liveness
) -> Resolved:
    """What the pointer's operation has come to. `alive` tells whether an owner still runs.

    Raises `LogLost` if the log or the home image cannot be found: nobody knows then, and the answer must not be
    "nothing". No crash leaves a pointer without its log, which is made before it and removed behind it.
    """
    pointer = found.pointer
    folder = os.path.dirname(found.path)
    home = os.path.normpath(os.path.join(folder, pointer.home_path))
    log = _log_of(files, pointer, folder, home)
    if log is not None:
        home = _home_now(files, pointer, home, log)
        if log.outcome is not None:
            return Resolved("decided", home, log)
        # A declared operation whose owner lives is about to start.
        if log.started or alive(log.owner) != "dead":
            return Resolved("pending", home, log)
        return Resolved("unstarted", home, log)
    now = _identity(files, home)
    if now is None or not same_file(pointer.home, now):
        raise LogLost(
            found.path, f"takes part in operation {pointer.operation} of {home}, which is not there any "
            "more; put it back, or give the operation up with `safeimg abandon`"
        )
    if pointer.log is not None and pointer.machine != current_owner().machine:
        raise LogLost(
            found.path, f"takes part in operation {pointer.operation}, whose log is {pointer.log} of "
            "another machine; settle it there, or give it up with `safeimg abandon`"
        )
    if files.stat(found.path) is None or _is_at_another(files, pointer, home):
        return Resolved("settled", home, None)
    missing = place.beside(files, home) if pointer.log is None else os.path.join(folder, pointer.log)
    raise LogLost(
        found.path, f"takes part in operation {pointer.operation}, whose log {os.path.normpath(missing)} is not "
        "there (is its disk mounted?); put it back, or give the operation up with `safeimg abandon`"
    )


def follow(files: FileSystem, found: Found | None) -> LogFound | None:
    """The log that this is or leads to. Raises as `resolve_pointer`."""
    if isinstance(found, PointerFound):
        return resolve_pointer(files, found).log
    return found if isinstance(found, LogFound) else None


def scan(files: FileSystem, directory: str) -> Iterator[tuple[str, Found | JournalError]]:
    """Every log and pointer in a tree, links not followed, with what is wrong where it cannot be read.

    Folders that cannot be listed are left out."""
    pending = [files.resolve(directory)]
    while pending:
        folder = pending.pop()
        for name in _names(files, folder):
            path = os.path.join(folder, name)
            kind = _kind(files, path)
            if kind == stat.S_IFDIR:
                pending.append(path)
            elif kind == stat.S_IFREG and name.endswith(place.SUFFIX):
                try:
                    found = look(files, path, image_owner=_owner_beside(files, path))
                except JournalError as error:
                    yield path, error
                    continue
                except Exception as error:
                    if system_error(error) is None:
                        raise
                    yield path, JournalError(" ".join(str(error).split()))
                    continue
                if found is not None:
                    yield path, found


class _Summary:
    """What a log's events come to (`log.Reader`)."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._declared: Declared | None = None
        self._owner: Owner | None = None
        self._started = False
        self._outcome: Completed | RolledBack | Abandoned | None = None

    def append(self, event: Event) -> None:
        if isinstance(event, Declared):
            self._declared, self._owner = event, event.owner
        elif isinstance(event, Started):
            self._started = True
        elif isinstance(event, RecoveryStarted):
            self._owner = event.owner
        elif isinstance(event, Completed | RolledBack | Abandoned):
            self._outcome = event

    def found(self, path: str) -> LogFound:
        assert self._declared is not None and self._owner is not None  # a log begins with it
        return LogFound(path, self._declared, self._started, self._outcome, self._owner)


def _log_of(files: FileSystem, pointer: Pointer, folder: str, home: str) -> LogFound | None:
    """The log of the pointer's operation, wherever it may be."""
    there = files.stat(home)
    explicit = None if pointer.log is None else os.path.normpath(os.path.join(folder, pointer.log))
    for path in place.candidates(files, home, explicit=explicit):
        # What cannot be read here must not pass for settled: errors propagate.
        found = look(files, path, image_owner=None if there is None else there.uid)
        if isinstance(found, LogFound) and found.operation == pointer.operation:
            return found
    # The home image may have been renamed, its log left where it was or taken along.
    beside_home = os.path.dirname(home)
    for name in _names(files, beside_home):
        path = os.path.join(beside_home, name)
        if name.endswith(place.SUFFIX) and _operation_at(files, path) == pointer.operation:
            found = look(files, path, image_owner=_owner_beside(files, path))
            if isinstance(found, LogFound) and found.operation == pointer.operation:
                return found
    return None


def _is_at_another(files: FileSystem, pointer: Pointer, home: str) -> bool:
    """Whether another operation is pending on the home image, which none can be before this one is settled."""
    there = files.stat(home)
    for path in place.candidates(files, home):
        found = look(files, path, image_owner=None if there is None else there.uid)
        if isinstance(found, LogFound | PointerFound) and found.operation != pointer.operation:
            return True
    return False


def _home_now(files: FileSystem, pointer: Pointer, home: str, log: LogFound) -> str:
    """Where the home image lies now: it may have been renamed, with its log or without."""
    folder = os.path.dirname(home)
    near = (os.path.join(folder, name) for name in _names(files, folder))
    for path in (home, log.path.removesuffix(place.SUFFIX), *near):
        there = files.stat(path)
        if there is not None and there.inode == pointer.home.inode:
            now = _identity(files, path)
            if now is not None and same_file(pointer.home, now):
                return path
    return home  # gone, or a copy


def _operation_at(files: FileSystem, path: str) -> str | None:
    """The operation that the header of the log at `path` names; nothing else is read."""
    there = files.stat(path)
    if there is None or there.is_device or stat.S_IFMT(there.mode) not in (0, stat.S_IFREG):
        return None
    try:
        file = files.open(path)
    except Exception as error:
        if system_error(error) is None:
            raise
        return None
    try:
        return frames.read_header(file).operation
    except JournalError:
        return None
    finally:
        file.close()


def _under_another_name(files: FileSystem, image: str, there: FileStat) -> Found | None:
    """A log or pointer in the image's folder that says it is this image's, beside another name."""
    resolved = files.resolve(image)
    folder, own = os.path.split(resolved + place.SUFFIX)
    for name in _names(files, folder):
        if name == own or not name.endswith(place.SUFFIX):
            continue
        try:
            found = look(files, os.path.join(folder, name), image_owner=there.uid)
        except JournalError:
            continue  # another image's trouble
        except Exception as error:
            if system_error(error) is None:
                raise
            continue
        if isinstance(found, LogFound):
            claimed = found.declared.images[0].identity
        elif isinstance(found, PointerFound):
            claimed = found.pointer.participant
        else:
            continue
        if claimed.inode == there.inode:
            now = _identity(files, image)
            if now is not None and same_file(claimed, now):
                return found
    return None


def _identity(files: FileSystem, path: str) -> Identity | None:
    if files.stat(path) is None:
        return None
    try:
        return identify_at(files, path)
    except Exception as error:
        if system_error(error) is None:
            raise
        return None


def _owner_beside(files: FileSystem, path: str) -> int | None:
    """The owner of the image that the log at `path` lies beside."""
    found = files.stat(path.removesuffix(place.SUFFIX))
    return None if found is None else found.uid


def _names(files: FileSystem, folder: str) -> list[str]:
    try:
        return sorted(files.list_directory(folder))
    except Exception as error:
        if system_error(error) is None:
            raise
        return []


def _kind(files: FileSystem, path: str) -> int:
    """S_IFDIR, S_IFREG, … of a name that is no link; 0 for links and what is gone."""
    if files.resolve(path) != path:
        return 0
    found = files.stat(path)
    return 0 if found is None else stat.S_IFMT(found.mode) or stat.S_IFREG
