"""undo: takes a completed operation back while nobody changed its images since.

Checked before anything is written, as ever: each image that the operation wrote to is the file that it left, untouched
(device, inode, size, both times); every range that it wrote holds what it wrote; nobody refers to the space that it
took; what was kept is whole. Space that it freed need not hold anything any more (hazard 23): what was there is kept.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

from safeimg.drivers.storage.api import File, FileSystem
from safeimg.drivers.storage.patched import PatchedFile
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.loop import blocking
from safeimg.drivers.transfer.target import Target
from safeimg.journal import kept
from safeimg.journal.chain import EventRow, OperationRow
from safeimg.journal.errors import JournalError
from safeimg.journal.events import Completed, Identity, PatchRecord, StepPrepared
from safeimg.journal.history import UNDO
from safeimg.journal.identity import identify_at, untouched
from safeimg.journal.kept import Record
from safeimg.journal.state import LiveStep
from safeimg.journal.story import KINDS, look_after, lost, undone
from safeimg.ops.errors import Changed, Conflict, Impossible
from safeimg.ops.launch import Environment, Job, launch
from safeimg.ops.session import refuse_pending_on
from safeimg.ops.sparing import undo_problem
from safeimg.ops.undo import KeptSource, new_job, open_images
from safeimg.recovery.references import verify_unreferenced
from safeimg.recovery.verify import verify

_MATTERS = ("old backing",)  # roles of images that are only read, and that the image shows again after an undo


@dataclass(frozen=True, slots=True)
class Undoable:
    """An operation that can be taken back, as far as its record tells."""

    row: OperationRow
    home: str  # path of the home image
    record: Record


async def undo(path: str, environment: Environment, operation: str = "") -> str:
    """Takes back a completed operation on the image at `path`: the newest that was not taken back yet, or the one
    whose id begins with `operation`. What was done, in one line.

    It is journaled even where the environment says that nothing is. Raises `Impossible`, `Conflict`,
    `SomethingPending`, `OperationPaused`, and what opening images raises."""
    if environment.journal == "off":
        environment = environment._replace(journal="auto")
    found = await blocking(_find, path, environment, operation)
    try:
        home, state = found.home, found.record.state
        await blocking(_check_looks, environment, found)
        job = new_job(open_images(environment.fs, home, state, "writeback"), found.record)
        try:
            await blocking(_check_looks, environment, found)  # again, now that others are locked out
            await blocking(_check_content, found.record, job, environment.transfer)
            await launch(job, environment)
        finally:
            job.close()
    finally:
        found.record.close()
    return f"{found.row.command} ({found.row.operation[:12]}) undone"


def _find(path: str, environment: Environment, operation: str) -> Undoable:
    fs, history = environment.fs, environment.history.at(path)
    refuse_pending_on(fs, path)
    identity = _identity(fs, path)
    if identity is None:
        raise Impossible(f"{path}: No such file or directory")
    back = undone(history.chain(identity, KINDS))
    row = _choose(path, history.log(identity), back, operation.lower())
    if row.operation in back:
        raise Impossible(f"{path}: the {row.command} was undone already, by {back[row.operation][:12]}")
    if row.outcome != "completed":
        raise Impossible(f"{path}: the {row.command} was {row.outcome}: there is nothing to undo")
    where = None if environment.keeping is None else kept.find(fs, environment.keeping, row.operation)
    if where is None:
        raise Impossible(f"{path}: {_why_not_kept(history.show(identity, row.operation), row)}")
    record = kept.load(fs, where)
    try:
        problem = undo_problem(record.state)
        if problem is None and (record.state.settled is None or not isinstance(record.state.outcome, Completed)):
            problem = f"what was kept of the {row.command} does not tell how it left its images"
        if problem is not None:
            raise Impossible(f"{path}: {problem}")
        home = _home(fs, path, row, record)
        _verify_kept(record)
        return Undoable(row, home, record)
    except BaseException:
        record.close()
        raise


def _choose(
    path: str, rows: Sequence[OperationRow], back: dict[str, str], operation: str
) -> OperationRow:
    if operation:
        chosen = [row for row in rows if row.operation.startswith(operation)]
        if len(chosen) != 1:
            many = "no operation" if not chosen else f"{len(chosen)} operations"
            raise Impossible(f"{path}: {many} on record whose id begins with '{operation}' (see 'safeimg log')")
        return chosen[0]
    for row in reversed(rows):
        if row.outcome == "completed" and row.command != UNDO and row.operation not in back:
            return row
    raise Impossible(f"{path}: there is no completed operation on record that could be undone")


def _why_not_kept(events: Sequence[EventRow], row: OperationRow) -> str:
    """Why there is no record of an operation: what was noted when it ended, or what became of the record since."""
    return lost(events) or (
        f"what it takes to undo the {row.command} was dropped since it was kept, or is on another host"
    )


def _identity(fs: FileSystem, path: str) -> Identity | None:
    return None if fs.stat(path) is None else identify_at(fs, path)


def _home(fs: FileSystem, path: str, row: OperationRow, record: Record) -> str:
    """Where the home image is: it may be another one than the image that was asked about."""
    wanted = dict(record.state.settled.identities if record.state.settled is not None else ()).get(0)
    for candidate in (path, row.home):
        now = _identity(fs, candidate)
        if wanted is not None and now is not None and now.inode == wanted.inode:
            return candidate
    raise Impossible(f"{row.home}: the image that the {row.command} began with is not there; name it where it is now")


def _check_looks(environment: Environment, found: Undoable) -> None:
    """Raises `Conflict` unless the images are the files that the operation left, untouched since."""
    fs, operation = environment.fs, found.row.operation
    state = found.record.state
    looks = dict(state.settled.identities) if state.settled is not None else {}
    folder = os.path.dirname(fs.resolve(found.home))
    for index, image in enumerate(state.declared.images):
        if not image.writes and image.role not in _MATTERS:
            continue
        path = found.home if index == 0 else os.path.normpath(os.path.join(folder, image.path))
        if image.writes:
            refuse_pending_on(fs, path)
        now = _identity(fs, path)
        if now is None:
            raise Impossible(f"{path}: the {found.row.command} also concerned this image, which is not there any more")
        history = environment.history.at(path)
        look = look_after(history.chain(now, KINDS), operation) or looks.get(index)
        if look is None or not untouched(look, now):
            raise Conflict(
                f"{path}: was changed since the {found.row.command} ({operation[:12]}), so that cannot be undone any "
                "more; nothing was written" + _later(history.log(now), history.chain(now, KINDS), operation)
            )


def _later(rows: Sequence[OperationRow], events: Sequence[EventRow], operation: str) -> str:
    """What has to be undone before, where it is safeimg that changed the image."""
    back = undone(events)
    after = [row.operation for row in rows].index(operation) + 1 if operation in {row.operation for row in rows} else 0
    later = [row for row in rows[after:] if row.outcome == "completed" and row.operation not in back]
    later = [row for row in later if row.command != UNDO]
    return "".join(f" (later: {row.command} {row.operation[:12]})" for row in later[-1:]) if after else ""


def _verify_kept(record: Record) -> None:
    """Raises `LogDamaged` unless everything that was kept is what it was."""
    for each in record.before_images:
        if each.undo is not None:
            if record.undo is None:
                raise JournalError(f"{record.path}: its before-images are gone")
            record.undo.read(each.undo, each.length, each.digest)


class _Restored(PatchedFile):
    """A file with the content that the operation gave up at its end, or cut off, where it was."""

    def __init__(self, file: File, record: Record, image: int) -> None:
        super().__init__(file, ())
        state = record.state
        at_end = state.given_up.get(state.last_number + 1, ())
        cut = [each for each in record.before_images if each.image == image and each.offset >= file.length()]
        self._records = sorted({*(each for each in at_end if each.image == image), *cut})
        self._offsets = [each.offset for each in self._records]
        self._source = KeptSource(record.undo, self._records)

    def length(self) -> int:
        ends = [each.offset + each.length for each in self._records[-1:]]
        return max([super().length(), *ends])

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        size = super().pread_into(offset, buffer)
        first = max(bisect_right(self._offsets, offset) - 1, 0)
        for each in self._records[first : bisect_right(self._offsets, offset + size)]:
            low, high = max(each.offset, offset), min(each.offset + each.length, offset + size)
            if low < high:
                piece = buffer[low - offset : high - offset]
                if each.undo is None:
                    piece[:] = bytes(len(piece))
                else:
                    self._source.read_into(each.undo + low - each.offset, piece)
        return size


def _finish(record: Record) -> LiveStep:
    """The patches that followed the outcome, as a step."""
    outcome = record.state.outcome
    patches = tuple(PatchRecord(*each) for each in outcome.finish) if isinstance(outcome, Completed) else ()
    return LiveStep(StepPrepared(record.state.last_number + 1, "finish", link=patches), applied=True)


def _check_content(record: Record, job: Job, transfer: Transfer) -> None:
    """Raises `Conflict` unless every range that the operation wrote holds what it wrote."""
    state = copy(record.state)
    state.steps = [*record.state.steps, _finish(record)]
    written = [index for index, image in enumerate(state.declared.images) if image.writes]
    restored: dict[int, File] = {
        index: _Restored(file, record, index) for index, file in zip(written, job.files, strict=True)
    }
    try:
        verify(state, {index: Target(file) for index, file in restored.items()}, record.undo, None, transfer)
        if not job.damaged:
            verify_unreferenced(state, restored)
    except Changed as changed:
        command = state.declared.command
        raise Conflict(
            f"{changed.found} since the {command}, so that cannot be undone any more; nothing was written"
        ) from None
