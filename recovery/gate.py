"""Before a command begins: what is pending on its image may be this very command, or not matter any more."""

from __future__ import annotations

from safeimg.journal import find
from safeimg.ops.launch import Environment
from safeimg.recovery.settle import abandon, resume


async def resumed(path: str, environment: Environment, command: str, *, replaces: bool = False) -> bool:
    """Whether the identical command was pending on the image at `path`, and has been finished instead of begun.

    With `replaces` the command makes the image anew, and any other pending operation is superseded: given up, on
    record. Otherwise that one stays, and the command will be refused. Raises what `resume` raises."""
    found = find.find(environment.fs, path)
    if found is None or isinstance(found, find.VoidFound):
        return False
    resolved = find.resolve_pointer(environment.fs, found) if isinstance(found, find.PointerFound) else None
    log = found if isinstance(found, find.LogFound) else resolved.log if resolved is not None else None
    if log is None:
        return False
    same = (log.declared.command, log.declared.arguments) == (command, environment.arguments)
    if same and log.started and log.outcome is None:
        await resume(path, environment)
        return True
    if log.outcome is not None or not log.started:
        await resume(path, environment)  # nothing but tidying up
    elif replaces:
        abandon(path, environment, reason=f"superseded by {command}")
    return False
