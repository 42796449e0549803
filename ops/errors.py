"""What stops an operation before or while it runs. Each message is one line that says what to do next."""

from __future__ import annotations

from safeimg.drivers.errors import UsageError


class OperationError(Exception):
    """Base of everything that `safeimg.ops` and `safeimg.recovery` raise on purpose.

    `exit_code` is that of safeimg's own commands (DESIGN, "The command line")."""

    exit_code = 1


class OperationPaused(OperationError):
    """The operation stopped at a step boundary, everything so far durable and on record."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"paused: {reason}")


class SomethingPending(OperationError):
    """Another operation on one of the images is not settled yet."""

    exit_code = 3

    def __init__(self, path: str, command: str, operation: str, home: str) -> None:
        self.path = path
        self.command = command
        self.operation = operation
        self.home = home
        super().__init__(
            f"{path}: an interrupted {command} is pending: finish it with 'safeimg resume {home}' or take it back "
            f"with 'safeimg rollback {home}'"
        )


class Conflict(OperationError):
    """An image is not as the log says it must be: somebody else wrote to it. Nothing was written."""

    exit_code = 4


class Changed(Conflict):
    """The same, found in an image's content. `found`: what is where, without what to do about it."""

    def __init__(self, found: str, rest: str) -> None:
        self.found = found
        super().__init__(f"{found} {rest}")


class OwnerAlive(OperationError):
    """The process that runs the operation is alive, or nobody here can tell."""

    exit_code = 5


class Impossible(OperationError):
    """What was asked for cannot be done any more (or never could)."""

    exit_code = 6


class Unanswered(UsageError):
    """Nothing was done, and why; qemu-img tells so too, and ends as if all were well."""
