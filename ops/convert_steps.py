"""convert as a generator of steps: the guest content of a source is written to a target image, a stretch a
step.

Image 0 of the steps is the target, and the only one. Data is written into fresh clusters, or to its final
place in a file that nobody needs the old content of, before the step is yielded: killed before, the step
never happened, and the cursor leads to the same stretch again. Only where the old content is to be kept for a
rollback (`undo`) does data for live places become moves, which the engine writes after it has saved what lies
there.

    reserve   room in the target's metadata, where there is not enough
    data      clusters written, then their metadata
    release   what was replaced in an existing target loses its reference
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

from safeimg.drivers.formats.api import Changes, Image, Patch
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.transfer.buffers import BufferPool
from safeimg.drivers.transfer.copy import join
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.crew import Turns
from safeimg.drivers.transfer.loop import blocking
from safeimg.drivers.transfer.target import Target
from safeimg.drivers.transfer.view import Source, View
from safeimg.ops.bitmap import storing
from safeimg.ops.convert_bitmaps import with_copies
from safeimg.ops.convert_plan import Chunk, Rules, chunks
from safeimg.ops.convert_write import Ahead, Batch, Compress, Exact, Writer
from safeimg.ops.moving import write_fresh
from safeimg.ops.steps import Move, Step

STEP_BYTES = 256 << 20
STEP_SECONDS = 1.0
STEP_CLUSTERS = 1 << 16  # bounds a step's metadata where clusters are small
WINDOW = 2 << 20  # bytes that a worker takes at once
SLOW_WINDOW = 64 << 10  # the least with a rate limit
MANY_RANGES = 1 << 17  # that are kept for bitmaps
PAGE = 4096  # blocks of a raw target that are tested for zeroes


class Policy(NamedTuple):
    """How the target is written."""

    sparse: int = PAGE  # bytes of zeroes that are left out; 0: none, everything is allocated
    compress: Compress | None = None  # a whole cluster; None where that makes it no smaller
    zero_below: int = 0  # guest offset below which the target may not read as zeroes yet
    skip_below: int = 0  # guest offset below which the target's backing image supplies what the source's does
    existing: bool = False  # the target was there before: fence it, keep its bitmaps right
    undo: bool = False  # what lies in live places is to be kept
    preallocate: bool = False  # a new file: allocate its space before it is written
    step_bytes: int = STEP_BYTES
    step_seconds: float = STEP_SECONDS


class Convert:
    """An `Operation`. `target`: the layers of the target, itself first (it alone is written).

    `data_file`: the index of the file that holds the target's guest data. `unlinked`: what the steps before the
    cursor unlinked, when resumed."""

    def __init__(self, source: Source, target: Sequence[Image], transfer: Transfer, policy: Policy, *,
                 data_file: int = 0, unlinked: Sequence[tuple[int, int]] = (), bitmaps: Image | None = None) -> None:
        self.view = source
        self.images: tuple[Image, ...] = (target[0],)
        self._driver = lookup(target[0].format)
        self._transfer = transfer
        self._policy = policy
        self._bitmaps = bitmaps
        self._planner = self._driver.planner(target[0])
        self._planner.recall(unlinked)
        unit = self._unit = self._planner.cluster_size
        self._budget = policy.step_bytes
        if unit > 1:
            self._budget = max(unit, min(policy.step_bytes, STEP_CLUSTERS * unit))
        self._zero_budget = 4 * self._budget
        self._rules = Rules(
            unit=unit,
            window=max(unit, min(WINDOW, policy.step_bytes, _at_rate(transfer)) // unit * unit),
            everything=policy.sparse == 0,
            zero_below=min(policy.zero_below, source.size),
            skip_below=min(policy.skip_below, source.size),
        )
        self._writer = Writer(
            source=source,
            target=Target(target[0].data, target[0].cipher),
            image=data_file,
            planner=self._planner,
            old=View(target),
            transfer=transfer,
            block=_granularity(policy, unit),
            sparse=min(policy.sparse, unit if policy.compress else self._rules.window),
            zero_below=self._rules.zero_below,
            compress=policy.compress,
            undo=policy.undo,
            space=None if not policy.preallocate else (Ahead if unit > 1 else Exact)(target[0].data),
        )

    def total(self) -> int:
        """Guest bytes of the source."""
        return self.view.size

    def finish(self) -> Sequence[tuple[int, Patch]]:
        """Makes an unfinished target an image like any other."""
        return tuple((0, patch) for patch in self._driver.unfence(self.images[0]))

    def discards(self) -> Sequence[tuple[int, int, int]]:
        """Space that nobody uses any more: (image, offset, length)."""
        return tuple((0, offset, length) for offset, length in self._planner.freed())

    async def steps(self, cursor: Any | None) -> AsyncIterator[Step]:
        """See `Operation`. The cursor is {"at": guest offset}; also "unmarked": True while the target's
        bitmaps are to be set, "copied": True once it has the source's, "released": True at the very end."""
        size = self.view.size
        if cursor is None:
            cursor = {"at": 0}
            if self._policy.existing:
                cursor["unmarked"] = True
                yield Step("fence", cursor, 0, changes=self._changes(self._driver.fence(self.images[0])))
        at: int = cursor["at"]
        self._transfer.progress.set_total(size)
        self._transfer.progress.set_done(at)
        if "unmarked" in cursor:
            async for step in self._mark():
                yield step
        while at < size:
            changes = self._planner.reserve(self._clusters_of_a_step(at))
            if changes:
                yield Step("reserve", {"at": at}, at, changes=[(0, changes)])
            batch = await self._batch(at)
            at = batch.at
            changes = self._planner.take()
            if batch.written or batch.moves or changes:
                moves = join_moves(batch.moves)
                yield Step("data", {"at": at}, at, join(batch.written), moves, [(0, changes)])
        if self._writer.space is not None:
            await blocking(self._writer.space.trim)
        if self._bitmaps is not None and "copied" not in cursor and "released" not in cursor:
            async for step in self._copy_bitmaps(self._bitmaps):
                yield step
        if "released" not in cursor:
            changes = self._planner.release()
            if changes:
                yield Step("release", {"at": at, "released": True}, at, changes=[(0, changes)])

    async def _mark(self) -> AsyncIterator[Step]:
        """Sets the bits of what will be written in the bitmaps of an existing target, before it is."""
        ranges: list[tuple[int, int]] = []
        if self._planner.marking_clusters([(0, self.view.size)]):  # there is a bitmap that is enabled
            ranges = await blocking(self._touched)
        changes = self._planner.reserve(self._planner.marking_clusters(ranges))
        if changes:
            yield Step("reserve", {"at": 0, "unmarked": True}, 0, changes=[(0, changes)])
        changes = self._planner.mark_dirty(ranges)
        if changes:
            yield Step("bitmaps", {"at": 0}, 0, changes=[(0, changes)])

    def _touched(self) -> list[tuple[int, int]]:
        """Guest ranges (start, length) that are written, or at least read to see whether they are zero; all there is
        where they are too many."""
        found: list[tuple[int, int]] = []
        for chunk in chunks(self.view, 0, self._rules):
            for start, end in sorted((*chunk.copy, *chunk.zero)):
                end = min(end, self.view.size)
                if found and sum(found[-1]) >= start:
                    found[-1] = (found[-1][0], max(end, sum(found[-1])) - found[-1][0])
                else:
                    found.append((start, end - start))
            if len(found) > MANY_RANGES:
                return [(0, self.view.size)]
        return found

    async def _copy_bitmaps(self, source: Image) -> AsyncIterator[Step]:
        """The source's bitmaps, once all data is there: none of it is a change that they would record."""
        target, at = self.images[0], self.view.size
        wanted = with_copies(target, source)
        held: Step | None = None
        for changes in storing(target, self._planner, wanted):
            if held is not None:
                yield held
            fresh = await blocking(write_fresh, target.file, changes.fresh)
            held = Step("bitmaps", None if fresh else {"at": at}, at, fresh, changes=[(0, changes)])
        if held is not None:
            yield held._replace(cursor={"at": at, "copied": True})

    def _changes(self, changes: Changes) -> list[tuple[int, Changes]]:
        return [(0, changes)] if changes else []

    def _clusters_of_a_step(self, at: int) -> int:
        """Clusters that the next step may take at most: its data, the zeroes that need places, the last
        chunk."""
        most = self._budget + self._rules.window
        if at < self._rules.zero_below:
            most += self._zero_budget + self._rules.longest_zeroes
        return -(-min(most, self.view.size - at) // self._unit) + 2 if self._unit > 1 else 0

    async def _batch(self, at: int) -> Batch:
        """Reads, writes and plans from guest offset `at` on, until there is enough for a step."""
        batch = Batch(at)
        turns = Turns(ordered=self._transfer.settings.ordered)

        def work(chunk: Chunk, buffers: BufferPool) -> None:
            self._writer.run(chunk, buffers, batch, turns)

        await self._transfer.each(self._enough(batch), work, cost=lambda chunk: chunk.data,
                                  done=lambda chunk: chunk.length, turns=turns)
        # The engine counts what it moves.
        self._transfer.progress.add(-sum(move.length for move in batch.moves if move.source is not None))
        return batch

    def _enough(self, batch: Batch) -> Iterator[Chunk]:
        """Chunks for one step: as many bytes as it may have, or what can be done in its time."""
        deadline = time.monotonic() + self._policy.step_seconds
        data = zero = 0
        for chunk in chunks(self.view, batch.at, self._rules):
            batch.at = chunk.start + chunk.length
            yield chunk
            data += chunk.data
            zero += sum(end - start for start, end in chunk.zero)
            if data >= self._budget or zero >= self._zero_budget or time.monotonic() >= deadline:
                return


def _at_rate(transfer: Transfer) -> int:
    """What a worker takes at once with a rate limit: what goes through in a quarter of a second, whole pages of it."""
    rate = transfer.settings.rate
    return WINDOW if rate is None else max(SLOW_WINDOW, rate // 4 // PAGE * PAGE)


def _granularity(policy: Policy, unit: int) -> int:
    """Bytes of the blocks that are tested for zeroes: as in qemu-img, aligned to the stretch that is worth leaving out,
    so that it alone decides what is allocated; compressed clusters are written or not, whatever it is."""
    stretch = 0 if policy.compress else policy.sparse
    return max(unit, 1 << stretch.bit_length() - 1) if stretch else unit


def join_moves(moves: Iterable[Move]) -> list[Move]:
    """In the order of the file, with moves that continue each other as one."""
    joined: list[Move] = []
    for move in sorted(moves, key=lambda move: move.offset):
        last = joined[-1] if joined else None
        if last is not None and move.continues(last):
            joined[-1] = last._replace(length=last.length + move.length)
        else:
            joined.append(move)
    return joined
