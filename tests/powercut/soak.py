"""The power-cut simulation for as long as told: `python -m powercut.soak --seconds 600 --jobs 2 --seed 1`.

Every scenario gets the same share of the time: the next slice of states is always one of those that had least. Ends
with a table of what was judged, or at the first violation, with 1 and the shortest way to it that was found, which can
be gone again: `python -m powercut.soak --replay "SCENARIO: DESCRIPTION"`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import multiprocessing
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from multiprocessing.pool import AsyncResult
from pathlib import Path

from powercut.catalogue import EVERYTHING
from powercut.explore import judge_again, parse, slice_of
from powercut.judge import Counter, Judge
from powercut.look import Violation
from powercut.mutations import MUTATIONS, broken
from powercut.report import Tally, add_up, features_of, operation_of, save, table
from powercut.shrink import shrunk

TELL_EVERY = 10.0  # seconds


@dataclass
class Slice:
    """What one process has judged of one scenario."""

    scenario: str
    counter: Counter = field(default_factory=Counter)
    new: set[bytes] = field(default_factory=set)
    seconds: float = 0.0
    features: tuple[str, ...] = ()
    violation: str | None = None


@functools.cache
def judge_of(name: str) -> tuple[Judge, tuple[str, ...]]:
    """One for each process and scenario, and the features of its images."""
    gc.set_threshold(50_000, 20, 20)
    judge = Judge(next(scenario for scenario in EVERYTHING if scenario.name == name))
    return judge, features_of(judge)


def judge_slice(name: str, seed: int, seen: Collection[bytes]) -> Slice:
    """A slice of a scenario's states, but for those that were `seen`."""
    started = time.process_time()
    try:
        judge, features = judge_of(name)
    except Exception as error:
        return Slice(name, violation=f"{name}: an uninterrupted run fails: {type(error).__name__}: {error}")
    judge.counter, judge.seen = Counter(), set(seen)
    done = Slice(name, judge.counter, features=features)
    with tempfile.TemporaryDirectory(prefix="powercut-") as folder:
        try:
            slice_of(judge, seed, Path(folder))
        except Violation as violation:
            done.violation = told(violation, shrunk(Judge(judge.scenario), violation.legs) if violation.legs else None)
    done.new = judge.seen.difference(seen)
    done.seconds = time.process_time() - started
    return done


def told(violation: Violation, shorter: Violation | None) -> str:
    """A violation in words, and the command that shows it again."""
    best = shorter or violation
    lines = [str(best)]
    if shorter is not None and shorter.legs != violation.legs:
        lines.append(f"found as {str(violation).partition(chr(10) + '  ')[0]}")
    where = " ".join(line.strip() for line in str(best).splitlines()[: len(best.legs)])
    return "\n".join([*lines, f"again: python -m powercut.soak --replay {shlex.quote(_bare(where))}"])


def _bare(where: str) -> str:
    """Without what descriptions explain."""
    return " > ".join(part.partition(" #")[0].strip() for part in where.split(" > "))


