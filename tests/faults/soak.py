"""Every call of every commit, of its resume and of its rollback fails: `python -m faults.soak --jobs 2`.

What the tests beside this do with some of the calls, with all of them. Prints a line for each scenario; ends with 1 if
there was any failure, after telling which call it was.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

from faults.faulting import (
    ACTIONS,
    CODES,
    acknowledged_or_pending,
    calls,
    count,
    crash,
    fail_on,
    fail_once,
    judge_of,
    killed,
    read_fails,
    recovery_fails,
    run_on_full_disk,
    settle_on_full_disk,
    settles_everywhere,
    sync_fails,
)
from powercut.judge import Judge
from powercut.scenarios import COMMITS
from safeimg.drivers.storage.faults import CHANGES, READS

MEMBERS = ("none", "random:0", "random:1")  # of the power cuts between a failure and its recovery
SYNCS = frozenset({"sync", "sync_all"})
ROOM = 400_000  # bytes: more than any of the commits takes, its log included
KILLS = (0.3, 0.5, 0.6, 0.75, 0.9)  # how far a commit is that is killed, and whose recovery then fails


def cases(judge: Judge, stride: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Everything to be tried, with a name."""
    for code in CODES:
        for number in range(1, calls(judge) + 1, stride):
            yield f"call {number} fails with {code}", partial(_fails, judge, number, code, forever=False)
        for number in range(1, count(judge) + 1, stride):
            yield f"calls from {number} on fail with {code}", partial(_fails, judge, number, code, forever=True)
    for number in range(1, count(judge, SYNCS) + 1, stride):
        yield f"sync {number} fails", partial(_sync_fails, judge, number)
    for number in range(1, count(judge, READS) + 1, 4 * stride):
        yield f"read {number} fails", partial(read_fails, judge, number)
    for room in range(0, ROOM, 4096 * stride):
        yield f"room for {room} bytes", partial(_full, judge, room)
    for number in range(1, calls(judge) + 1, stride):
        yield f"a full disk after call {number}", partial(_full_after, judge, number)
    for number in (int(far * calls(judge)) for far in KILLS):
        for action in ACTIONS:
            for what, kinds in (("calls", CHANGES), ("reads", READS)):
                case = partial(_recovery_fails, judge, number, action, kinds, stride)
                yield f"{what} of the {action} after call {number} fail", case


def _fails(judge: Judge, number: int, code: int, *, forever: bool) -> None:
    fs, error = (fail_on if forever else fail_once)(judge, number, code)
    acknowledged_or_pending(judge, fs, error, seed=number, members=MEMBERS)


def _sync_fails(judge: Judge, number: int) -> None:
    fs = sync_fails(judge, number)
    settles_everywhere(judge, fs, seed=number, members=MEMBERS)
    judge.crash_again(crash(fs, number), seed=number, count=4)


def _full(judge: Judge, room: int) -> None:
    fs, error = run_on_full_disk(judge, room)
    acknowledged_or_pending(judge, fs, error, seed=room)


def _full_after(judge: Judge, number: int) -> None:
    settle_on_full_disk(judge, killed(judge, number))


def _recovery_fails(judge: Judge, number: int, action: str, kinds: frozenset[str], stride: int) -> None:
    recovery_fails(judge, killed(judge, number), action, kinds, stride=stride)


def soak(name: str, stride: int) -> tuple[str, int, list[str]]:
    """Tries everything with one commit: how many cases, and what failed."""
    judge = judge_of(name)
    failures = []
    number = 0
    for what, case in cases(judge, stride):
        number += 1
        try:
            case()
        except Exception as error:
            failures.append(f"{name}: {what}: {type(error).__name__}: {error}")
    return name, number, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--stride", type=int, default=1, help="every how manieth call")
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    options = parser.parse_args()
    names = [scenario.name for scenario in COMMITS if options.only in scenario.name]
    started = time.monotonic()
    total = failed = 0
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for task in [pool.apply_async(soak, (name, options.stride)) for name in names]:
            name, number, failures = task.get()
            total, failed = total + number, failed + len(failures)
            print(f"{name}: {number} cases, {len(failures)} failures", flush=True)
            print("".join(f"    {failure}\n" for failure in failures), end="", flush=True)
    print(f"{total} cases in {time.monotonic() - started:.0f} s, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
