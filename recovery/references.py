"""Space that an operation took, seen from the image as it would be without the operation: nobody may refer to it.

Formats without a fence (qcow2 version 2) let a guest run on a half-changed image, and QEMU may have allocated the
very clusters that a step had prepared (hazard 2): every patched sector can then look right. So before anything is
taken back the image is opened with the operation's links undone in memory, and its metadata scanned once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.storage.api import File
from safeimg.drivers.storage.patched import PatchedFile
from safeimg.journal.state import LiveStep, OperationState
from safeimg.ops.errors import Changed, Conflict


def verify_unreferenced(state: OperationState, files: Mapping[int, File]) -> None:
    """Raises `Conflict` if somebody else uses space that the operation's steps took. Writes nothing."""
    if state.past_return:  # what the links led to may be gone, and only going on is left
        return
    for image, record in enumerate(state.declared.images):
        taken = [piece for step in state.steps for piece in _taken(step, image)]
        if not record.writes or not taken:
            continue
        undone = PatchedFile(files[image], _links_undone(state.steps, image))
        driver = lookup(record.format)
        for offset, length in driver.referenced(driver.open(undone, repair=True), taken):
            raise Changed(
                f"{files[image].path}: somebody else uses {length} bytes at offset {offset:#x}",
                f"that the pending {state.declared.command} had prepared; nothing was written. Give the operation up "
                "with 'safeimg abandon'",
            )


def verify_kept(state: OperationState, files: Mapping[int, File], wanted: Callable[[LiveStep], bool]) -> None:
    """Raises `Conflict` if space that the newest `wanted` steps had unlinked was freed by somebody: they cannot be
    taken back then. `qemu-img check -r` takes that space for leaks and discards it (hazard 19)."""
    steps = list(state.steps)
    newest: list[LiveStep] = []
    while steps and wanted(steps[-1]):
        newest.insert(0, steps.pop())
    for image, record in enumerate(state.declared.images):
        ranges = [
            (piece.offset, piece.length)
            for step in newest
            for piece in step.prepared.unlinked
            if piece.image == image
        ]
        if not ranges or any(step.prepared.name == "release" for step in newest):
            continue
        driver = lookup(record.format)
        undone = PatchedFile(files[image], _links_undone(newest, image))
        freed = driver.undercounted(
            driver.open(files[image], repair=True), driver.open(undone, repair=True), ranges
        )
        for offset, length in freed:
            raise Conflict(
                f"{files[image].path}: {length} bytes at offset {offset:#x}, which the {state.declared.command} had "
                f"replaced, were freed while it was pending (by 'check -r'?) and may be gone; nothing was written. "
                f"Finish it with 'safeimg resume' if that is possible, or give it up with 'safeimg abandon'"
            )


def _taken(step: LiveStep, image: int) -> list[tuple[int, int]]:
    """Host ranges that nobody referred to before the step."""
    fresh = [
        (record.offset, record.length)
        for record in step.prepared.fresh
        if record.image == image and not record.live
    ]
    tables = [
        (patch.offset, len(patch.after))
        for patch in step.prepared.allocate
        if patch.image == image and patch.before is None
    ]
    return fresh + tables


def _links_undone(steps: Sequence[LiveStep], image: int) -> list[tuple[int, bytes]]:
    return [
        (patch.offset, patch.before)
        for step in reversed(steps)
        for patch in (*reversed(step.prepared.link), *reversed(step.prepared.allocate))
        if patch.image == image and patch.before is not None
    ]
