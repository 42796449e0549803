"""Calls that fail, and what has to hold afterwards: one clean line, nothing lost, both ways out of it open."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

from powercut import straight
from powercut.judge import Judge, Look, Scenario, environment, sidecars
from powercut.scenarios import COMMITS
from safeimg.drivers.errors import DriverError, SyncFailed
from safeimg.drivers.storage.api import FileSystem
from safeimg.drivers.storage.faults import CHANGES, READS, Faults, FaultyFileSystem
from safeimg.drivers.storage.powercut import CrashState, power_cut
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.journal.errors import JournalError
from safeimg.journal.log import read_events
from safeimg.journal.state import OperationState, fold
from safeimg.ops.errors import OperationError
from safeimg.recovery.gate import begin_or_resume
from safeimg.recovery.settle import resume, rollback

CODES = (errno.ENOSPC, errno.EIO)
CLEAN = (DriverError, JournalError, OperationError)
ACTIONS = ("resume", "rollback")


def scenario(name: str) -> Scenario:
    return next(found for found in COMMITS if found.name == name)


@cache
def judge_of(name: str) -> Judge:
    """The judge of the commit of that name: what is expected before and after, and the trace of a run."""
    return Judge(scenario(name))


def attempt(judge: Judge, fs: FileSystem, action: str = "run") -> Exception | None:
    """Runs the operation (with "again" as the identical command), or settles it, on `fs` itself. The error that it
    ended with, which must be a clean one: whatever else comes out is a traceback in the user's terminal, and goes
    through."""

    async def main() -> None:
        around = environment(fs)  # type: ignore[arg-type]
        if action == "run":
            await judge.scenario.run(around)
        elif action == "again":
            assert judge.scenario.top is not None
            await begin_or_resume(judge.scenario.top, around, "commit", lambda: judge.scenario.run(around))
        else:
            await (resume if action == "resume" else rollback)(judge.scenario.home, around)

    try:
        straight.run(main)
    except CLEAN as error:
        assert "\n" not in str(error).strip() and str(error).strip(), repr(error)
        return error
    return None


def log_state(fs: SimulatedFileSystem, home: str) -> OperationState | None:
    """What the log beside the home image says; None if there is none, or nothing durable in it."""
    if fs.stat(home + ".safeimg") is None:
        return None
    try:
        return fold(read_events(fs, home + ".safeimg"))
    except JournalError:
        return None


def is_done(judge: Judge, fs: SimulatedFileSystem) -> bool:
    """Whether the operation is over: what an acknowledged one has to stay whatever comes."""
    images = judge.scenario.images
    return not sidecars(fs) and all(Look.at(fs, path, fmt) == judge.after[path] for path, fmt in images)


def settles_everywhere(judge: Judge, fs: SimulatedFileSystem, *, seed: int, members: Sequence[str] = ("none",)) -> None:
    """The fault is gone: what it left can be resumed and rolled back, at once and after a power cut, and what that
    reaches survives the next power cut."""
    judge.judge(CrashState(fs.clone(), 0, seed, "kill", "whole", ()))
    for member in members:
        judge.judge(CrashState(power_cut(fs, member, seed=seed), 0, seed, "power", member, ()))
    for action in ACTIONS:
        stays(judge, judge.settles(fs, action), fs)


def stays(judge: Judge, settled: SimulatedFileSystem, pending: SimulatedFileSystem) -> None:
    """A recovery's result is durable; it may leave what is pending only behind the point of no return."""
    cut = power_cut(settled, "none")
    if sidecars(settled):
        state = log_state(pending, judge.scenario.home)
        assert state is not None and (state.past_return or state.outcome is not None), "refused without a reason"
    elif not sidecars(pending):  # there was nothing to do; but the log may be back, whose removal was not durable
        cut = judge.settles(cut, "resume")
    assert sidecars(cut) == sidecars(settled)
    for path, fmt in judge.scenario.images:
        assert Look.at(cut, path, fmt) == Look.at(settled, path, fmt), f"{path} did not survive a power cut"


def calls(judge: Judge) -> int:
    """How many mutating calls an undisturbed run makes."""
    return len(judge.trace_of.trace)


def fail_once(judge: Judge, number: int, code: int) -> tuple[SimulatedFileSystem, Exception | None]:
    """The `number`-th mutating call fails."""
    fs = judge.initial.clone()
    fs.fail_at(number, code)
    return fs, attempt(judge, fs)


def fail_on(judge: Judge, number: int, code: int) -> tuple[SimulatedFileSystem, Exception | None]:
    """The `number`-th mutating call fails, and every later one."""
    fs = judge.initial.clone()
    faults = Faults(CHANGES, at=number, code=code, forever=True)
    return fs, attempt(judge, FaultyFileSystem(fs, faults))


