"""Operations run with an event loop, trio's, or without one.

To import trio takes longer than most changes of metadata take as a whole. So the command line runs operations alone:
they wait for disks by way of `blocking`, which needs no loop, and where much data is moved, `Crew.each` starts one for
as long as that takes. A program that has a loop of its own awaits them there.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def has_loop() -> bool:
    """Whether trio runs in this thread."""
    trio = sys.modules.get("trio")
    return trio is not None and bool(trio.lowlevel.in_trio_run())


async def blocking(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
) -> Result:
    """Calls what may wait for disks: in a thread if an event loop runs here, which that way still hears of signals;
    otherwise at once."""
    if not has_loop():
        return function(*arguments, **named)
    import trio

    return await trio.to_thread.run_sync(lambda: function(*arguments, **named))


def run_alone(work: Callable[[], Awaitable[Result]]) -> Result:
    """Runs an asynchronous function to its end without an event loop: it may wait by way of this module alone."""
    waiting = work().__await__()
    try:
        next(waiting)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise RuntimeError("something waits for an event loop, and none runs")
