"""bench: how long reading or writing many blocks takes.

Writing destroys what is there on purpose, so it keeps no journal; it goes through the engine's steps all the same, so
that a killed run leaves an image that opens, at worst with leaked clusters."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import Image, Patch
from safeimg.drivers.transfer.buffers import BufferPool
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.loop import blocking
from safeimg.drivers.transfer.view import SECTOR, View
from safeimg.ops.filling import Batch, Filler
from safeimg.ops.launch import Environment, Job, launch
from safeimg.ops.session import refuse_pending_on, touched
from safeimg.ops.steps import Step

STEP_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Requests:
    """What is asked of an image. Bytes."""

    count: int
    size: int
    offset: int = 0
    step: int = 0  # from one request's beginning to the next one's; 0: `size`
    pattern: int = 0  # the byte that is written
    flush_every: int = 0  # requests; 0: only at the end

    def starts(self, image: int) -> Iterator[int]:
        """Where each request begins in an image of so many bytes: behind its end they start over."""
        at = self.offset
        for _ in range(self.count):
            yield at
            at = (at + (self.step or self.size)) % image if image else 0


async def bench_read(layers: Sequence[Image], transfer: Transfer, requests: Requests) -> float:
    """Reads, in as many threads as `transfer` has. Seconds that it took; `UsageError` for what is not there."""
    view = View(layers)

    def work(start: int, buffers: BufferPool) -> None:
        _check(start, requests.size, view.size)
        view.read_into(start, buffers.get(requests.size))

    started = time.perf_counter()
    await transfer.each(requests.starts(view.size), work)
    return time.perf_counter() - started


async def bench_write(environment: Environment, layers: Sequence[Image], requests: Requests) -> float:
    """Writes; requests that continue each other are written together. Seconds that it took. Raises `UsageError` for
    what is not there, `SomethingPending`."""
    await blocking(refuse_pending_on, environment.fs, layers[0].file.path)
    for start in requests.starts(layers[0].size):
        _check(start, requests.size, layers[0].size)
    writing = _Writing(layers, environment.transfer, requests)
    roles = [("image", layers[0], True)]
    job = Job("bench", writing, touched(roles), layers, writing.view, {}, undo=False)
    started = time.perf_counter()
    await launch(job, environment._replace(journal="off"))
    return time.perf_counter() - started


def _check(start: int, length: int, size: int) -> None:
    if start + length > size:
        raise UsageError("Failed request: Input/output error")


class _Writing:
    """Implements `steps.Operation`."""

    def __init__(self, layers: Sequence[Image], transfer: Transfer, requests: Requests) -> None:
        self.view = _Pattern(layers, requests.pattern)
        self._size = layers[0].size
        self._requests = requests
        self._filler = Filler(layers[:1], transfer, step_bytes=STEP_BYTES)

    async def steps(self, cursor: Any | None) -> AsyncIterator[Step]:
        filler = self._filler
        for ranges in self._batches():
            self.view.show(ranges)
            merged = list(_merged(ranges))
            async for step in filler.bitmaps({}, {}, merged):
                yield step
            clusters = sum(length // filler.cluster + 2 for _, length in merged)
            async for step in filler.reserve({}, 0, clusters):
                yield step
            batch, covered = Batch(), 0
            for start, length in merged:
                low = max(start, covered)  # a fresh cluster took the beginning of this one along
                if low < start + length:
                    covered = filler.plan(batch, low, start + length - low, zero=False)
            yield await filler.step("write", {}, 0, self.view, batch)
        changes = filler.planner.release()
        if changes:
            yield Step("release", {}, 0, changes=[(0, changes)])

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        """Requests (start, length) for one step each: up to a flush, or as many as a step may have."""
        held: list[tuple[int, int]] = []
        each = max(self._requests.size, self._filler.cluster)
        most = self._requests.flush_every or max(1, self._filler.budget // each)
        for start in self._requests.starts(self._size):
            if len(held) >= most:
                yield held
                held = []
            held.append((start, self._requests.size))
        if held and self._requests.size:
            yield held

    def finish(self) -> Sequence[tuple[int, Patch]]:
        return ()

    def discards(self) -> Sequence[tuple[int, int, int]]:
        return tuple((0, *freed) for freed in self._filler.planner.freed())


def _merged(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The whole sectors of ranges (start, length) in order, those that touch as one."""
    start = end = -1
    for first, length in sorted(ranges):
        low, high = first // SECTOR * SECTOR, -(-(first + length) // SECTOR) * SECTOR
        if low > end:
            if end > start:
                yield start, end - start
            start, end = low, high
        end = max(end, high)
    if end > start:
        yield start, end - start


class _Pattern(View):
    """The image as it was, but for what is written and has been: sectors and clusters are filled up with that."""

    def __init__(self, layers: Sequence[Image], pattern: int) -> None:
        super().__init__(layers)
        self._byte = bytes([pattern])
        self._starts: list[int] = []  # of ranges in order that do not touch
        self._ends: list[int] = []

    def show(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Ranges (start, length) that are written from now on."""
        for low, length in ranges:
            high = low + length
            first, last = bisect_left(self._ends, low), bisect_right(self._starts, high)
            if first < last:
                low, high = min(low, self._starts[first]), max(high, self._ends[last - 1])
            self._starts[first:last], self._ends[first:last] = [low], [high]

    def read_into(self, start: int, buffer: memoryview) -> None:
        end = start + len(buffer)
        among = slice(bisect_right(self._ends, start), bisect_left(self._starts, end))
        inside = [(max(low, start), min(high, end))
                  for low, high in zip(self._starts[among], self._ends[among], strict=True)]  # fmt: skip
        if inside != [(start, end)]:
            super().read_into(start, buffer)
        for low, high in inside:
            buffer[low - start : high - start] = self._byte * (high - low)
