"""Taking a step back: the step protocol mirrored, recorded in the log, and repeatable after a crash at any point.

For each step, newest first::

    TakingBack → log | links and in-place data as they were → images | allocations as they were → images |
    lengths sure | TakenBack → log

Everything is rewritten whether or not it looks right already: what reads back well may not have been synced
(hazard 7), and the old bytes of the log are the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from safeimg.drivers.storage.api import File
from safeimg.journal.events import BeforeRecord, PatchRecord, StepPrepared, TakenBack, TakingBack
from safeimg.journal.state import LiveStep
from safeimg.journal.undo import UndoFile
from safeimg.ops.session import Session


def take_back(
    session: Session, files: Mapping[int, File], wanted: Callable[[LiveStep], bool], *, lengthen: bool
) -> None:
    """Takes back the newest steps for as long as `wanted` says so. Check with `verify` first. `lengthen`: files keep
    the lengths that the steps gave them."""
    while session.state.steps and wanted(session.state.steps[-1]):
        step = session.state.steps[-1].prepared
        session.record(TakingBack(step.number))
        session.sync()
        _restore_patches(files, step.link)
        _restore_data(files, step.before, session.undo)
        _sync(files, step)
        _restore_patches(files, step.allocate)
        _sync(files, step)
        if lengthen:  # before nobody knows of the step any more
            _keep_lengths(files, step)
        session.record(TakenBack(step.number))
    session.sync()


def _keep_lengths(files: Mapping[int, File], step: StepPrepared) -> None:
    """Makes sure of the lengths that a step gave files, which keep them although it is taken back.

    If it was a failed sync that ended the operation, the system takes a length that it lost for clean (hazard 8); it
    is sure again once a file's last byte is written, and where a file was cut, once it is cut anew."""
    for image in sorted({record.image for record in step.lengths if record.after > record.before}):
        end = files[image].length()
        files[image].pwrite(end - 1, files[image].pread(end - 1, 1))
        files[image].sync()
    cut = {record.image: record.after for record in step.lengths if record.after < record.before}
    for image, length in sorted(cut.items()):
        if files[image].length() == length:
            _cut_anew(files[image], length)


def _cut_anew(file: File, length: int) -> None:
    """Of a file that has been cut: to the same length, which would change nothing, and no sync would cover it."""
    file.truncate(length + 1)
    file.truncate(length)
    file.sync()


def raise_fences(session: Session, files: Mapping[int, File]) -> None:
    """Puts fences up again that somebody took down while the operation was pending.

    One that is up is durable and not touched: the image's times tell whether somebody wrote to it. Where a later step
    wrote over a fence, its bytes are what has to be there."""
    steps = session.state.steps
    for number, step in enumerate(steps):
        if step.prepared.name != "fence":
            continue
        for patch in step.prepared.link:
            wanted = bytearray(patch.after)
            for later in steps[number + 1 :]:
                for over in (*later.prepared.allocate, *later.prepared.link):
                    if over.image == patch.image:
                        _lay_over(wanted, patch.offset, over)
            file = files[patch.image]
            if file.pread(patch.offset, len(wanted)) != wanted:
                file.pwrite(patch.offset, wanted)
                file.sync()


def _lay_over(content: bytearray, offset: int, patch: PatchRecord) -> None:
    """What `content`, at `offset` of the file, is after the patch."""
    low, high = max(offset, patch.offset), min(offset + len(content), patch.offset + len(patch.after))
    if low < high:
        content[low - offset : high - offset] = patch.after[low - patch.offset : high - patch.offset]


def _restore_patches(files: Mapping[int, File], patches: Sequence[PatchRecord]) -> None:
    for patch in reversed(patches):
        if patch.before is not None:  # else nobody refers to that space any more
            files[patch.image].pwrite(patch.offset, patch.before)


def _restore_data(files: Mapping[int, File], records: Sequence[BeforeRecord], undo: UndoFile | None) -> None:
    for record in records:
        file = files[record.image]
        if record.hole:
            file.write_zeroes(record.offset, record.length, unmap=True)
        elif record.undo is None:
            file.write_zeroes(record.offset, record.length, unmap=False)
        elif undo is not None:
            file.pwrite(record.offset, undo.read(record.undo, record.length, record.digest))


def _sync(files: Mapping[int, File], step: StepPrepared) -> None:
    touched = {patch.image for patch in (*step.allocate, *step.link)} | {move.image for move in step.moves}
    for image in sorted(touched):
        files[image].sync()


def shorten(session: Session, files: Mapping[int, File], used: Callable[[int, int], int | None]) -> list[str]:
    """Rollback's last change: files get back the length they had when the operation started.

    Only what is ours is cut (hazard 9). `used(image, length)`: where the last byte ends that anything in the image
    refers to, whose file had `length` then; None for a format that cannot tell, such as raw: there a file longer
    than any step made it is somebody else's. Returns a line for each file that keeps its length."""
    started = session.state.started
    kept: list[str] = []
    for image, length in enumerate(started.lengths if started is not None else ()):
        file = files[image]
        longest = session.state.longest.get(image, 0)
        if not session.state.declared.images[image].writes:
            continue
        if file.length() == length < longest and image not in session.state.observed:
            _cut_anew(file, length)  # an earlier rollback may have cut it, whose sync failed
        if file.length() <= length:
            continue
        end = used(image, length)
        if end is None:
            end = length if file.length() <= longest else file.length()
        if end < file.length():
            file.truncate(max(length, end))
            file.sync()
        if end > length:
            kept.append(f"{file.path}: its length stays, somebody else uses what was added to it")
    return kept
