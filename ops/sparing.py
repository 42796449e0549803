"""What undo needs of a completed operation beyond what rollback does: the content that it gives up for good.

A pending operation frees nothing that rollback needs, and takes nothing back behind its point of no return. Undo comes
later: by then freed space was given back to the file system, files were cut, and what lay in free space was written
over. If that content is small enough (`Keeping.each`), it goes to the undo file too before it is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safeimg.drivers.errors import StorageError, SyncFailed
from safeimg.drivers.storage.api import File
from safeimg.drivers.transfer.zero import is_zero
from safeimg.journal.errors import JournalError
from safeimg.journal.events import BeforeRecord, GivenUp
from safeimg.journal.history import UNDO
from safeimg.journal.state import OperationState
from safeimg.journal.undo import UndoFile
from safeimg.ops.session import Session
from safeimg.ops.steps import Step

Range = tuple[int, int, int]  # image, offset, length

_CHUNK = 1 << 20


def lost_by(step: Step, files: Sequence[File]) -> list[Range] | None:
    """The ranges whose content a step behind the point of no return gives up, beside what its patches have the old
    bytes of. None for what is meant to be lost: key material that is erased."""
    if step.moves or step.fresh:
        return None
    lost = [(image, length, files[image].length() - length) for image, length in step.truncate]
    for image, changes in step.changes:
        for patch in (*changes.allocate, *changes.link):
            if patch.before is None:
                lost.append((image, patch.offset, len(patch.after)))
    return lost


def spare(session: Session, number: int, ranges: Sequence[Range] | None, files: Mapping[int, File]) -> None:
    """Keeps the content of `ranges`, which step `number` gives up, if it may and can be kept; else the operation
    cannot be undone. Durable with the next sync of the log."""
    if session.lost or session.keeping is None:
        return
    if session.undo is None or ranges is None:
        session.lost = undo_problem(session.state) or f"the {session.command} erased what it replaced"
        return
    room = session.keeping.each - session.undo.end - session.log.used
    pieces: list[tuple[int, int, int, bool]] = []
    for image, offset, length in _joined(ranges):
        for start, size, is_data, _ in files[image].spans(offset, length):
            pieces.append((image, start, size, is_data))
            room -= size if is_data else 0
            if room < 0:
                session.lost = too_much(session.command)
                return
    try:
        records = tuple(record for piece in pieces for record in _saved(session.undo, files[piece[0]], *piece))
        if records:
            session.undo.sync()
        session.record(GivenUp(number, records))
    except SyncFailed:
        raise
    except (StorageError, JournalError):  # the operation goes on
        session.lost = f"there was no space to keep what undoing the {session.command} takes"


def spare_end(session: Session, files: Mapping[int, File], discards: Sequence[Range]) -> None:
    """Keeps the content of what is discarded once the operation is completed, and decides whether it can be undone."""
    session.lost = session.lost or undo_problem(session.state) or ""
    if not session.lost and any(file.writable and file.stat().is_device for file in files.values()):
        session.lost = "a block device does not tell whether it was changed since"
    if discards:
        spare(session, session.state.last_number + 1, discards, files)
    if session.lost or session.keeping is None or session.undo is None:
        return
    if session.undo.end + session.log.used > session.keeping.each:
        session.lost = too_much(session.command)


def too_much(command: str) -> str:
    return f"what undoing the {command} takes was too much to keep (--keep-undo)"


def undo_problem(state: OperationState) -> str | None:
    """Why an operation, completed or about to be, cannot be undone; None if it can, given its log and undo file."""
    command, started = state.declared.command, state.started
    if started is None:
        return f"the {command} changed nothing"
    if command == UNDO:
        return "an undo is not undone: give the command that was taken back again"
    if started.created:
        return f"the {command} made the image, and what the file may have held before is lost; remove it instead"
    if _changes_keys(state):
        return f"the {command} changed key slots, and no key material is kept"
    if not started.undo:
        return f"the {command} ran without keeping what it overwrote"
    behind = {step.prepared.number for step in state.steps if step.prepared.number >= (state.no_return or 1 << 63)}
    if behind - state.given_up.keys():
        return f"the {command} is past its point of no return, and what it gave up there was not kept"
    return None


def _changes_keys(state: OperationState) -> bool:
    """Whether passwords of an encrypted image may have been changed."""
    settings = {} if state.started is None else state.started.settings
    values = settings.get("values")
    if state.declared.command != "amend" or not isinstance(values, dict):
        return False
    return settings.get("format") == "luks" or any(str(name).startswith("encrypt.") for name in values)


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """Sorted, with what overlaps or touches as one."""
    joined: list[Range] = []
    for image, offset, length in sorted(each for each in ranges if each[2] > 0):
        if joined and joined[-1][0] == image and offset <= joined[-1][1] + joined[-1][2]:
            last = joined[-1]
            joined[-1] = (image, last[1], max(last[1] + last[2], offset + length) - last[1])
        else:
            joined.append((image, offset, length))
    return joined


def _saved(
    undo: UndoFile, file: File, image: int, offset: int, length: int, is_data: bool
) -> list[BeforeRecord]:
    """The content of a run of data, or of a hole, put into the undo file."""
    if not is_data:
        return [BeforeRecord(image, offset, length, None, True, b"")]
    records = []
    for at in range(offset, offset + length, _CHUNK):
        data = file.pread(at, min(_CHUNK, offset + length - at))
        if is_zero(memoryview(data)):
            records.append(BeforeRecord(image, at, len(data), None, False, b""))
        else:
            kept, digest = undo.append(data)
            records.append(BeforeRecord(image, at, len(data), kept, False, digest))
    return records
