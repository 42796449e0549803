"""The worker threads of one call, and who watches over them.

They are at work before trio is there: to import it takes as long as moving 300 MB does. Signals ask them to stop
without it (`Transfer.cancel`), so what is done within a moment never meets trio; then it is imported while they go on,
waits for them, and passes cancellation on.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

from safeimg.drivers.transfer.loop import has_loop

Argument = TypeVar("Argument")

MOMENT = 2.0  # seconds: what takes less is not worth an event loop
SWITCH = 0.0002  # seconds that a worker waits for the interpreter while the main thread imports


class Stopped(Exception):
    """This worker's work is pointless: another one failed, and its exception is the one that counts."""


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


class Crew:
    """Threads that do the same, each with an argument of its own."""

    def __init__(self, turns: Turns | None = None) -> None:
        """`turns`: what they wait on, to be given up with the first failure."""
        self.lock = threading.Lock()
        self.failures: list[BaseException] = []
        self.cancelled = False
        self._turns = turns
        self._away = 0
        self._home = threading.Event()
        self._call: Callable[[], object] = lambda: None

    @property
    def stopping(self) -> bool:
        """Whether nothing new is to be begun."""
        return self.cancelled or bool(self.failures)

    async def each(self, work: Callable[[Argument], None], arguments: Sequence[Argument]) -> None:
        """Calls `work` in a thread for each of the arguments, and returns when all have ended. Cancelled, it lets them
        come to the end of what they are at: they see that they are `stopping`."""
        try:
            self._start(work, arguments)
            if has_loop():
                await self._wait()
            elif not self._home.wait(MOMENT):
                _import_trio().run(self._wait)
        except BaseException:
            self.cancelled = True
            raise

    def _start(self, work: Callable[[Argument], None], arguments: Sequence[Argument]) -> None:
        """A thread that the system has no room for is a failure as if it had been raised in it: those before it end."""
        self._away = len(arguments)
        for number, argument in enumerate(arguments):
            try:
                threading.Thread(target=self._run, args=(work, argument), daemon=True).start()
            except RuntimeError as error:
                self._end(len(arguments) - number, error)
                return

    def _run(self, work: Callable[[Argument], None], argument: Argument) -> None:
        try:
            work(argument)
        except BaseException as error:
            self._end(1, error)
        else:
            self._end(1)

    def _end(self, threads: int, error: BaseException | None = None) -> None:
        if error is not None:
            self.failures.append(error)
            if self._turns is not None:
                self._turns.abandon()
        with self.lock:
            self._away -= threads
            if not self._away:
                self._home.set()
                self._call()

    async def _wait(self) -> None:
        import trio

        home, token = trio.Event(), trio.lowlevel.current_trio_token()
        with self.lock:
            if not self._away:
                return
            self._call = lambda: token.run_sync_soon(home.set)
        try:
            await home.wait()
        except BaseException:
            self.cancelled = True
            with trio.CancelScope(shield=True):
                await home.wait()
            raise


def _import_trio() -> ModuleType:
    """While threads are at work, which get at the interpreter often enough."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        import trio
    finally:
        sys.setswitchinterval(before)
    return trio
