"""A bounded slice of the power-cut simulation; `make crash-soak` runs it for as long as told."""

from __future__ import annotations

import random

import pytest
from powercut.catalogue import SCENARIOS
from powercut.judge import Judge, Violation
from powercut.mutations import MUTATIONS, broken
from powercut.scenarios import Scenario

SEED = 1


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_crash_states(scenario: Scenario) -> None:
    judge = Judge(scenario)
    for state in judge.states(seed=SEED, prefixes=9, subsets_per_prefix=1, singles_per_prefix=1):
        judge.judge(state)
        if judge.counter.states % 30 == 0:
            judge.crash_again(state, seed=SEED, count=3)
    counter = judge.counter
    assert counter.states >= 30 and counter.resumed and (counter.rolled_back or not scenario.kept) and counter.second


QUICK = ("before-images are not synced before the event that names them", "no fence", "no pointers beside participants")


@pytest.mark.parametrize("mutation", [each for each in MUTATIONS if each.name in QUICK], ids=lambda each: each.name)
def test_the_simulation_bites(mutation: object) -> None:
    """The whole catalogue is run by `make mutations`."""
    from powercut.mutations import caught

    _, violation = caught(mutation)  # type: ignore[arg-type]
    assert violation is not None


def test_a_violation_names_the_state() -> None:
    mutation = next(each for each in MUTATIONS if each.name == "no fence")
    scenario = next(each for each in SCENARIOS if each.name == mutation.scenario)
    with broken(mutation):
        judge = Judge(scenario)
        states = list(judge.states(seed=SEED, prefixes=6, subsets_per_prefix=1, singles_per_prefix=1))
        random.Random(SEED).shuffle(states)
        with pytest.raises(Violation, match=r"commit: prefix=\d+ seed=1 kind="):
            for state in states:
                judge.judge(state)
