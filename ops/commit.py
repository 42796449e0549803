"""commit: the changes of an overlay, and of every layer down to a base, go into the base.

The home image is the base: it is written in place, and the overlay may be deleted by the user. Phases, in order:

    fence     nobody writes to the base or to the layers above it any more
    grow      a base smaller than the top: what its own backing image would expose is zeroed, then the size (hazard 12)
    bitmaps   enabled persistent bitmaps of the base get the bits of everything that will change (hazard 11)
    data      per range: fresh clusters in the base, or in place where the base's cluster is its own
    release   what the fresh clusters replaced loses its reference
    empty     the top image forgets its clusters by one switch (not with `drop`); the last step that can be taken back
    compact, trim   the emptied file gets small; behind the point of no return
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from safeimg.drivers.formats.api import Image, Kind, Patch
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.view import View
from safeimg.ops.filling import STEP_BYTES, Batch, Filler, grow
from safeimg.ops.phases import END, in_phases
from safeimg.ops.steps import Step

PHASES = ("fence", "grow", "bitmaps", "data", "release", "empty", "compact", "trim")


def _advance(
    done: int, current: tuple[int, int, bool], covered: int, ranges: Iterator[tuple[int, int, bool]]
) -> tuple[int, tuple[int, int, bool] | None]:
    """Bytes done, and the first range left, once everything before `covered` is done."""
    following: tuple[int, int, bool] | None = current
    while following is not None:
        start, length, zero = following
        if start + length > covered:
            first = max(start, covered)
            return done + first - start, (first, start + length - first, zero)
        done += length
        following = next(ranges, None)
    return done, None


class Commit:
    """The steps of a commit. `layers`: the chain from the top image on, base and its own backing images included.

    `base`: index of the base in `layers`. Images by index in steps: 0 is the base, 1 the top, 2… those between,
    which are only read; then external data files."""

    def __init__(
        self,
        layers: Sequence[Image],
        base: int,
        transfer: Transfer,
        *,
        drop: bool,
        unlinked: Sequence[tuple[int, int]] = (),
        step_bytes: int = STEP_BYTES,
    ) -> None:
        self._layers = layers
        self._base_index = base
        self._base = layers[base]
        self._top = layers[0]
        self._drop = drop
        self.view = View(layers, size=max(self._top.size, self._base.size), floor=base)
        self._upper = View(layers[:base])
        self.images: tuple[Image, ...] = (self._base, *layers[:base])
        self._filler = Filler(self.images, transfer, unlinked=unlinked, step_bytes=step_bytes)
        self._planner = self._filler.planner
        self.emptying = False  # whether the base has it all, and the top image is next

    def total(self) -> int:
        """Guest bytes that the layers above the base hold."""
        return sum(length for _, length, _ in self._above(0))

    def finish(self) -> Sequence[tuple[int, Patch]]:
        """Takes the fences down."""
        return tuple(
            (index, patch)
            for index, image in enumerate(self.images[:2])
            for patch in lookup(image.format).unfence(image)
        )

    def discards(self) -> Sequence[tuple[int, int, int]]:
        """Space that nobody uses any more: (image, offset, length)."""
        return tuple((0, offset, length) for offset, length in self._planner.freed())

    async def steps(self, cursor: Any | None) -> AsyncIterator[Step]:
        async for step in in_phases(self, PHASES, cursor):
            yield step

    async def _fence(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        changes = [(index, lookup(image.format).fence(image)) for index, image in enumerate(self.images[:2])]
        yield Step("fence", {"phase": "grow"}, 0, changes=[pair for pair in changes if pair[1]])

    async def _grow(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        if self._top.size > self._base.size:
            layers = self._layers[self._base_index :]
            async for step in grow(self._filler, layers, self._top.size, {"phase": "grow"}, {"phase": "bitmaps"}):
                yield step

    async def _bitmaps(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        ranges = [(start, length) for start, length, _ in self._above(0)]
        async for step in self._filler.bitmaps({"phase": "bitmaps"}, {"phase": "data"}, ranges):
            yield step

    async def _data(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        at, done = cursor.get("at", 0), cursor.get("done", 0)
        filler = self._filler
        clusters = sum(length // filler.cluster + 2 for _, length, _ in self._above(at))
        ranges = self._above(at)
        current = next(ranges, None)
        here = {"phase": "data", "at": at, "done": done}
        while current is not None:
            async for step in filler.reserve(here, done, min(clusters, filler.budget // filler.cluster + 2)):
                yield step
            batch = Batch()
            while current is not None and batch.cost < filler.budget:
                start, length, zero = current
                length = filler.cut(start, length, filler.budget - batch.cost)
                covered = filler.plan(batch, start, length, zero=zero)
                done, current = _advance(done, current, covered, ranges)
            here = {"phase": "data", "at": self.view.size if current is None else current[0], "done": done}
            yield await filler.step("data", here, done, self.view, batch)

    async def _release(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        changes = self._planner.release()
        if changes:
            yield Step("release", {"phase": "empty"}, self.total(), changes=[(0, changes)])

    async def _empty(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        if not self._drop:
            self.emptying = True
            changes = lookup(self._top.format).planner(self._top).empty()
            yield Step("empty", {"phase": "compact"}, self.total(), changes=[(1, changes)])

    async def _compact(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        if not self._drop:
            self.emptying = True
            driver = lookup(self._top.format)
            emptied = driver.reopen(self._top)  # its header is another one now
            changes, length = driver.planner(emptied).compact()
            yield Step("compact", {"phase": "trim", "length": length}, 0, changes=[(1, changes)], no_return=True)
            yield Step("trim", {"phase": END}, 0, truncate=[(1, length)], no_return=True)

    async def _trim(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        if "length" in cursor:  # only when resumed between the two: `_compact` yields both
            yield Step("trim", {"phase": END}, 0, truncate=[(1, cursor["length"])], no_return=True)

    def _above(self, start: int) -> Iterator[tuple[int, int, bool]]:
        """Guest ranges that the layers above the base hold: start, length, and whether they read as zeroes."""
        held: tuple[int, int, bool] | None = None
        for layer, extent in self._upper.extents(start, self._top.size - start):
            if layer >= self._base_index:  # none of them has it
                continue
            zero = extent.kind is Kind.ZERO
            if held is not None and held[0] + held[1] == extent.start and held[2] is zero:
                held = (held[0], held[1] + extent.length, zero)
                continue
            if held is not None:
                yield held
            held = (extent.start, extent.length, zero)
        if held is not None:
            yield held
