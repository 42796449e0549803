"""The errors of the journal: one line each that names the file, the offset and the remedy."""

from __future__ import annotations


class JournalError(Exception):
    """Base of everything that `safeimg.journal` raises on purpose. `str()` is the whole message."""


class LogDamaged(JournalError):
    """The log's bytes are not a log's, or were changed after they had been made durable."""

    def __init__(self, path: str, problem: str, offset: int) -> None:
        self.path = path
        self.offset = offset
        super().__init__(
            f"{path}: {problem} at offset {offset:#x} (`safeimg abandon` gives the pending operation up)"
        )


class LogVoid(JournalError):
    """The log of an operation that never began: not even its declaration is durable. It may be removed."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"{path}: the log of an operation that never began; it may be removed")


class LogBusy(JournalError):
    """Another process is writing this log."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"{path}: another safeimg process is working on it")


class LogForeign(JournalError):
    """The log belongs to another image or another user, or cannot be trusted."""


class LogLost(LogForeign):
    """An image takes part in an operation whose log, or whose home image, is not where it was. `path`: of the file
    that says so."""

    def __init__(self, path: str, problem: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}")


class HistoryError(JournalError):
    """The history cannot be read or written."""


class JournalUnavailable(JournalError):
    """No place where a log could be created."""
