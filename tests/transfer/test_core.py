"""The worker loops: order, failure, cancellation, rate."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import trio
from safeimg.drivers.transfer.buffers import BufferPool, Buffers
from safeimg.drivers.transfer.core import Settings, Transfer, sensible_workers
from safeimg.drivers.transfer.crew import Turns
from safeimg.drivers.transfer.loop import run_alone
from safeimg.drivers.transfer.progress import Progress
from safeimg.drivers.transfer.rate import TokenBucket


def run(transfer: Transfer, items, work, **options) -> None:  # type: ignore[no-untyped-def]
    async def main() -> None:
        with trio.fail_after(20):
            await transfer.each(items, work, **options)

    trio.run(main)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_item_once(workers: int) -> None:
    seen: list[int] = []
    progress = Progress(sum(range(500)))
    run(Transfer(Settings(workers=workers), progress), iter(range(500)), lambda item, _: seen.append(item),
        cost=lambda item: item)
    assert sorted(seen) == list(range(500))
    assert progress.done == progress.moved == progress.total
    assert progress.fraction == 1.0


def test_one_worker_is_deterministic() -> None:
    seen: list[int] = []
    run(Transfer(Settings(workers=1)), range(100), lambda item, _: seen.append(item))
    assert seen == list(range(100))


def test_turns_follow_the_tickets() -> None:
    turns, passed = Turns(), []
    gate = threading.Event()

    def work(item: int, buffers: BufferPool) -> None:
        if item == 0:
            gate.wait(5)  # the others are ready earlier, and have to wait
        elif item == 2:
            gate.set()
        with turns.turn(item):
            passed.append(item)

    run(Transfer(Settings(workers=3)), range(50), work, turns=turns)
    assert passed == list(range(50))


def test_unordered_turns_only_exclude_each_other() -> None:
    turns, passed, second = Turns(ordered=False), [], threading.Event()

    def work(item: int, buffers: BufferPool) -> None:
        if item == 0:
            assert second.wait(5)
        with turns.turn(item):
            passed.append(item)
        second.set()

    run(Transfer(Settings(workers=2)), range(2), work, turns=turns)
    assert passed == [1, 0]


def test_the_first_failure_is_raised_as_it_is_and_stops_the_rest() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    turns = Turns()

    def work(item: int, buffers: BufferPool) -> None:
        if item == 3:
            raise OSError(5, "no")
        with turns.turn(item):  # tickets after 3 would wait for ever
            pass

    with pytest.raises(OSError, match="no") as raised:
        run(Transfer(Settings(workers=3)), items(), work, turns=turns)
    assert not isinstance(raised.value, ExceptionGroup)
    assert len(taken) < 10


def test_a_failure_within_a_turn_frees_those_who_wait() -> None:
    turns = Turns()

    def work(item: int, buffers: BufferPool) -> None:
        with turns.turn(item):
            if item == 1:
                raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        run(Transfer(Settings(workers=4)), range(100), work, turns=turns)


def test_a_planner_that_fails_ends_the_call() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("bad table")

    with pytest.raises(ValueError, match="bad table"):
        run(Transfer(Settings(workers=2)), items(), lambda item, _: None)


def test_cancelled_between_two_items() -> None:
    finished: list[int] = []
    state: dict[str, object] = {}

    def work(item: int, buffers: BufferPool) -> None:
        if item == 5:
            trio.from_thread.run_sync(state["scope"].cancel, trio_token=state["token"])  # type: ignore
        if item >= 5:
            time.sleep(0.01)
        finished.append(item)

    async def main() -> None:
        with trio.fail_after(20), trio.CancelScope() as scope:
            state.update(scope=scope, token=trio.lowlevel.current_trio_token())
            await Transfer(Settings(workers=1)).each(iter(range(1000)), work)
            raise AssertionError("not cancelled")
        assert scope.cancelled_caught

    trio.run(main)
    assert finished == list(range(len(finished))) and len(finished) < 1000


def test_cancelled_by_a_signal_handler() -> None:
    """Which may only call `cancel`; each worker comes to the end of its item. Nothing is cancelled but a call that
    runs."""
    transfer = Transfer(Settings(workers=2))
    assert not transfer.cancel()
    finished: list[int] = []

    def work(item: int, buffers: BufferPool) -> None:
        if item == 5:
            assert transfer.cancel()
        time.sleep(0.001)
        finished.append(item)

    with pytest.raises(KeyboardInterrupt):
        run(transfer, range(1000), work)
    assert 5 in finished and len(finished) < 10
    assert not transfer.cancel()


def test_a_thread_that_cannot_be_started_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the one that could has come to the end of its item."""
    start, begun, ended = threading.Thread.start, threading.Event(), []

    def start_one(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", no_room)
        start(thread)
        assert begun.wait(20)

    def no_room(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def work(item: int, buffers: BufferPool) -> None:
        begun.set()
        time.sleep(0.05)
        ended.append(item)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    with pytest.raises(RuntimeError, match="new thread"):
        run_alone(lambda: Transfer(Settings(workers=3)).each(range(1000), work))
    assert ended == [0]


def test_what_takes_a_moment_starts_no_loop() -> None:
    program = (
        "import sys; from safeimg.drivers.transfer.core import *; from safeimg.drivers.transfer.loop import run_alone\n"
        "run_alone(lambda: Transfer().each(range(3), lambda item, buffers: None)); assert 'trio' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_cancelled_while_others_wait_for_their_turn() -> None:
    turns = Turns()
    scope = trio.CancelScope()
    tokens: list[trio.lowlevel.TrioToken] = []

    def work(item: int, buffers: BufferPool) -> None:
        if item == 0:
            trio.from_thread.run_sync(scope.cancel, trio_token=tokens[0])
        with turns.turn(item):
            pass

    async def main() -> None:
        tokens.append(trio.lowlevel.current_trio_token())
        with trio.fail_after(20), scope:
            await Transfer(Settings(workers=3)).each(range(10), work, turns=turns)

    trio.run(main)
    assert scope.cancelled_caught


def test_cancelled_while_the_rate_limit_holds_it() -> None:
    async def main() -> None:
        with trio.fail_after(20), trio.move_on_after(0.05) as scope:
            transfer = Transfer(Settings(workers=2, rate=1))
            await transfer.each(range(10), lambda item, _: None, cost=lambda _: 1000)
        assert scope.cancelled_caught

    trio.run(main)


def test_buffers_are_kept_and_aligned() -> None:
    import ctypes

    buffers = Buffers()
    first = buffers.get(100_000)
    address = ctypes.addressof(ctypes.c_char.from_buffer(first))
    assert address % 4096 == 0
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffers.get(10))) == address
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffers.get(10, slot=1))) != address
    assert len(buffers.get(300_000)) == 300_000


