"""Crash states of one scenario, as many as wanted, each time others: what the soak does with its share of the time.

    states      of the operation: killed, and the power cut, after calls that the seed chooses
    second      of the recovery from one of them
    deeper      a recovery is crashed, what it leaves is recovered and crashed, and so on until one finishes
    failed      a sync of the operation, or of a recovery, fails once; what that leaves, and what the power leaves of it
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from powercut.judge import CLEAN, Judge, Leg
from powercut.look import Violation
from safeimg.drivers.storage.powercut import CrashState, crash_states, replay
from safeimg.drivers.storage.simulated import SimulatedFileSystem, Trace
from safeimg.ops.errors import Impossible
from safeimg.recovery.pending import NothingPending

QEMU_EVERY = 30  # slices between two with a state that qemu-img judges too
DEEPEST = 12  # crashes in a row
SYNCS = ("sync", "sync_all")


def slice_of(judge: Judge, seed: int, folder: Path) -> None:
    """Some fifty states, the same for the same seed. Raises `Violation`."""
    rng = random.Random(f"{judge.scenario.name}:{seed}")
    total = len(judge.trace_of.trace)
    prefixes = sorted(rng.sample(range(total + 1), 2))
    first = list(judge.states(seed=seed, prefixes=prefixes, subsets_per_prefix=4, singles_per_prefix=3))
    looked = rng.choice(first) if rng.randrange(QEMU_EVERY) == 0 else None
    for state in first:
        judge.judge(state, qemu=folder if state is looked else None)
    if judge.scenario.bare:
        if judge.scenario.created:  # else what the failed sync should have covered is not written anew
            _failed_run(judge, seed, rng)
        return
    killed = [state for state in first if state.kind == "kill"]
    many = judge.counter.repeated > judge.counter.states  # what is new lies deeper then
    _second(judge, rng.choice(killed if rng.random() < 0.5 else first), seed, rng, crashes=4 if many else 1)
    if rng.random() < 0.5:
        _deeper(judge, rng.choice(first), rng)
    else:
        _failed(judge, rng.choice(first), seed, rng)


def _second(judge: Judge, state: CrashState, seed: int, rng: random.Random, *, crashes: int) -> None:
    """`crashes`: of either recovery."""
    leg = Leg("run", 0, state.description)
    for action in ("resume", "rollback"):
        trace = recovered(judge, state.fs, [leg], action)[1]
        if len(trace):
            again = crash_states(
                state.fs, trace, seed=seed,
                prefixes=sorted(rng.sample(range(1, len(trace) + 1), min(crashes, len(trace)))),
                subsets_per_prefix=1, singles_per_prefix=1,
            )
            for second in again:
                judge.counter.second += judge.judged(second.fs, [leg, Leg(action, 0, second.description)])


def _deeper(judge: Judge, state: CrashState, rng: random.Random) -> None:
    """Crashed again and again until a recovery finishes."""
    legs = [Leg("run", 0, state.description)]
    fs = state.fs
    while len(legs) < DEEPEST:
        back = any(leg.action == "rollback" for leg in legs)
        action = "rollback" if back else rng.choice(("resume", "resume", "rollback"))
        trace = recovered(judge, fs, legs, action)[1]
        at = rng.randrange(len(trace) + 2)  # now and then nothing happens to it
        if at >= len(trace):
            return
        states = list(crash_states(fs, trace, seed=at, prefixes=[at], subsets_per_prefix=1, singles_per_prefix=1))
        chosen = rng.choice([one for one in states if one.kind == "kill"] if rng.random() < 0.4 else states)
        legs = [*legs, Leg(action, 0, chosen.description)]
        judge.counter.deeper += judge.judged(chosen.fs, legs)
        fs = chosen.fs


def _failed(judge: Judge, state: CrashState, seed: int, rng: random.Random) -> None:
    """A sync fails in the operation; and one in a recovery from `state`."""
    fs, failed = _failed_run(judge, seed, rng)
    if rng.random() < 0.5:  # …or from what that left
        legs = [failed]
    else:
        fs, legs = state.fs, [Leg("run", 0, state.description)]
    action = rng.choice(("resume", "rollback"))
    syncs = count_syncs(recovered(judge, fs, legs, action)[1])
    if syncs:
        number = rng.randrange(syncs) + 1
        trace = recovered(judge, fs, legs, action, failing=number)[1]
        _after_failure(judge, fs, trace, legs, Leg(action, number, ""), seed)


def _failed_run(judge: Judge, seed: int, rng: random.Random) -> tuple[SimulatedFileSystem, Leg]:
    """What the operation leaves, one of whose syncs fails."""
    number = rng.randrange(count_syncs(judge.trace_of.trace)) + 1
    fs, trace = run_failing(judge, number)
    _after_failure(judge, judge.initial, trace, [], Leg("run", number, ""), seed)
    return fs, Leg("run", number, _whole(trace))


def _after_failure(
    judge: Judge, initial: SimulatedFileSystem, trace: Trace, legs: Sequence[Leg], leg: Leg, seed: int
) -> None:
    """What the failure left, and what the power then leaves of it."""
    after = crash_states(
        initial, trace, seed=seed, prefixes=[len(trace)], subsets_per_prefix=2, singles_per_prefix=2, unique=False
    )
    for state in after:
        found = [*legs, leg._replace(crash=state.description)]
        judge.counter.failed += judge.judged(state.fs, found)


def _whole(trace: Trace) -> str:
    return f"prefix={len(trace)} seed=0 kind=kill member=whole"


def count_syncs(trace: Trace) -> int:
    return sum(entry.kind in SYNCS for entry in trace.entries)


def run_failing(judge: Judge, number: int) -> tuple[SimulatedFileSystem, Trace]:
    """The operation with its `number`-th sync failing once, and what it did."""
    fs = judge.initial.clone()
    fs.fail_sync(number)
    try:
        judge.scenario.execute(fs)
    except CLEAN:
        return fs, fs.trace
    try:
        judge.acknowledged(fs, "run", "finished")
    except Violation as error:
        raise judge.violation([Leg("run", number, _whole(fs.trace))], error) from error
    return fs, fs.trace


def recovered(
    judge: Judge, fs: SimulatedFileSystem, legs: Sequence[Leg], action: str, *, failing: int = 0
) -> tuple[SimulatedFileSystem, Trace]:
    """A recovery from the state that the legs led to, on a copy of it; and what it did. `Violation` if it fails though
    no sync was to."""
    fs = fs.clone()
    if failing:
        fs.fail_sync(failing)
    try:
        done = judge.attempt(fs, action)
        if failing:
            judge.acknowledged(fs, action, done)
    except (NothingPending, Impossible):
        pass
    except Violation as error:
        raise judge.violation([*legs, Leg(action, failing, _whole(fs.trace))], error) from error
    except CLEAN as error:
        if not failing:
            raise judge.violation(legs, error) from error
    return fs, fs.trace


# ---- made again


def follow(judge: Judge, legs: Sequence[Leg]) -> list[tuple[SimulatedFileSystem, Trace, CrashState]]:
    """For each leg: where it began, what was done, and the crash. `ValueError` if there is no such state."""
    made: list[tuple[SimulatedFileSystem, Trace, CrashState]] = []
    fs = judge.initial
    for number, leg in enumerate(legs):
        if leg.action == "run":
            trace = run_failing(judge, leg.failing)[1] if leg.failing else judge.trace_of.trace
        else:
            trace = recovered(judge, fs, legs[:number], leg.action, failing=leg.failing)[1]
        state = replay(fs, trace, leg.crash)
        made.append((fs, trace, state))
        fs = state.fs
    return made


def judge_again(judge: Judge, legs: Sequence[Leg]) -> None:
    """Judges the state that the legs lead to. Raises `Violation`, or `ValueError` if there is no such state."""
    judge.seen.clear()
    judge.judged(follow(judge, legs)[-1][2].fs, legs)


def parse(words: str) -> list[Leg]:
    """The legs that `Judge.name_of` writes, without the scenario's name."""
    legs = []
    for number, part in enumerate(words.split(">")):
        action, crash = "run", part.strip().partition("#")[0].strip()
        if not crash.startswith("prefix="):
            action, _, crash = crash.partition(": ")
        action, _, failing = action.partition("!")
        if (action == "run") != (number == 0) or action not in ("run", "resume", "rollback"):
            raise ValueError(f"not how a crash state came about: {part.strip()!r}")
        legs.append(Leg(action, int(failing or 0), crash.strip()))
    return legs
