"""The engine: makes the steps of any operation durable, in the order that crash safety asks for.

For step n, with `|` where something is synced before the next thing is written::

    before-images → undo file
    | undo file: an event never names what a power cut can still lose
    StepPrepared(n) → log
    | log
    fresh data (already written by the generator), allocate patches → images
    | images, which covers the in-place data and links of step n-1 as well: StepApplied(n-1) → log, unsynced
    in-place data, link patches → images

so that the steady state is one sync of the journal and one of each image a step. A step that cannot be taken back
begins only when everything before it is solid, and that is on record.

After a failed sync nothing more is written and nothing is recorded as applied: pages may be marked clean though lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from safeimg.drivers.errors import StorageError, SyncFailed
from safeimg.drivers.formats.api import Patch
from safeimg.drivers.transfer.copy import write_moves
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.loop import blocking
from safeimg.drivers.transfer.target import Target
from safeimg.drivers.transfer.view import Content
from safeimg.journal.clock import now
from safeimg.journal.errors import JournalError
from safeimg.journal.events import (
    BeforeRecord,
    LengthRecord,
    Observed,
    Paused,
    PointOfNoReturn,
    StepApplied,
    StepPrepared,
    UnlinkedRecord,
)
from safeimg.ops.errors import OperationPaused
from safeimg.ops.moving import save_before
from safeimg.ops.records import fresh_record, move_record, patch_record
from safeimg.ops.session import Session
from safeimg.ops.sparing import lost_by, spare
from safeimg.ops.steps import Operation, Step


class Engine:
    """Runs one operation's steps on its images.

    `targets`: the images' files by index, home first. `view`: the guest content that moves copy. `session`: the
    journal; None where there is none (`--no-journal`, and the first second of an operation on a new file): then the
    steps are applied in the same order, with their syncs, and cannot be taken back.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        view: Content | None,
        transfer: Transfer,
        session: Session | None,
        *,
        stop: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._targets = targets
        self._files = [target.file for target in targets]
        self._view = view
        self._transfer = transfer
        self._session = session
        self._stop = stop
        self._dirty: set[int] = set()
        self._unconfirmed: StepApplied | None = None
        self._number = 0 if session is None else session.state.last_number
        self._no_return = session is not None and session.state.past_return

    async def run(
        self,
        operation: Operation,
        cursor: Any | None,
        *,
        begin: Callable[[Any, bool], Session | None] = lambda cursor, now: None,
    ) -> None:
        """Applies all steps from `cursor` on; everything is durable when this returns.

        Without a journal, `begin` is asked for one after each step, with the cursor behind it, when all steps so far
        are durable, and whether it is needed now, because the operation is about to stop. Raises `OperationPaused`
        when asked to stop; what stops a step is raised as it is, with its reason in the log."""
        self._transfer.digests = self._session is not None
        try:
            async for step in operation.steps(cursor):
                await self.apply(step)
                reason = self._stop()
                if self._session is None and step.cursor is not None:
                    self._session = await blocking(begin, step.cursor, reason is not None)
                    if self._session is not None:  # its first step comes next: the log knows of none before
                        self._number = self._session.state.last_number
                        self._unconfirmed = None
                        self._transfer.digests = True
                if reason is not None:
                    await blocking(self.pause, reason)
            await blocking(self.barrier)
        except StorageError as error:
            self._note_failure(error)
            raise

    async def apply(self, step: Step) -> None:
        """Makes one step durable up to its links, which the next step's sync or `barrier` covers."""
        self._number += 1
        if step.no_return:
            await blocking(self._pass_no_return, step)
        if self._session is not None:
            await self._prepare(step, self._session)
        await blocking(self._allocate, step)
        self._dirty.update(written.image for written in step.fresh)
        await blocking(self._sync_images)
        digests = await self._move(step)
        self._dirty.update(move.image for move in step.moves)
        for image, changes in step.changes:
            self._patch(image, changes.link)
        self._unconfirmed = StepApplied(self._number, digests)
        if step.name == "fence" or step.truncate:
            await blocking(self._finish_alone, step)

    @property
    def session(self) -> Session | None:
        return self._session

    def barrier(self) -> None:
        """Everything applied so far becomes durable, and is recorded as such."""
        self._sync_images()
        if self._session is not None:
            self._session.sync()

    async def _prepare(self, step: Step, session: Session) -> None:
        """What it takes to take the step back, durable before the step is begun."""
        before: tuple[BeforeRecord, ...] = ()
        if session.undo is not None and step.moves and not step.no_return:
            before = await save_before(self._transfer, step.moves, self._files, session.undo)
            await blocking(session.undo.sync)
        session.record(
            StepPrepared(
                number=self._number,
                name=step.name,
                allocate=tuple(patch_record(i, patch) for i, changes in step.changes for patch in changes.allocate),
                link=tuple(patch_record(i, patch) for i, changes in step.changes for patch in changes.link),
                moves=tuple(
                    move_record(move, encrypted=self._targets[move.image].cipher is not None) for move in step.moves
                ),
                fresh=tuple(fresh_record(written) for written in step.fresh),
                before=before,
                lengths=tuple(self._lengths(step)),
                unlinked=tuple(
                    UnlinkedRecord(i, offset, length)
                    for i, changes in step.changes
                    for offset, length in changes.unlinked
                ),
                cursor=step.cursor,
                done=step.done,
                time=now(),
            )
        )
        await blocking(session.sync)

    async def _move(self, step: Step) -> tuple[bytes, ...]:
        """Writes the step's in-place data; the digests of those moves that do not leave plain zeroes."""
        if not step.moves:
            return ()
        moves = [(self._targets[move.image], move) for move in step.moves]
        # Zeroed space stays allocated: taking the step back must work on a full disk (hazard 22).
        made = await write_moves(self._transfer, self._view, moves, unmap=False)
        return tuple(
            digests
            for digests, (target, move) in zip(made, moves, strict=True)
            if move.source is not None or target.cipher is not None
        )

    def _lengths(self, step: Step) -> list[LengthRecord]:
        records = [
            LengthRecord(image, self._files[image].length(), length) for image, length in self._growth(step).items()
        ]
        records += [LengthRecord(image, self._files[image].length(), length) for image, length in step.truncate]
        return records

    def _growth(self, step: Step) -> dict[int, int]:
        """The lengths, by image, of files that have to be longer than they are before anything is linked or written
        in place: a sector that lies across the end of a file is neither old nor new if its length can be lost."""
        wanted = [(image, changes.length) for image, changes in step.changes if changes.length is not None]
        wanted += [(move.image, move.offset + move.length) for move in step.moves]
        longest: dict[int, int] = {}
        for image, length in wanted:
            if length > max(self._files[image].length(), longest.get(image, 0)):
                longest[image] = length
        return longest

    def _allocate(self, step: Step) -> None:
        for image, length in self._growth(step).items():
            self._files[image].truncate(length)
            self._dirty.add(image)
        for image, changes in step.changes:
            self._patch(image, changes.allocate)

    def _patch(self, image: int, patches: Sequence[Patch]) -> None:
        for patch in patches:
            self._files[image].pwrite(patch.offset, patch.after)
        if patches:
            self._dirty.add(image)

    def _sync_images(self) -> None:
        for image in sorted(self._dirty):
            self._files[image].sync()
        self._dirty.clear()
        if self._unconfirmed is not None and self._session is not None:
            self._session.record(self._unconfirmed)
        self._unconfirmed = None

    def _pass_no_return(self, step: Step) -> None:
        self._sync_images()
        if self._session is not None:
            spare(self._session, self._number, lost_by(step, self._files), dict(enumerate(self._files)))
        if self._session is not None and not self._no_return:
            self._session.record(PointOfNoReturn(self._number, now()))
            self._no_return = True

    def _finish_alone(self, step: Step) -> None:
        """A fence is durable, and how the fenced images look is on record, before anything relies on it; a file is
        cut only when nothing can lead back to what lay there, and counts as cut only then."""
        applied, self._unconfirmed = self._unconfirmed, None
        self._sync_images()
        for image, length in step.truncate:
            self._files[image].truncate(length)
            self._files[image].sync()
        self._unconfirmed = applied
        self._sync_images()
        if step.name == "fence" and self._session is not None:
            self._session.record(Observed(self._session.observe(self._files)))

    def pause(self, reason: str) -> NoReturn:
        """Raises `OperationPaused`, when everything applied so far is durable and the reason on record."""
        self.barrier()
        if self._session is not None:
            self._session.record(Paused(reason, now()))
            self._session.sync()
        raise OperationPaused(reason)

    def _note_failure(self, error: StorageError) -> None:
        """Best effort: the reason in the log. Not after a failed sync, when nothing more is to be written."""
        if self._session is None or isinstance(error, SyncFailed):
            return
        try:
            self._session.record(Paused(str(error), now()))
            self._session.sync()
        except (StorageError, JournalError):  # the log itself is what failed
            pass
