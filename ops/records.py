"""Between the drivers' words for a step and the journal's, which do not know each other."""

from __future__ import annotations

from safeimg.drivers.formats.api import Patch
from safeimg.journal.events import FreshRecord, MoveRecord, PatchRecord
from safeimg.ops.steps import Move, Written


def patch_record(image: int, patch: Patch) -> PatchRecord:
    return PatchRecord(image, patch.offset, patch.before, patch.after)


def move_record(move: Move, *, encrypted: bool) -> MoveRecord:
    return MoveRecord(move.image, move.offset, move.length, move.source, move.guest if encrypted else None)


def fresh_record(written: Written) -> FreshRecord:
    return FreshRecord(written.image, written.offset, written.length, written.digests, written.live)
