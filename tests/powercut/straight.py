"""Runs an operation in this thread from beginning to end, the same each time: no event loop, no threads, no clock.

Crash states are judged by the hundred thousand. An event loop and hops between threads are most of what running an
operation on small images takes, and with one worker they change nothing. Identities, random bytes and times are the
same in each run and each process, so that a trace is the same whenever and wherever it is made: its crash states can be
named, told from each other, and made again.
"""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from safeimg.drivers.crypto import luks, splitter
from safeimg.drivers.transfer.buffers import BufferPool, Buffers
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.loop import run_alone
from safeimg.journal import chain, log, owner
from safeimg.journal.events import Event

Item = TypeVar("Item")
Result = TypeVar("Result")

EPOCH = 1_800_000_000.0


class StraightTransfer(Transfer):
    """The transfer core with one worker, in the caller's thread."""

    async def each(self, items: Iterable[Item], work: Callable[[Item, BufferPool], None], *,
                   cost: Callable[[Item], int] | None = None, done: Callable[[Item], int] | None = None,
                   turns: object = None) -> None:
        buffers = self._idle.pop() if self._idle else Buffers()
        try:
            for item in items:
                amount = cost(item) if cost is not None else 0
                work(item, buffers)
                self.progress.add(amount if done is None else done(item), amount)
        finally:
            self._idle.append(buffers)


def run(function: Callable[..., Awaitable[Result]], *arguments: object) -> Result:
    """As `trio.run`, for what never waits."""
    with alone():
        return run_alone(lambda: function(*arguments))


@contextmanager
def alone() -> Iterator[None]:
    """The only process of a machine whose clock stands still but for its ticks. Its logs grow often."""
    chance = random.Random(1)
    ticks = iter(range(1 << 62))
    wanted: tuple[tuple[Any, str, object], ...] = (
        (time, "time", lambda: EPOCH + next(ticks)),
        (time, "monotonic", lambda: 0.0),
        (os, "urandom", chance.randbytes),
        (os, "getpid", lambda: 4711),
        (owner, "_host", lambda: "host"),
        (owner, "_machine", lambda: "machine"),
        (owner, "_boot", lambda: "boot"),
        (owner, "_process", lambda pid: None),  # whoever left a log is dead
        (owner, "_exists", lambda pid: False),
        (log, "CHUNK", 8 << 10),
        (log, "RESERVE", 2 << 10),
        (log, "decode_event", _decode_event),
        (chain, "body_of", _body_of),
        (luks, "merge", _merge),
    )
    before = [getattr(target, name) for target, name, _ in wanted]
    for target, name, value in wanted:
        setattr(target, name, value)
    try:
        yield
    finally:
        for (target, name, _), value in zip(wanted, before, strict=True):
            setattr(target, name, value)


_bodies: dict[int, tuple[Event, str]] = {}
_body_of_event = chain.body_of


def _body_of(event: Event) -> str:
    """`chain.body_of`, once for each event that is in memory."""
    known = _bodies.get(id(event))
    if known is None:
        if len(_bodies) > 1 << 14:
            _bodies.clear()
        known = _bodies[id(event)] = (event, _body_of_event(event))
    return known[1]


_decode_event = functools.lru_cache(1 << 14)(log.decode_event)  # the states of a run share most of its events
_merge = functools.lru_cache(1 << 10)(splitter.merge)  # …and the keys of an image are the same each time