class Soak:
    """Hands out slices, and adds up what comes back."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.tallies = {
            scenario.name: Tally(operation_of(scenario.name))
            for scenario in EVERYTHING
            if options.only in scenario.name
        }
        names = random.Random(options.seed).sample(list(self.tallies), len(self.tallies))  # if time is short
        if options.after is not None:
            add_up(options.after, self.tallies)
        self._earlier = self.states
        self._slices = dict.fromkeys(names, 0)
        self._spent = dict.fromkeys(names, 0.0)
        self._started = self._told = time.monotonic()
        self.violations: list[str] = []

    def run(self) -> None:
        """Until it is enough, or until the first violation, if that is wanted."""
        running: dict[str, AsyncResult[Slice]] = {}
        with multiprocessing.get_context("fork").Pool(self.options.jobs) as pool:
            while True:
                while len(running) < self.options.jobs and (name := self._next(running)) is not None:
                    seed = self.options.seed * 1_000_003 + self._slices[name]
                    self._slices[name] += 1
                    task = pool.apply_async(judge_slice, (name, seed, frozenset(self.tallies[name].seen)))
                    running[name] = task
                if not running:
                    return
                next(iter(running.values())).wait(0.02)
                for name in [name for name, task in running.items() if task.ready()]:
                    done = running.pop(name).get()
                    self._add(done)
                    if done.violation is not None:
                        self.violations.append(done.violation)
                        del self._spent[name]
                        print(done.violation, file=sys.stderr, flush=True)
                        if not self.options.go_on:
                            return

    def _next(self, running: Collection[str]) -> str | None:
        """The scenario that had least time, unless there was enough of it."""
        options = self.options
        if time.monotonic() - self._started >= options.seconds:
            return None
        if options.states is not None and self.states >= options.states:
            return None
        waiting = [
            name
            for name, tally in ((name, self.tallies[name]) for name in self._spent)
            if name not in running and (options.each is None or tally.counter.total < options.each)
            and (options.slices is None or self._slices[name] < options.slices)
        ]
        return min(waiting, key=lambda name: self._spent[name], default=None)

    def _add(self, done: Slice) -> None:
        tally = self.tallies[done.scenario]
        tally.counter.add(done.counter)
        tally.seen |= done.new
        tally.seconds += done.seconds
        tally.features = done.features or tally.features
        # Where most states have been seen before, others come first.
        self._spent[done.scenario] += done.seconds * (1 + done.counter.repeated / max(1, done.counter.total))
        if time.monotonic() - self._told > TELL_EVERY:
            self._told = time.monotonic()
            print(self.summary(), flush=True)

    @property
    def states(self) -> int:
        return sum(tally.counter.total for tally in self.tallies.values())

    def summary(self) -> str:
        minutes = (time.monotonic() - self._started) / 60
        begun = sum(bool(tally.seen) for tally in self.tallies.values())
        return (
            f"{minutes:6.1f} minutes: {self.states} states of {begun} scenarios, "
            f"{(self.states - self._earlier) / minutes:.0f} a minute; "
            f"{sum(tally.counter.repeated for tally in self.tallies.values())} repeated"
        )


def replay(words: str, mutation: str) -> int:
    """Judges the state that the words name, with a rule broken if one is given."""
    name, _, way = words.partition(": ")
    chosen = [scenario for scenario in EVERYTHING if scenario.name == name]
    if not chosen:
        print(f"there is no scenario {name!r}", file=sys.stderr)
        return 2
    try:
        legs = parse(way)
        if mutation:
            with broken(next(each for each in MUTATIONS if each.name == mutation)):
                judge_again(Judge(chosen[0]), legs)
        else:
            judge_again(Judge(chosen[0]), legs)
    except Violation as violation:
        print(violation)
        return 1
    except ValueError as error:
        print(f"there is no such state: {error}", file=sys.stderr)
        return 2
    print("no violation")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--states", type=int, help="stop when so many were judged")
    parser.add_argument("--each", type=int, help="stop with a scenario when so many of it were judged")
    parser.add_argument("--slices", type=int, help="…or when it had so many slices, of some fifty states each")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    parser.add_argument("--go-on", action="store_true", help="with the other scenarios after a violation")
    parser.add_argument("--json", type=Path, help="where the results go, for `powercut.report` to add up")
    parser.add_argument("--after", type=Path, help="goes on where the run ended whose results these are")
    parser.add_argument("--replay", metavar="STATE", help="judge this one state, as a violation names it")
    parser.add_argument("--mutation", default="", help="with the rule broken that `powercut.mutations` calls this")
    options = parser.parse_args()
    if options.replay is not None:
        return replay(options.replay, options.mutation)
    soak = Soak(options)
    with contextlib.suppress(KeyboardInterrupt):  # what there is by then counts
        soak.run()
    print(table(soak.tallies))
    print(soak.summary())
    if options.json is not None:
        save(options.json, soak.tallies)
    if soak.violations:
        print(f"{len(soak.violations)} scenarios with violations", file=sys.stderr)
        return 1
    total = Counter()
    for tally in soak.tallies.values():
        total.add(tally.counter)
    print(f"no violation: {total}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
