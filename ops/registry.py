"""From the log back to a job: each command's way to open its images again and go on."""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.journal.state import OperationState
from safeimg.ops.errors import Impossible
from safeimg.ops.launch import Environment, Job


class Reopener(Protocol):
    """What a command's module offers to recovery."""

    def open_layers(self, fs: FileSystem, home: str, state: OperationState, secrets: Secrets) -> list[Image]:
        """The images of the pending operation, open as it had them, fences notwithstanding. `home`: where the home
        image lies now; the others are found from there. `secrets`: of encrypted ones."""
        ...

    def make_job(self, layers: list[Image], state: OperationState, environment: Environment) -> Job:
        """The operation on images as they are now, ready to go on from `state.cursor`."""
        ...


# Imported when asked for.
_MODULES = {
    "amend": "safeimg.ops.amend",
    "bitmap": "safeimg.ops.bitmap",
    "check": "safeimg.ops.repair",
    "repair": "safeimg.ops.repair",
    "commit": "safeimg.ops.commit_job",
    "convert": "safeimg.ops.convert_job",
    "dd": "safeimg.ops.convert_job",
    "rebase": "safeimg.ops.rebase",
    "snapshot": "safeimg.ops.snapshot",
    "undo": "safeimg.ops.undo",
    "resize": "safeimg.ops.resize",
}


def reopener(home: str, state: OperationState) -> Reopener:
    """The module for the command that the log names."""
    declared = state.declared
    if declared.command not in _MODULES:
        raise Impossible(
            f"{home}: the log is of a command that this version does not know, '{declared.command}' "
            f"(safeimg {declared.version})"
        )
    module: Reopener = import_module(_MODULES[declared.command])
    return module


def reparse(layers: list[Image]) -> list[Image]:
    """The same open files, their metadata read afresh."""
    return [lookup(layer.format).reopen(layer) for layer in layers]
