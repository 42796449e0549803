"""Settling a pending operation: on to the end, back to the beginning, or given up. Each is recorded before it acts.

    resume      check everything | RecoveryStarted | steps in flux taken back | the operation goes on | Completed
    rollback    check everything | RecoveryStarted | all steps taken back | lengths | RolledBack
    abandon     Abandoned: the images stay as they are, their fences come down

Each may be killed and repeated. Once a rollback has begun, only a rollback settles.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.loop import blocking
from safeimg.journal.clock import now
from safeimg.journal.errors import LogDamaged, LogLost
from safeimg.journal.events import Abandoned, Completed, Observed, RecoveryStarted, RolledBack
from safeimg.journal.history import UNDO
from safeimg.journal.owner import current_owner
from safeimg.journal.state import LiveStep, OperationState
from safeimg.ops.errors import Impossible
from safeimg.ops.launch import Environment, go_on
from safeimg.ops.tidy import finish_images
from safeimg.recovery.pending import Pending, clear_unreadable, open_pending
from safeimg.recovery.references import verify_kept, verify_unreferenced
from safeimg.recovery.takeback import raise_fences, shorten, take_back
from safeimg.recovery.verify import verify, verify_sources


async def resume(
    path: str, environment: Environment, *, fenced: bool = False, adopt: bool = False, operation: str = ""
) -> str:
    """Finishes the operation pending on the image at `path`: only `operation` (its id, or how it begins) if given.
    What was done, in one line.

    Raises `Conflict`, `OwnerAlive`, `Impossible`; `OperationPaused` if it is stopped again."""
    pending = await blocking(
        lambda: open_pending(path, environment, fenced=fenced, adopt=adopt, operation=operation)
    )
    with pending:
        done = pending.finish_outcome()
        if done is not None:
            return done
        state = pending.session.state
        if state.rolling_back:
            raise Impossible(
                f"{path}: the {state.declared.command} is being rolled back, which cannot be turned around: "
                f"finish that with 'safeimg rollback {path}'"
            )
        _require_secrets(pending)
        await blocking(_begin, pending, environment.transfer, "resume", adopt, _unsettled)
        await blocking(lambda: take_back(pending.session, pending.files, _unsettled, lengthen=True))
        raise_fences(pending.session, pending.files)
        job = pending.fresh_job()
        if state.steps:  # their fences are up, and what was taken back is on disk
            pending.session.record(Observed(pending.session.observe(job.files)))
        environment.transfer.progress.set_done(state.done)
        await go_on(job, environment, pending.session)
        return f"{state.declared.command} finished"


def _require_secrets(pending: Pending) -> None:
    """To go on, encrypted guest data has to be read and written; checking and taking back need no secret."""
    if pending.session.state.declared.command == UNDO:  # as ciphertext
        return
    for layer in pending.job.layers:
        if layer.cipher is not None and layer.cipher.missing is not None:
            raise Impossible(
                f"{layer.file.path}: the image is encrypted: to go on takes its secret (--object secret,… as in the "
                f"command that was begun); to roll back takes none"
            )


async def rollback(
    path: str, environment: Environment, *, fenced: bool = False, adopt: bool = False, operation: str = ""
) -> str:
    """Takes the operation pending on the image at `path` back: only `operation` (its id, or how it begins) if given.
    What was done, in one line.

    Raises `Conflict`, `OwnerAlive`, `Impossible`."""
    return await blocking(lambda: _rollback(path, environment, fenced, adopt, operation))


def _rollback(path: str, environment: Environment, fenced: bool, adopt: bool, operation: str) -> str:
    with open_pending(path, environment, fenced=fenced, adopt=adopt, operation=operation, bare=_removes) as pending:
        session = pending.session
        state = session.state
        command = state.declared.command
        completed = isinstance(state.outcome, Completed)
        done = pending.finish_outcome()
        if completed:
            raise Impossible(f"{path}: the {command} had been completed before; nothing is pending any more")
        if done is not None:
            return done
        if state.past_return:
            raise Impossible(
                f"{path}: the {command} is past its point of no return: finish it with 'safeimg resume {path}'"
            )
        if _removes(state):
            lost = _remove_created(pending)
        elif state.started is not None and not state.started.undo and state.last_number:
            # Once it has begun, data may lie in place that no step tells of yet.
            raise Impossible(
                f"{path}: the {command} ran without keeping what it overwrote: finish it with 'safeimg resume {path}'"
            )
        else:
            _begin(pending, environment.transfer, "rollback", adopt, _any)
            take_back(session, pending.files, _any, lengthen=False)
            lost = shorten(session, pending.files, pending.used_end)
        session.record(RolledBack(tuple(lost), now()))
        session.sync()
        session.settle({} if _removes(state) else pending.files)
        return "; ".join([f"{command} rolled back", *lost])


def _unsettled(step: LiveStep) -> bool:
    return not step.settled


def _any(step: LiveStep) -> bool:
    return True


def _removes(state: OperationState) -> bool:
    """Rolling back means to remove what was made."""
    return state.started is not None and bool(state.started.created)


def _remove_created(pending: Pending) -> list[str]:
    session = pending.session
    session.record(RecoveryStarted("rollback", current_owner(), now()))
    session.sync()
    started = session.state.started
    lost = []
    for index in started.created if started is not None else ():
        path = session.home if index == 0 else session.path_of(session.state.declared.images[index])
        if index in pending.files:
            session.fs.unlink(path)
            lost.append(f"{path} was removed")
        # Removed by a rollback that was killed, it may come back: then nothing would tell of it any more.
        session.fs.sync_directory(os.path.dirname(path) or ".")
    return lost


def _begin(
    pending: Pending, transfer: Transfer, action: str, adopt: bool, wanted: Callable[[LiveStep], bool]
) -> None:
    """Checks before touching; then records that recovery begins, durably. Copies have times of their own.

    `wanted`: the steps that will be taken back."""
    session, job = pending.session, pending.job
    if not adopt:
        verify_sources(session.state, pending.files)
    verify(session.state, dict(enumerate(job.targets)), session.undo, job.view, transfer)
    if not job.damaged:  # else nobody can tell what its space is used for
        verify_unreferenced(session.state, pending.files)
        verify_kept(session.state, pending.files, wanted)
    session.record(RecoveryStarted(action, current_owner(), now()))
    session.sync()


def abandon(path: str, environment: Environment, *, reason: str = "", operation: str = "") -> str:
    """Gives the operation up, on record: the images stay as the crash left them, without fences."""
    try:
        everything = open_pending(
            path, environment, fenced=True, adopt=True, operation=operation, bare=lambda state: True, undo=False
        )
    except (LogDamaged, LogLost) as problem:
        if operation:
            raise
        return clear_unreadable(path, environment, problem)
    with everything as pending:
        done = pending.finish_outcome()
        if done is not None:
            return done
        session = pending.session
        records = pending.fences()
        session.record(Abandoned(reason, now(), records))
        session.sync()
        finish_images(pending.files, records)
        session.settle(pending.files)
        return f"{session.state.declared.command} given up; the images stay as they are"