def count(judge: Judge, kinds: Iterable[str] = CHANGES, paths: Callable[[str], bool] | None = None) -> int:
    """How many such calls an undisturbed run makes."""
    faults = Faults(frozenset(kinds), paths=paths)
    assert attempt(judge, FaultyFileSystem(judge.initial.clone(), faults)) is None
    return len(faults.calls)


def acknowledged_or_pending(
    judge: Judge, fs: SimulatedFileSystem, error: Exception | None, *, seed: int, members: Sequence[str] = ("none",)
) -> None:
    """After a run with faults: what was reported as done is done and durable; everything else can be settled."""
    if error is None:
        assert is_done(judge, fs) and is_done(judge, power_cut(fs, "none")), "acknowledged, and not done"
    settles_everywhere(judge, fs, seed=seed, members=members)


def crash(fs: SimulatedFileSystem, number: int) -> CrashState:
    """What a failed process left, as the judge of crash states takes it."""
    return CrashState(fs, number, 0, "kill", "whole", ())


def killed(judge: Judge, number: int) -> SimulatedFileSystem:
    """What a process leaves that is killed at its `number`-th mutating call."""
    return next(judge.states(prefixes=[number - 1], kinds=("kill",))).fs


WRITES = frozenset({"write", "zero", "truncate", "preallocate", "discard", "attributes", "create", "rename"})


def sync_fails(judge: Judge, number: int) -> SimulatedFileSystem:
    """The `number`-th sync fails once: the run ends with that, and touches no file's content afterwards."""
    fs = judge.initial.clone()
    fs.begin_trace()
    fs.fail_sync(number)
    error = attempt(judge, fs)
    assert isinstance(error, SyncFailed), repr(error)
    kinds = [entry.kind for entry in fs.trace.entries]
    assert not WRITES.intersection(kinds[kinds.index("sync_failed") :]), kinds
    return fs


def rollback_syncs_fail(judge: Judge) -> Iterator[SimulatedFileSystem]:
    """What kills leave and a rollback, one of whose syncs fails once: what that should have covered counts as clean
    from then on, and is lost when the power goes."""
    total = len(judge.trace_of.trace.entries)
    for prefix in range(total // 4, total, total // 6):
        state = log_state(killed(judge, prefix), judge.scenario.home)
        if state is None or state.past_return or state.outcome is not None:
            continue
        for number in itertools.count(1):
            fs = killed(judge, prefix)
            fs.begin_trace()
            fs.fail_sync(number)
            error = attempt(judge, fs, "rollback")
            if not isinstance(error, SyncFailed):
                break
            yield fs


def read_fails(judge: Judge, number: int, paths: Callable[[str], bool] | None = None) -> None:
    """The `number`-th read or open of such a file fails once."""
    fs = judge.initial.clone()
    faults = Faults(READS, at=number, code=errno.EIO, paths=paths)
    error = attempt(judge, FaultyFileSystem(fs, faults))
    acknowledged_or_pending(judge, fs, error, seed=number)


def recovery_fails(
    judge: Judge,
    fs: SimulatedFileSystem,
    action: str,
    kinds: Iterable[str] = CHANGES,
    paths: Callable[[str], bool] | None = None,
    *,
    first: int = 1,
    stride: int = 1,
) -> int:
    """Every `stride`-th call fails while what is pending is settled; it can be settled afterwards. How many did."""
    counted = Faults(frozenset(kinds), paths=paths)
    attempt(judge, FaultyFileSystem(fs.clone(), counted), action)
    numbers = range(first, len(counted.calls) + 1, stride)
    for number in numbers:
        broken = fs.clone()
        code = CODES[number % 2]
        faults = Faults(frozenset(kinds), at=number, code=code, forever=number % 3 == 0, paths=paths)
        error = attempt(judge, FaultyFileSystem(broken, faults), action)
        if error is None:
            assert not sidecars(broken), f"{action} says that it is done"
        for left in (broken, power_cut(broken, "none")):
            judge.settles(left, "rollback")
            if action == "resume":
                judge.settles(left, "resume")
    return len(numbers)


def run_on_full_disk(judge: Judge, room: int) -> tuple[SimulatedFileSystem, Exception | None]:
    """The operation on a disk with so many bytes of room, and what is left, on a disk with room again."""
    fs = judge.initial.clone()
    fs.set_capacity(fs.used() + room)
    error = attempt(judge, fs)
    if error is not None:
        settle_on_full_disk(judge, fs)
    fs.set_capacity(None)
    return fs, error


def settle_on_full_disk(judge: Judge, fs: SimulatedFileSystem) -> None:
    """Not a byte is free: rollback works. Resume may stop again, cleanly, and rollback works then too."""
    full = fs.clone()
    full.set_capacity(full.used())
    stays(judge, judge.settles(full, "rollback"), full)
    error = attempt(judge, full, "resume")
    full.set_capacity(full.used())
    if error is not None:
        judge.settles(full, "rollback")
        full.set_capacity(None)
        judge.settles(full, "resume")
