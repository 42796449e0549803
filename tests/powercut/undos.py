"""Undo of the operations of other scenarios: what these leave is where an undo begins."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace

from powercut import straight
from powercut.judge import Scenario, environment
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.journal.history import History, MemoryHistory
from safeimg.journal.kept import Keeping
from safeimg.ops.launch import Environment
from safeimg.recovery.undo import undo

FOLDER = "/kept"
KEEPING = Keeping(1 << 30, 1 << 31, FOLDER)


def undoing(env: Environment, history: History, keeping: Keeping = KEEPING) -> Environment:
    """The environment with something to undo from."""
    return env._replace(history=history, keeping=keeping)


def done(scenario: Scenario, fs: SimulatedFileSystem, history: History, keeping: Keeping = KEEPING) -> None:
    """Runs the scenario's operation, keeping what it takes to undo it."""

    async def main() -> None:
        await scenario.run(undoing(environment(fs), history, keeping))

    if FOLDER[1:] not in fs.list_directory("/"):
        fs.make_directory(FOLDER)
    straight.run(main)


def undo_of(scenario: Scenario) -> Scenario:
    """The undo of what the scenario does."""
    histories: list[History] = []

    def build(fs: SimulatedFileSystem) -> None:
        scenario.build(fs)
        histories.append(MemoryHistory())
        done(scenario, fs, histories[-1])

    async def run(env: Environment) -> None:
        await undo(scenario.home, undoing(env, deepcopy(histories[-1])))  # it may run several times

    return replace(scenario, name=f"undo of {scenario.name}", build=build, run=run, breaks=scenario.broken)


CHOSEN = ("snapshot -a first", "amend -o several, down", "resize --shrink", "commit", "convert -n --undo to raw")


def chosen(scenarios: Iterable[Scenario]) -> list[Scenario]:
    """Of each kind one whose undo is crashed in the tests, those that give something up among them."""
    return [scenario for scenario in scenarios if scenario.name in CHOSEN]
