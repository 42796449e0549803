"""Operations whose log is in another folder than the images (`--journal`): the home image points to it."""

from __future__ import annotations

from dataclasses import replace

from powercut.judge import Scenario
from powercut.scenarios import COMMITS
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.ops.launch import Environment


def elsewhere(scenario: Scenario) -> Scenario:
    """The same operation with its log in a folder of its own."""

    def build(fs: SimulatedFileSystem) -> None:
        scenario.build(fs)
        fs.make_directory("/logs")

    async def run(around: Environment) -> None:
        await scenario.run(replace(around, journal="/logs/log"))

    return replace(scenario, name=f"{scenario.name}, journal elsewhere", build=build, run=run)


JOURNALS = [elsewhere(scenario) for scenario in COMMITS if scenario.name in ("commit", "commit into raw")]
