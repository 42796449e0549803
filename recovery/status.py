"""What is pending: on images, in folders, on this host. Reads logs only, and takes no locks."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from safeimg.drivers.errors import DriverError
from safeimg.drivers.storage.api import FileSystem
from safeimg.journal import find, place
from safeimg.journal.errors import JournalError
from safeimg.journal.history import History, PendingRow
from safeimg.journal.log import Log
from safeimg.journal.owner import current_owner, liveness
from safeimg.journal.state import OperationState, fold
from safeimg.ops.launch import ON_CRASH

Condition = Literal["running", "unknown", "interrupted", "paused", "finishing", "unbegun", "orphaned", "unreadable"]


@dataclass(frozen=True, slots=True)
class Status:
    """An operation that is not settled.

    `condition`: *running*: its owner is alive; *unknown*: its owner cannot be seen from here; *interrupted*: its
    owner is dead; *paused*: it stopped of itself, `problem` says why; *finishing*: its outcome is on record and only
    tidying up is left; *unbegun*: it changed nothing; *orphaned*: its home image is not there; *unreadable*: `problem`
    says why, all else is empty."""

    image: str  # the home image's path
    log: str
    condition: Condition
    problem: str = ""
    operation: str = ""
    command: str = ""
    arguments: tuple[str, ...] = ()
    started: float = 0.0  # seconds since the epoch
    done: int = 0  # guest bytes processed
    total: int = 0
    pid: int = 0
    host: str = ""
    images: tuple[str, ...] = ()  # all that take part, as recorded; the home image first
    rolling_back: bool = False
    past_return: bool = False  # nothing but resume settles it any more
    undo: bool = False  # before-images are kept
    removes: bool = False  # rollback removes what was made
    restored: int = 0  # bytes that a rollback writes back
    on_crash: str = "report"  # what `recover` does with it


def status(
    fs: FileSystem,
    history: History,
    paths: Sequence[str] = (),
    *,
    everything: bool = False,
    scan: Sequence[str] = (),
) -> list[Status]:
    """What is pending on the images `paths` (or beside the images in such folders), in the trees `scan`, and with
    `everything` all that this host's index knows of. Entries of the index whose log is gone are dropped from it."""
    found: dict[str, Status] = {}
    for path in paths:
        for each in _at(fs, history, path):
            found.setdefault(each.operation or each.problem or each.log, each)
    for directory in scan:
        for log, what in find.scan(fs, directory):
            image = log.removesuffix(place.SUFFIX)
            pointed = isinstance(what, find.PointerFound)  # to a log that may lie elsewhere
            for each in _of_image(fs, history, image) if pointed else [_judge(fs, image, log, what)]:
                found.setdefault(each.operation or each.problem or each.log, each)
    if everything:
        for each in _indexed(fs, history):
            found.setdefault(each.operation or each.problem or each.log, each)
    return list(found.values())


def _at(fs: FileSystem, history: History, path: str) -> Iterator[Status]:
    there = fs.stat(path)
    if there is not None and stat.S_ISDIR(there.mode):
        for name in fs.list_directory(path):
            if name.endswith(place.SUFFIX):
                yield from _of_image(fs, history, os.path.join(path, name.removesuffix(place.SUFFIX)))
        return
    yield from _of_image(fs, history, path)


def _of_image(fs: FileSystem, history: History, image: str) -> Iterator[Status]:
    try:
        found = find.find(fs, image)
        if isinstance(found, find.PointerFound):
            resolved = find.resolve_pointer(fs, found)
            if resolved.log is not None:
                yield _judge(fs, resolved.home, resolved.log.path, resolved.log)
        elif found is not None:
            yield _judge(fs, image, found.path, found)
        elif (known := find.indexed(fs, history.pending(), image)) is not None:
            yield _judge(fs, known[0], known[1].path, known[1])
    except (JournalError, DriverError) as error:
        yield Status(image, fs.resolve(image) + place.SUFFIX, "unreadable", str(error))


def _indexed(fs: FileSystem, history: History) -> Iterator[Status]:
    for row in history.pending():
        try:
            found = find.look(fs, row.log)
        except (JournalError, DriverError) as error:
            yield Status(row.home, row.log, "unreadable", str(error))
            continue
        if isinstance(found, find.LogFound) and found.operation == row.operation:
            yield _judge(fs, row.home, row.log, found)
        elif not _moved(fs, row):
            history.remove_pending(row.operation)


def _moved(fs: FileSystem, row: PendingRow) -> bool:
    """Whether the log may just be out of reach: its folder is not there (not mounted, say)."""
    return fs.stat(os.path.dirname(row.log) or ".") is None


def _judge(fs: FileSystem, image: str, log: str, found: find.Found | JournalError) -> Status:
    if isinstance(found, JournalError):
        return Status(image, log, "unreadable", str(found))
    if not isinstance(found, find.LogFound):
        return Status(image, log, "unbegun")
    try:
        described = _described(image, log, found, _state(fs, log, image))
        if fs.stat(image) is None and described.condition in ("interrupted", "paused", "unknown"):
            return replace(described, condition="orphaned")
        return described
    except (JournalError, DriverError) as error:
        return Status(image, log, "unreadable", str(error))


def _state(fs: FileSystem, log: str, image: str) -> OperationState:
    there = fs.stat(image)
    opened = Log.open(fs, log, image_owner=None if there is None else there.uid)
    try:
        return fold(opened.replay())
    finally:
        opened.close()


def _described(image: str, log: str, found: find.LogFound, state: OperationState) -> Status:
    declared, begun = state.declared, state.started
    owner = found.owner
    # Who asks about its own operation is at it no more.
    alive = "dead" if owner == current_owner() else liveness(owner)
    condition: Condition
    if alive == "alive":
        condition = "running"
    elif state.outcome is not None:
        condition = "finishing"
    elif alive == "unknown":
        condition = "unknown"
    elif begun is None:
        condition = "unbegun"
    else:
        condition = "interrupted" if state.paused is None else "paused"
    return Status(
        image,
        log,
        condition,
        problem=state.paused or "" if condition == "paused" else "",
        operation=declared.operation,
        command=declared.command,
        arguments=declared.arguments,
        started=declared.time,
        done=state.done,
        total=0 if begun is None else begun.total,
        pid=owner.pid,
        host=owner.host,
        images=tuple(_named(image, [record.path for record in declared.images])),
        rolling_back=state.rolling_back,
        past_return=state.past_return,
        undo=begun is not None and begun.undo,
        removes=begun is not None and bool(begun.created),
        restored=sum(before.length for step in state.steps for before in step.prepared.before),
        on_crash="report" if begun is None else str(begun.settings.get(ON_CRASH, "report")),
    )


def _named(image: str, recorded: Iterable[str]) -> Iterator[str]:
    """Where the images are: the home image as it was asked about, the others from there."""
    folder = os.path.dirname(image)
    for index, path in enumerate(recorded):
        yield image if index == 0 else os.path.normpath(os.path.join(folder, path))
