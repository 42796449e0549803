"""Operations with a log that is not like others: in another folder than the images (`--journal`), where the home image
points to it; with a digest of what they show (`--digest`)."""

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
        await scenario.run(around._replace(journal="/logs/log"))

    return replace(scenario, name=f"{scenario.name}, journal elsewhere", build=build, run=run)


def digested(scenario: Scenario) -> Scenario:
    """The same operation, which reads the images once more in the end."""

    async def run(around: Environment) -> None:
        await scenario.run(around._replace(digest=True))

    return replace(scenario, name=f"{scenario.name} --digest", run=run)


_CHOSEN = [scenario for scenario in COMMITS if scenario.name in ("commit", "commit into raw")]
JOURNALS = [*map(elsewhere, _CHOSEN), *map(digested, _CHOSEN)]
