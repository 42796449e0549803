"""Operations that go through phases: each is a method `_NAME(cursor)` that yields the steps of phase NAME."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from safeimg.ops.errors import Conflict
from safeimg.ops.steps import Step

END = "end"  # a cursor behind the last phase


async def in_phases(operation: object, phases: Sequence[str], cursor: Any | None) -> AsyncIterator[Step]:
    """The steps from `cursor` (a mapping with its "phase") on, or from the first phase. `Conflict` if there is no such
    phase: cursors come from a log."""
    phase: Any = phases[0]
    if cursor is not None:
        phase = cursor.get("phase") if isinstance(cursor, dict) else None
    if phase not in (*phases, END):
        raise Conflict(f"the log does not say where the operation goes on ('{phase}')")
    for name in phases[phases.index(phase) :] if phase != END else ():
        run = getattr(operation, f"_{name}")
        async for step in run(cursor if name == phase and cursor is not None else {"phase": name}):
            yield step
