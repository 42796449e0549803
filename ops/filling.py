"""Writing guest ranges into one image, step by step: what commit, rebase and resize have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from safeimg.drivers.formats.api import Changes, Image, Placement
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.transfer.copy import copy_fresh
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.loop import blocking
from safeimg.drivers.transfer.target import Target
from safeimg.drivers.transfer.view import View
from safeimg.ops.session import data_index
from safeimg.ops.steps import Move, Step

STEP_BYTES = 256 << 20
ENTRY_BYTES = 16  # of metadata for a cluster, at most
STEP_CLUSTERS = 1 << 16  # bounds the metadata of a step where clusters are tiny


class Batch:
    """What one step collects before it is yielded."""

    def __init__(self) -> None:
        self.moves: list[Move] = []
        self.fresh: list[Placement] = []
        self.cost = 0

    def in_place(self, move: Move) -> None:
        last = self.moves[-1] if self.moves else None
        if last is not None and move.continues(last):
            self.moves[-1] = last._replace(length=last.length + move.length)
        else:
            self.moves.append(move)
        self.cost += move.length


class Filler:
    """Plans and copies guest ranges of the first of the operation's `images`.

    `budget`: guest bytes that a step should have at most. `unlinked`: host ranges that earlier steps took a reference
    from."""

    def __init__(
        self,
        images: Sequence[Image],
        transfer: Transfer,
        *,
        unlinked: Sequence[tuple[int, int]] = (),
        step_bytes: int = STEP_BYTES,
    ) -> None:
        self._image = images[0]
        self.data_file = data_index(images, 0)
        self.planner = lookup(self._image.format).planner(self._image)
        self.planner.recall(unlinked)
        self.cluster = self.planner.cluster_size
        most = step_bytes if self.cluster == 1 else min(step_bytes, STEP_CLUSTERS * self.cluster)
        self.budget = max(most, self.cluster)
        self._transfer = transfer

    async def reserve(self, cursor: Any, done: int, clusters: int) -> AsyncIterator[Step]:
        """A step that makes room in the metadata, where needed."""
        changes = self.planner.reserve(clusters)
        if changes:
            yield Step("reserve", cursor, done, changes=[(0, changes)])

    def plan(self, batch: Batch, start: int, length: int, *, zero: bool) -> int:
        """Places one range. The end of what is covered: fresh places are wider, and filled from the view."""
        covered = start + length
        places = self.planner.zero(start, length) if zero else self.planner.place(start, length)
        if zero and self.cluster > 1:
            # Zeroes take no places, but metadata: entries, and at either end of a range a table that may be new.
            batch.cost += 2 * self.cluster + length // self.cluster * ENTRY_BYTES
        for place in places:
            if place.fresh:
                batch.fresh.append(place)
                # However short the place is, each cluster that it touches may be a new one.
                first, last = place.start // self.cluster, (place.start + place.length - 1) // self.cluster
                batch.cost += (last - first + 1) * self.cluster
                covered = max(covered, place.start + place.length)
            else:
                source = None if zero else place.start
                batch.in_place(Move(self.data_file, place.offset, place.length, source, place.start))
        return covered

    def cut(self, start: int, length: int, budget: int) -> int:
        """At most about `budget` bytes of a range, up to a cluster's end."""
        end = (start + max(budget, 1) + self.cluster - 1) // self.cluster * self.cluster
        return min(length, end - start)

    async def step(self, name: str, cursor: Any, done: int, view: View, batch: Batch) -> Step:
        """Copies the batch's fresh part from `view`, and makes the step of all of it."""
        fresh = await copy_fresh(
            self._transfer, view, self.data_file, Target(self._image.data, self._image.cipher), batch.fresh,
            granularity=self.planner.granularity,
        )
        return Step(name, cursor, done, fresh, batch.moves, [(0, self.planner.take())])

    async def bitmaps(self, here: Any, after: Any, ranges: Sequence[tuple[int, int]]) -> AsyncIterator[Step]:
        """The image's enabled bitmaps get the bits of guest ranges that will change (hazard 11)."""
        async for step in self.reserve(here, 0, self.planner.marking_clusters(ranges)):
            yield step
        changes = self.planner.mark_dirty(ranges)
        if changes:
            yield Step("bitmaps", after, 0, changes=[(0, changes)])


Fill = Callable[[Sequence[Placement]], None]


async def grow(
    filler: Filler, layers: Sequence[Image], size: int, here: Any, after: Any, *, fill: Fill | None = None
) -> AsyncIterator[Step]:
    """Grows the image, `layers[0]` with its backing images behind it, to `size` bytes: what its backing image would
    show there is zeroed first, in space the guest cannot see yet (hazard 12).

    `here`: the cursor that starts this anew; `after`: the one behind it. With `fill`, all that it grows by is
    allocated ahead; `fill` makes zeroes of these clusters, in a worker thread."""
    planner, old = filler.planner, layers[0].size
    for changes in planner.prepare_resize(size):
        yield Step("grow", here, 0, changes=[(0, changes)])
    aligned = min(-(-old // filler.cluster) * filler.cluster, size)
    limit = size if fill is None else aligned
    backing = layers[1].size if len(layers) > 1 else 0
    ranges = [(start, min(length, limit - start), True) for start, length in planner.exposed(size, backing)]
    if fill is not None:
        ranges.append((aligned, size - aligned, False))
    inside = View(layers, size=old)
    for start, length, zero in ranges:
        for position in range(start, start + length, filler.budget):
            piece = min(start + length - position, filler.budget)
            async for step in filler.reserve(here, 0, piece // filler.cluster + 2):
                yield step
            batch = Batch()
            filler.plan(batch, position, piece, zero=zero)
            if fill is not None and not zero:
                await blocking(fill, batch.fresh)
                batch.fresh = []  # what is in them need not be verified: they are zeroes that nobody has used
            yield await filler.step("zero", here, 0, inside, batch)
    *first, last = planner.resize(size)
    for changes in first:
        yield Step("size", None, 0, changes=[(0, changes)])
    changes_of_all = [(0, last)]
    if filler.data_file:  # an external one is as long as the disk
        changes_of_all.append((filler.data_file, Changes(length=size)))
    yield Step("size", after, 0, changes=changes_of_all)
