"""The end of an operation: its outcome is recorded first; what remains can be repeated after a crash at any point.

    Completed → log | fences down → images | discards | looks, history, kept for undo | pointers, undo file, log removed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safeimg.drivers.formats.api import Patch
from safeimg.drivers.storage.api import File
from safeimg.journal.clock import now
from safeimg.journal.events import Completed, FinishRecord
from safeimg.ops.session import Session
from safeimg.ops.sparing import spare_end


def complete(
    session: Session | None,
    files: Mapping[int, File],
    finish: Sequence[tuple[int, Patch]],
    discards: Sequence[tuple[int, int, int]],
) -> None:
    """All steps are durable: records the outcome, takes the fences down and settles."""
    records = [FinishRecord(image, patch.offset, patch.before or b"", patch.after) for image, patch in finish]
    if session is not None:
        spare_end(session, files, discards)
        session.record(Completed(tuple(records), now()))
        session.sync()
    finish_images(files, records)
    for image, offset, length in discards:
        files[image].discard(offset, length)
    if session is not None:
        session.settle(files)


def finish_images(files: Mapping[int, File], records: Sequence[FinishRecord]) -> None:
    """Makes the patches that follow an outcome, where they are not made yet.

    Bytes that are neither before nor after are left alone: the image has been used since its fence came down."""
    for record in records:
        if record.image not in files:
            continue
        if files[record.image].pread(record.offset, len(record.before)) in (record.before, record.after):
            files[record.image].pwrite(record.offset, record.after)
    for image in {record.image for record in records}.intersection(files):
        files[image].sync()