def test_workers_share_no_buffer_and_reuse_them_between_calls() -> None:
    transfer = Transfer(Settings(workers=2))
    both = threading.Barrier(2)
    ids: list[int] = []

    def work(item: int, buffers: BufferPool) -> None:
        both.wait(5)
        ids.append(id(buffers))

    run(transfer, range(2), work)
    assert len(set(ids)) == 2
    run(transfer, range(2), work)
    assert len(set(ids)) == 2


def test_the_rate_holds_whatever_the_size_of_the_chunks() -> None:
    for rate, chunk in ((1 << 20, 1 << 20), (100 << 20, 1 << 20), (10 << 20, 4096), (12345, 1 << 20)):
        now = 0.0
        bucket = TokenBucket(rate, lambda: now)  # noqa: B023
        moved = 0
        while now < 10 or moved < 10 * rate:
            now += bucket.take(chunk)
            moved += chunk
        assert abs(moved / now - rate) / rate < 0.03


def test_a_pause_is_not_made_good_by_a_burst() -> None:
    now = 0.0
    bucket = TokenBucket(1000, lambda: now)
    now = 3600.0
    assert bucket.take(100) == 0.0
    assert bucket.take(1000) == pytest.approx(1.0)


def test_sensible_workers() -> None:
    assert sensible_workers(1) == 1
    assert 2 <= sensible_workers(16) <= 16
