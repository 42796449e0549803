"""A bounded slice of the power-cut simulation; `make crash-soak` runs it for as long as told."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from powercut.catalogue import SCENARIOS
from powercut.explore import parse, slice_of
from powercut.judge import Judge, Leg
from powercut.look import Violation
from powercut.mutations import MUTATIONS, broken, caught
from powercut.report import FEATURES, Tally, features_of, operation_of, save, table
from powercut.scenarios import Scenario
from powercut.shrink import shrunk
from powercut.soak import told

QUICK = ("before-images are not synced before the event that names them", "no fence", "no pointers beside participants")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_crash_states(scenario: Scenario, tmp_path: Path) -> None:
    judge = Judge(scenario)
    assert features_of(judge)
    counter = judge.counter
    for seed in range(3):  # of short ones, one slice shows next to nothing
        slice_of(judge, seed, tmp_path)
        if counter.states + counter.failed >= 5:
            break
    assert counter.states + counter.failed >= 5
    assert scenario.bare or counter.rolled_back + counter.refused + counter.nothing


@pytest.mark.parametrize("mutation", [each for each in MUTATIONS if each.name in QUICK], ids=lambda each: each.name)
def test_the_simulation_bites(mutation: object) -> None:
    """The whole catalogue is run by `make mutations`."""
    _, violation = caught(mutation)  # type: ignore[arg-type]
    assert violation is not None


def test_runs_are_alike() -> None:
    """Whenever and wherever: else a violation could not be made again."""
    one, two = (Judge(SCENARIOS[0]).trace_of.trace.entries for _ in range(2))
    assert one == two and len(one) > 50


def test_a_violation_is_made_small_and_made_again(tmp_path: Path) -> None:
    """By another process, from what was printed."""
    mutation = next(each for each in MUTATIONS if each.name == QUICK[0])
    scenario = next(each for each in SCENARIOS if each.name == mutation.scenario)
    with broken(mutation):
        judge = Judge(scenario)
        with pytest.raises(Violation) as found:
            for state in judge.states(seed=1, prefixes=30, subsets_per_prefix=3, singles_per_prefix=0):
                if state.member.startswith("random"):
                    judge.judge(state)
        shorter = shrunk(Judge(scenario), found.value.legs)
    assert shorter is not None and len(shorter.legs) == 1
    lost = shorter.legs[0].crash.partition("lost:")[2].split("+")
    assert lost[0] and len(lost) <= 2  # of some ten that a random state loses
    command = told(found.value, shorter).splitlines()[-1]
    again = re.fullmatch(r"again: python -m powercut\.soak --replay '(.*)'", command)
    assert again is not None and again[1].startswith("commit into raw: prefix=")
    arguments = [sys.executable, "-m", "powercut.soak", "--replay", again[1]]
    around = {**os.environ, "PYTHONHASHSEED": "99"}
    tests = Path(__file__).parent.parent
    here = subprocess.run(arguments, cwd=tests, env=around, capture_output=True, text=True, check=False)
    assert here.returncode == 2 and here.stderr.startswith("there is no such state: "), here  # the rule is kept
    there = subprocess.run(
        [*arguments, "--mutation", mutation.name], cwd=tests, env=around, capture_output=True, text=True, check=False
    )
    assert there.returncode == 1 and there.stdout.splitlines()[0] == str(shorter).splitlines()[0], there.stderr


@pytest.mark.parametrize(
    "words",
    ["prefix=3 seed=1 kind=power member=none", "run!4: prefix=9 seed=0 kind=kill member=whole # lost: much",
     "prefix=3 seed=1 kind=power member=none > resume: prefix=2 seed=1 kind=kill member=whole > "
     "rollback!2: prefix=5 seed=1 kind=power member=lost:d5@0-512,1024-1536+n3"],
)  # fmt: skip
def test_ways_to_a_state_are_read_as_written(words: str) -> None:
    assert " > ".join(map(str, parse(words))) == words.partition(" #")[0]


@pytest.mark.parametrize("words", ["", "nonsense", "resume: prefix=1 seed=1 kind=kill member=whole", "run!x: prefix=1"])
def test_what_is_no_way_to_a_state(words: str) -> None:
    with pytest.raises(ValueError, match=r"not how|int"):
        parse(words)


def test_results_of_runs_are_added_up(tmp_path: Path) -> None:
    """A state that both have judged counts once."""
    judge = Judge(SCENARIOS[0])
    slice_of(judge, 1, tmp_path)
    seen = set(judge.seen)
    tally = Tally(operation_of(judge.scenario.name), features_of(judge), judge.counter, seen, 1.0)
    save(tmp_path / "one.json", {"commit": tally})
    there = [sys.executable, "-m", "powercut.report", "one.json", "one.json"]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])}
    found = subprocess.run(there, cwd=tmp_path, env=around, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^commit +1 +{len(seen)} \| +{2 * judge.counter.states} ", found, re.M)
    assert table({"commit": tally}).count("\n") > len(FEATURES)
    assert "chain" in tally.features and "version 3" in tally.features


@pytest.mark.parametrize(
    ("name", "operation"),
    [("commit, compressed", "commit"), ("convert -n --undo to raw", "convert -n"), ("convert -c", "convert"),
     ("rebase -u, long name", "rebase -u"), ("resize --shrink, raw", "resize --shrink"), ("resize, raw", "resize"),
     ("check -r all, rebuilt", "check -r all"), ("snapshot -d first, compressed", "snapshot -d"), ("dd", "dd")],
)  # fmt: skip
def test_operations_of_scenarios(name: str, operation: str) -> None:
    assert operation_of(name) == operation


def test_a_way_is_told_in_one_line() -> None:
    one, two = "prefix=1 seed=1 kind=kill member=whole", "prefix=3 seed=1 kind=power member=none"
    legs = (Leg("run", 0, one), Leg("resume", 2, two))
    message = told(Violation(f"commit: {one} # lost: x\n  > resume!2: {two}\n  Violation: what", legs), None)
    assert message.endswith(f"--replay 'commit: {one} > resume!2: {two}'")
