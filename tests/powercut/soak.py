"""The power-cut simulation for as long as told: `python -m powercut.soak --seconds 600 --jobs 2 --seed 1`.

Prints what was judged for each scenario, states a minute and in all; ends with 1 at the first violation, whose message
replays it: `python -m powercut.soak --replay "SCENARIO: DESCRIPTION"`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

from powercut.catalogue import EVERYTHING
from powercut.judge import Counter, Judge, Scenario, Violation

QEMU_EVERY = 40  # states between two that qemu-img judges too
AGAIN_EVERY = 25  # states between two whose recovery is crashed again
PREFIXES = 16  # of a scenario's trace that one round cuts at, sampled anew with each seed


def soak(scenario: Scenario, seed: int, until: float) -> tuple[str, Counter, str | None]:
    """Judges one scenario's crash states with one seed, until the time is up."""
    judge = Judge(scenario)
    counter = judge.counter
    with tempfile.TemporaryDirectory(prefix="powercut-") as folder:
        try:
            for state in judge.states(seed=seed, prefixes=PREFIXES, subsets_per_prefix=4, singles_per_prefix=4):
                number = counter.states
                judge.judge(state, qemu=Path(folder) if number % QEMU_EVERY == 0 else None)
                if number % AGAIN_EVERY == 0:
                    judge.crash_again(state, seed=seed, count=6)
                if time.monotonic() > until:
                    break
        except Violation as violation:
            return scenario.name, counter, str(violation)
    return scenario.name, counter, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--states", type=int, help="stop after the round that reaches so many, crashed recoveries too")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1, help="the first one; each round takes the next")
    parser.add_argument("--only", default="", help="scenarios whose name contains this")
    options = parser.parse_args()
    chosen = [scenario for scenario in EVERYTHING if options.only in scenario.name]
    started = time.monotonic()
    until = started + options.seconds
    total = Counter()
    seed = options.seed
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        while time.monotonic() < until:
            tasks = [pool.apply_async(_named, (scenario.name, seed, until)) for scenario in chosen]
            for task in tasks:
                name, counter, violation = task.get()
                total.add(counter)
                minutes = (time.monotonic() - started) / 60
                rate = (total.states + total.second) / minutes
                print(f"seed {seed}  {name:<40} {counter}  in all {total.states} + {total.second}, {rate:.0f} a minute",
                      flush=True)
                if violation is not None:
                    print(violation, file=sys.stderr, flush=True)
                    return 1
            seed += 1
            if options.states is not None and total.states + total.second >= options.states:
                break
    print(f"{total.states} states and {total.second} of crashed recoveries judged, no violation: {total}")
    return 0


def _named(name: str, seed: int, until: float) -> tuple[str, Counter, str | None]:
    return soak(next(each for each in EVERYTHING if each.name == name), seed, until)


if __name__ == "__main__":
    raise SystemExit(main())
