"""The parallel core: a few long-lived worker loops that take items from one shared planner.

The loops are threads that live as long as a call (`crew.py`: a hop a chunk costs more than moving it), which read,
test, compress and write outside the interpreter lock; trio watches over them.

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
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import File
from safeimg.drivers.transfer.buffers import BufferPool, Buffers
from safeimg.drivers.transfer.crew import Crew, Stopped, Turns
from safeimg.drivers.transfer.progress import Progress
from safeimg.drivers.transfer.rate import TokenBucket

Item = TypeVar("Item")

CHUNK = 1024 * 1024  # bytes of an item, where nothing else decides: 1 to 2 MiB were best
_NAP = 0.1  # seconds that a worker sleeps at most before it looks whether it was cancelled


class Settings(NamedTuple):
    """How guest data is moved."""

    workers: int = 2  # loops; 1 makes the order of all reads and writes deterministic
    ordered: bool = True  # space is handed out in guest order (not with -W)
    rate: int | None = None  # bytes a second
    digests: bool = True  # of what is written, for the log
    writeback: bool = False  # start writing to disk early, because it will be synced soon


def sensible_workers(asked: int) -> int:
    """How many loops to run when `asked` coroutines were (-m): with local files, no more than one for each processor,
    and one, so that none is idle while a loop waits for the interpreter."""
    return max(1, min(asked, len(os.sched_getaffinity(0)) + 1))


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
        self._crew: Crew | None = None  # at work on a call

    async def each(self, items: Iterable[Item], work: Callable[[Item, BufferPool], None], *,
                   cost: Callable[[Item], int] | None = None, done: Callable[[Item], int] | None = None,
                   turns: Turns | None = None) -> None:
        """Calls `work(item, buffers)` in a worker thread for each of `items`, and returns when all is done.

        `items` is consumed under a lock, in order, as workers become free, so it may plan as it goes and may
        stop early. `cost(item)`: bytes of data moved, for the rate limit (0 if None); `done(item)`: bytes of
        progress (`cost` if None). `turns`: what the work functions wait on. The first exception of `items` or
        `work` ends the call and is raised as it is, after every worker has come to rest; cancellation (trio's, or
        `cancel`, which raises `KeyboardInterrupt`) takes effect between two items. Where no event loop runs, one does
        for this call."""
        crew = self._crew = Crew(turns)
        source = iter(items)

        def loop(buffers: Buffers) -> None:
            while True:
                with crew.lock:
                    if crew.stopping:
                        return
                    try:
                        item = next(source)
                    except StopIteration:
                        return
                amount = cost(item) if cost is not None else 0
                if self._bucket is not None and amount:
                    self._wait(self._bucket, amount, crew)
                work(item, buffers)
                self.progress.add(amount if done is None else done(item), amount)

        pool = [self._idle.pop() if self._idle else Buffers() for _ in range(max(1, self.settings.workers))]
        try:
            await crew.each(loop, pool)
        finally:
            self._crew = None
        self._idle.extend(pool)
        for failure in crew.failures:
            if not isinstance(failure, Stopped):
                raise failure
        if crew.cancelled:
            raise KeyboardInterrupt

    def cancel(self) -> bool:
        """Ends the call that is running, if there is one: each worker goes on to the end of its item. Signal handlers
        may call this."""
        crew = self._crew
        if crew is None:
            return False
        crew.cancelled = True
        return True

    def _wait(self, bucket: TokenBucket, amount: int, crew: Crew) -> None:
        """Sits the rate limit out. Raises `Stopped` if there is no point in it any more."""
        until = time.monotonic() + bucket.take(amount)
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _NAP))
            if crew.stopping:
                raise Stopped

    def hint(self, file: File, offset: int, length: int) -> None:
        """Starts the write-back of what was just written, where it is going to be synced."""
        if self.settings.writeback:
            file.start_writeback(offset, length)
