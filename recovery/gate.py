"""Before a command begins: what is pending on its image may be this very command.

Mostly nothing is: what settles is imported only then."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

from safeimg.drivers.errors import DriverError, FormatError, UnsupportedError, UsageError
from safeimg.drivers.formats.naming import Blockdev, local_name
from safeimg.journal import find
from safeimg.journal.errors import JournalError
from safeimg.journal.owner import current_owner
from safeimg.ops.errors import OperationError, SomethingPending
from safeimg.ops.launch import Environment
from safeimg.ops.repair import REPAIR


async def begin_or_resume(
    image: str | Blockdev, environment: Environment, command: str, begin: Callable[[], Awaitable[None]]
) -> None:
    """Runs `begin`, which does `command` to an image, unless the identical command is pending there.

    What the image turns out not to allow is taken back, as is what meets damage.

    The operation's home may be another image (of a commit, the base), and a crash just before its start or just
    before its very end leaves a log there and no pointer to it: `begin` is refused then, and tried again once that
    is tidied up. Raises what `begin` and `resume` raise."""
    if await resumed(image, environment, command):
        return
    try:
        await begin()
    except SomethingPending as pending:
        if not await resumed(pending.home, environment, command):
            await begin()
    except (UsageError, UnsupportedError):
        await _withdraw(local_name(image), environment)
        raise
    except FormatError:
        with suppress(DriverError, JournalError, OperationError):  # of the two, the damage is what to tell
            await _withdraw(local_name(image), environment)
        raise


async def _withdraw(path: str, environment: Environment) -> None:
    """Takes back what this process began and then found that the image does not allow: trying again would not help."""
    log = find.follow(environment.fs, find.find(environment.fs, path))
    if log is not None and log.declared.owner == current_owner():
        from safeimg.recovery.settle import rollback

        await rollback(path, environment)


async def resumed(image: str | Blockdev, environment: Environment, command: str) -> bool:
    """Whether the identical command was pending on the image, and has been finished instead of begun.

    An operation that never began, or whose outcome is on record, is tidied up; any other stays pending, and the
    command will be refused. Raises what `resume` raises."""
    path = local_name(image)
    log = find.follow(environment.fs, find.find(environment.fs, path))
    if log is None:
        return False
    if log.outcome is not None or not log.started:
        await _finished(path, environment)
        return False
    if (log.declared.command, log.declared.arguments) == (command, environment.arguments):
        return await _finished(path, environment)
    if log.declared.arguments == environment.arguments and log.declared.command in (REPAIR, "resize"):
        await _finished(path, environment)  # which is a part of this command
    return False


async def _finished(path: str, environment: Environment) -> bool:
    """Finishes what is pending. False if somebody else has settled it since it was found, whichever way."""
    from safeimg.recovery.pending import NothingPending
    from safeimg.recovery.settle import resume

    try:
        await resume(path, environment)
    except NothingPending:
        return False
    return True


def supersede(path: str, environment: Environment, command: str) -> None:
    """Gives up what is pending on an image that `command` makes anew, on record."""
    from safeimg.recovery.pending import NothingPending
    from safeimg.recovery.settle import abandon

    with suppress(NothingPending):  # somebody else has settled it since it was found
        abandon(path, environment, reason=f"superseded by {command}")
