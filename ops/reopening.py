"""From the log back to what an operation was started with. All of it is checked: the log is a file like others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.chain import open_chain
from safeimg.drivers.formats.naming import recalled
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.journal.state import OperationState
from safeimg.ops.errors import Conflict

Kinds = Mapping[str, type | tuple[type, ...]]


def started_settings(home: str, state: OperationState, kinds: Kinds, what: str = "operation") -> dict[str, Any]:
    """The settings, those in `kinds` of the types given there; `Conflict` if they are not. `what` was started."""
    settings = {} if state.started is None else dict(state.started.settings)
    for name, kind in kinds.items():
        if not isinstance(settings.get(name), kind):
            raise Conflict(f"{home}: the log does not say with which '{name}' the {what} was started")
    return settings


def reopen_home(
    fs: FileSystem, home: str, settings: Mapping[str, Any], secrets: Secrets, *, backing: bool = False
) -> list[Image]:
    """The image at `home`, for writing whatever state it is in; with its backing images if `backing`.

    `settings`: its "options", "format" and "cache", checked."""
    return open_chain(
        fs, recalled(settings["options"], home), format=settings["format"], write=True, cache=settings["cache"],
        backing=backing, repair=True, secrets=secrets,
    )  # fmt: skip


def unlinked_by(state: OperationState) -> list[tuple[int, int]]:
    """Host ranges (offset, length) that the steps so far took a reference from."""
    return [(piece.offset, piece.length) for step in state.steps for piece in step.prepared.unlinked]
