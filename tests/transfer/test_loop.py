"""With an event loop, and without one."""

from __future__ import annotations

import threading

import pytest
import trio
from safeimg.drivers.transfer.buffers import BufferPool
from safeimg.drivers.transfer.core import Settings, Transfer
from safeimg.drivers.transfer.loop import blocking, has_loop, run_alone


async def where() -> tuple[bool, int]:
    return has_loop(), await blocking(threading.get_ident)


def test_blocking_calls_have_a_thread_where_a_loop_runs() -> None:
    looped, thread = trio.run(where)
    assert looped
    assert thread != threading.get_ident()


def test_blocking_calls_are_made_at_once_where_none_runs() -> None:
    assert run_alone(where) == (False, threading.get_ident())


def test_failures_come_out_as_they_are() -> None:
    async def failing() -> None:
        await blocking(lambda: [][1])

    for run in (run_alone, trio.run):
        with pytest.raises(IndexError):
            run(failing)


def test_bulk_data_starts_a_loop() -> None:
    seen: list[tuple[int, bool]] = []

    def work(item: int, buffers: BufferPool) -> None:
        seen.append((item, threading.current_thread() is threading.main_thread()))

    async def moving() -> int:
        await Transfer(Settings(workers=2)).each(range(100), work)
        assert not has_loop()
        return len(seen)

    assert run_alone(moving) == 100
    assert sorted(seen) == [(item, False) for item in range(100)]


def test_what_needs_a_loop_says_so() -> None:
    class Forever:
        def __await__(self):  # type: ignore[no-untyped-def]
            yield

    async def waiting() -> None:
        await Forever()

    with pytest.raises(RuntimeError, match="event loop"):
        run_alone(waiting)
