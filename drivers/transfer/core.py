"""The parallel core: a few long-lived worker loops that take items from one shared planner.

trio starts the loops, cancels them and collects their failure; the loops themselves are plain threads (one
hop each for a whole call: a hop a chunk costs more than moving it), which read, test, compress and write
outside the interpreter lock.

            items (an iterator: planned as it is consumed, under a lock)
              |  |  |
         +----+  |  +----+         each loop, over and over:
         v       v       v           1. is the call cancelled, or has another loop failed?
      loop 0  loop 1  loop 2         2. take the next item
         |       |       |           3. wait for the rate limit
         +---- work() ---+           4. work(item, buffers), add to the progress
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from safeimg.drivers.storage.api import File
from safeimg.drivers.transfer.buffers import BufferPool, Buffers
from safeimg.drivers.transfer.loop import has_loop
from safeimg.drivers.transfer.progress import Progress
from safeimg.drivers.transfer.rate import TokenBucket

Item = TypeVar("Item")

CHUNK = 1024 * 1024  # bytes of an item, where nothing else decides: 1 to 2 MiB were best
_NAP = 0.1  # seconds that a worker sleeps at most before it looks whether it was cancelled


@dataclass(frozen=True, slots=True)
class Settings:
    """How guest data is moved."""

    workers: int = 2  # loops; 1 makes the order of all reads and writes deterministic
    ordered: bool = True  # space is handed out in guest order (not with -W)
    rate: int | None = None  # bytes a second
    digests: bool = True  # of what is written, for the log
    writeback: bool = False  # start writing to disk early, because it will be synced soon


def sensible_workers(asked: int) -> int:
    """How many loops to run when `asked` coroutines were (-m): with local files, no more than there are
    processors, and two at least (one reads while the other writes)."""
    return max(1, min(asked, max(2, len(os.sched_getaffinity(0)))))


class Turns:
    """Lets workers, each with a ticket, pass one after the other in the order of the tickets."""

    def __init__(self, first: int = 0, *, ordered: bool = True) -> None:
        self._changed = threading.Condition()
        self._next = first
        self._ordered = ordered
        self._broken = False

    @contextmanager
    def turn(self, ticket: int) -> Iterator[None]:
        """Holds the lock while it is `ticket`'s turn (any order unless `ordered`). Every ticket must come.

        Raises `Stopped` if a worker gave up, so that nobody waits for it."""
        with self._changed:
            while self._ordered and self._next != ticket and not self._broken:
                self._changed.wait()
            if self._broken:
                raise Stopped
            try:
                yield
            except BaseException:
                self._broken = True
                raise
            finally:
                self._next += 1
                self._changed.notify_all()

    def abandon(self) -> None:
        """A worker that has a ticket gives up."""
        with self._changed:
            self._broken = True
            self._changed.notify_all()


class Stopped(Exception):
    """This worker's work is pointless: another one failed, and its exception is the one that counts."""


class Transfer:
    """Moves data with the settings given, call after call. Buffers live as long as this object."""

    def __init__(
        self, settings: Settings | None = None, progress: Progress | None = None,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        """`warn` is told what could not be read and is left out."""
        self.settings = settings or Settings()
        self.progress = progress or Progress()
        self.warn = warn
        self.digests = self.settings.digests  # may change between calls: without a log, nobody wants them
        self._bucket = TokenBucket(self.settings.rate) if self.settings.rate else None
        self._idle: list[Buffers] = []

    async def each(self, items: Iterable[Item], work: Callable[[Item, BufferPool], None], *,
                   cost: Callable[[Item], int] | None = None, done: Callable[[Item], int] | None = None,
                   turns: Turns | None = None) -> None:
        """Calls `work(item, buffers)` in a worker thread for each of `items`, and returns when all is done.

        `items` is consumed under a lock, in order, as workers become free, so it may plan as it goes and may
        stop early. `cost(item)`: bytes of data moved, for the rate limit (0 if None); `done(item)`: bytes of
        progress (`cost` if None). `turns`: what the work functions wait on. The first exception of `items` or
        `work` ends the call and is raised as it is, after every worker has come to rest; cancellation takes
        effect between two items. Where no event loop runs, one does for this call."""
        import trio

        if not has_loop():
            trio.run(lambda: self.each(items, work, cost=cost, done=done, turns=turns))
            return
        source = iter(items)
        lock = threading.Lock()
        failures: list[BaseException] = []

        def give_up(error: BaseException) -> None:
            failures.append(error)
            if turns is not None:
                turns.abandon()

        def loop(buffers: Buffers) -> None:
            try:
                while True:
                    trio.from_thread.check_cancelled()
                    with lock:
                        if failures:
                            return
                        try:
                            item = next(source)
                        except StopIteration:
                            return
                    amount = cost(item) if cost is not None else 0
                    if self._bucket is not None and amount and not self._wait(self._bucket, amount, failures):
                        return
                    work(item, buffers)
                    self.progress.add(amount if done is None else done(item), amount)
            except Exception as error:
                give_up(error)
            except BaseException:  # cancelled: trio's business, but nobody may wait for our turn
                if turns is not None:
                    turns.abandon()
                raise

        pool = [self._idle.pop() if self._idle else Buffers() for _ in range(max(1, self.settings.workers))]
        try:
            async with trio.open_nursery() as nursery:
                for buffers in pool:
                    nursery.start_soon(trio.to_thread.run_sync, loop, buffers)
        finally:
            self._idle.extend(pool)
        for failure in failures:
            if not isinstance(failure, Stopped):
                raise failure

    def _wait(self, bucket: TokenBucket, amount: int, failures: list[BaseException]) -> bool:
        """Sits the rate limit out; False if another worker failed meanwhile. Raises what trio cancels
        with."""
        import trio

        until = time.monotonic() + bucket.take(amount)
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _NAP))
            trio.from_thread.check_cancelled()
            if failures:
                return False
        return True

    def hint(self, file: File, offset: int, length: int) -> None:
        """Starts the write-back of what was just written, where it is going to be synced."""
        if self.settings.writeback:
            file.start_writeback(offset, length)
