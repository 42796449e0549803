"""rebase, safe: the guest content stays, whatever the new backing image holds.

    fence     nobody writes to the overlay any more
    data      what the overlay does not hold itself, and what is not the same in the new backing image, is copied from
              the old one into fresh space: the overlay shows the same as before. As with QEMU, zeroes are copied too,
              marked as zeroes is only what lies behind the old one's end; and the overlay's enabled bitmaps get bits
    switch    the header names the new backing image
    release   what copied tables replaced loses its reference

The home image is the overlay; both backing chains are only read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from safeimg.drivers.errors import UnsupportedError, UsageError
from safeimg.drivers.formats.api import Changes, Image, Kind, Patch, Planner
from safeimg.drivers.formats.features import Rebasing
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.transfer.buffers import BufferPool
from safeimg.drivers.transfer.core import CHUNK, Transfer
from safeimg.drivers.transfer.same import same
from safeimg.drivers.transfer.view import LayerExtent, View
from safeimg.drivers.transfer.zero import is_zero
from safeimg.ops.errors import Conflict
from safeimg.ops.filling import STEP_BYTES, Batch, Filler
from safeimg.ops.phases import END, in_phases
from safeimg.ops.steps import Step

PHASES = ("fence", "data", "switch", "release")
SCAN = 4  # guest bytes that a step looks at, in units of those that it writes at most

Parts = Sequence[LayerExtent]


class Piece(NamedTuple):
    """A guest range that the overlay does not hold: its extents in the old and the new chain, None where all of it is
    known to be zero."""

    start: int
    length: int
    old: Parts | None
    new: Parts | None


class Difference(NamedTuple):
    start: int
    length: int
    zero: bool  # to be marked as zeroes


class Rebase:
    """The steps of a safe rebase. `layers`: the overlay, `old` backing images, then those of the new chain."""

    def __init__(
        self,
        layers: Sequence[Image],
        old: int,
        transfer: Transfer,
        backing: str | None,
        backing_format: str | None,
        *,
        unlinked: Sequence[tuple[int, int]] = (),
        step_bytes: int = STEP_BYTES,
    ) -> None:
        self._top, self._below = layers[0], layers[1:]
        before, after = layers[1 : 1 + old], layers[1 + old :]
        self.view = View(layers[: 1 + old])
        self._old = View(before, size=self._top.size) if before else None
        self._old_end = before[0].size if before else 0
        self._new = View(after, size=self._top.size) if after else None
        # Without a backing image, what is not allocated reads as zeroes: which it would not do any more.
        self._marks_zeroes = bool(before) or rebasing(self._top).marks_zeroes(self._top)
        self._transfer = transfer
        self._backing = backing, backing_format
        self._unlinked = list(unlinked)
        self._step_bytes = step_bytes
        self._filler = Filler(layers, transfer, unlinked=unlinked, step_bytes=step_bytes)
        self._chunk = max(CHUNK, self._filler.cluster)

    def total(self) -> int:
        """Guest bytes that the overlay does not hold."""
        return sum(length for _, length in self._missing(0))

    def finish(self) -> Sequence[tuple[int, Patch]]:
        """Takes the fence down."""
        driver = lookup(self._top.format)
        return tuple((0, patch) for patch in driver.unfence(driver.reopen(self._top)))

    def discards(self) -> Sequence[tuple[int, int, int]]:
        """Space that nobody uses any more: (image, offset, length)."""
        return tuple((0, *freed) for freed in self._filler.planner.freed())

    async def steps(self, cursor: Any | None) -> AsyncIterator[Step]:
        async for step in in_phases(self, PHASES, cursor):
            for _, changes in step.changes:
                self._unlinked += changes.unlinked
            yield step

    async def _fence(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        changes = lookup(self._top.format).fence(self._top)
        yield Step("fence", {"phase": "data"}, 0, changes=[(0, changes)] if changes else [])

    async def _data(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        at, done = cursor.get("at", 0), cursor.get("done", 0)
        filler, size = self._filler, self._top.size
        here = {"phase": "data", "at": at, "done": done}
        while at < size:
            window = filler.budget // filler.cluster * filler.cluster
            limit = min(at + SCAN * window, size)
            batch = Batch()
            found: list[Difference] = []
            while at < limit and sum(each.length for each in found) < window:
                end = min(at + window, size)
                found += await self._differences(at, end)
                done += sum(length for _, length in self._missing(at, end))
                at = end
            async for step in filler.bitmaps(here, here, [(each.start, each.length) for each in found]):
                yield step
            wanted = sum(each.length // filler.cluster + 2 for each in found)
            async for step in filler.reserve(here, here["done"], wanted):
                yield step
            for start, length, zero in found:
                filler.plan(batch, start, length, zero=zero and self._marks_zeroes)
            here = {"phase": "data", "at": at, "done": done}
            yield await filler.step("data", here, done, self.view, batch)
            self._transfer.progress.set_done(done)

    async def _switch(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        self._plan_anew()
        *first, last = set_backing(self._top, self._filler.planner, *self._backing)
        for changes in first:
            yield Step("switch", {"phase": "switch"}, 0, changes=[(0, changes)])
        yield Step("switch", {"phase": "release"}, 0, changes=[(0, last)])

    async def _release(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        changes = self._filler.planner.release()
        if changes:
            yield Step("release", {"phase": END}, 0, changes=[(0, changes)])

    def _plan_anew(self) -> None:
        """The header is fenced by now, and the next planner has to know it."""
        image = lookup(self._top.format).reopen(self._top)
        images = [image, *self._below]
        self._filler = Filler(images, self._transfer, unlinked=self._unlinked, step_bytes=self._step_bytes)

    async def _differences(self, start: int, end: int) -> list[Difference]:
        """Where the two chains differ in `start`…`end` below the overlay, by its clusters, in order."""
        found: list[Difference] = []  # appended to from several threads

        def work(piece: Piece, buffers: BufferPool) -> None:
            found.extend(self._compare(piece, buffers))

        await self._transfer.each(
            self._pieces(start, end), work, cost=lambda piece: piece.length if piece.old or piece.new else 0,
            done=lambda piece: piece.length,
        )
        return list(_joined(sorted(found)))

    def _missing(self, start: int, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Guest ranges (start, length) that the overlay does not hold."""
        stop = self._top.size if end is None else end
        for extent in self._top.extents(start, stop - start):
            if extent.kind is Kind.UNALLOCATED:
                yield extent.start, extent.length

    def _pieces(self, start: int, end: int) -> Iterator[Piece]:
        """What has to be looked at, in pieces that do not cut clusters."""
        for first, length in self._missing(start, end):
            at = first
            while at < first + length:
                stop = min(first + length, at - at % self._chunk + self._chunk)
                old, new = _parts(self._old, at, stop), _parts(self._new, at, stop)
                if old is not None or new is not None:
                    yield Piece(at, stop - at, old, new)
                at = stop

    def _compare(self, piece: Piece, buffers: BufferPool) -> Iterator[Difference]:
        old, new = (
            _read(view, parts, piece, buffers, slot)
            for slot, (view, parts) in enumerate(((self._old, piece.old), (self._new, piece.new)))
        )
        if old is not None and new is not None and same(old, new, 0, piece.length):
            return
        unit = self._filler.planner.granularity
        at = 0
        while at < piece.length:
            stop = min(piece.length, (piece.start + at) // unit * unit + unit - piece.start)
            if not _equal(old, new, at, stop):
                start = piece.start + at
                yield Difference(start, stop - at, start >= self._old_end)
            at = stop


def rebasing(image: Image) -> Rebasing:
    """`Conflict` if the image's format knows no backing images: an operation on it comes from no log of ours."""
    feature = lookup(image.format).rebasing
    if feature is None:
        raise Conflict(f"{image.file.path}: {image.format} images have no backing image")
    return feature


def set_backing(image: Image, planner: Planner, backing: str | None, backing_format: str | None) -> Iterator[Changes]:
    """See `Rebasing.set_backing`; `UsageError` in QEMU's words where the header has no room for the name."""
    try:
        yield from rebasing(image).set_backing(image, planner, backing, backing_format)
    except UnsupportedError as error:
        raise refused(backing, "No space left in the file header") from error


def refused(backing: str | None, reason: str) -> UsageError:
    """No change of the backing image, in QEMU's words. `backing`: as given on the command line."""
    shown = "(null)" if backing is None else backing
    return UsageError(f"Could not change the backing file to '{shown}': {reason}")


def _parts(view: View | None, start: int, end: int) -> Parts | None:
    parts = () if view is None else tuple(view.extents(start, end - start))
    return None if all(part.extent.kind is Kind.ZERO for part in parts) else parts


def _read(view: View | None, parts: Parts | None, piece: Piece, buffers: BufferPool, slot: int) -> memoryview | None:
    if view is None or parts is None:
        return None
    buffer = buffers.get(piece.length, slot)
    view.read_pieces(parts, piece.start, buffer)
    return buffer


def _equal(old: memoryview | None, new: memoryview | None, start: int, end: int) -> bool:
    if old is not None and new is not None:
        return same(old, new, start, end)
    return all(side is None or is_zero(side[start:end]) for side in (old, new))


def _joined(found: Sequence[Difference]) -> Iterator[Difference]:
    held: Difference | None = None
    for each in found:
        if held is not None and (held.start + held.length, held.zero) == (each.start, each.zero):
            held = held._replace(length=held.length + each.length)
            continue
        if held is not None:
            yield held
        held = each
    if held is not None:
        yield held
