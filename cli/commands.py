"""The commands by name. Each one's module holds its options (`COMMANDS`, what the parser, the help and shell
completion are made from) and what it does (`run`)."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from safeimg.cli.options import Command, Option
from safeimg.cli.shared import HELP
from safeimg.cli.values import trace

_MODULES = {
    "create": "create",
    "amend": "amend",
    "bitmap": "bitmap",
    "info": "info",
    "check": "check",
    "compare": "compare",
    "map": "map",
    "convert": "convert",
    "dd": "dd",
    "bench": "bench",
    "measure": "measure",
    "commit": "commit",
    "snapshot": "snapshot",
    "rebase": "rebase",
    "resize": "resize",
    "status": "status",
    "resume": "settle",
    "rollback": "settle",
    "abandon": "settle",
    "recover": "recover",
    "undo": "undo",
    "gc": "gc",
    "log": "history",
    "show": "history",
    "audit": "audit",
}

PROGRAM = Command(
    "safeimg",
    "qemu-img, made crash-safe.",
    (),
    (
        HELP,
        Option("version", "V", "version", None, "Show the version and exit.", ends=True),
        Option(
            "trace", "T", "trace", "pattern", "Accepted for qemu-img's sake: there is nothing to trace.", trace
        ),
    ),
    (),
)


def names() -> tuple[str, ...]:
    """In the order of the help."""
    return tuple(_MODULES)


def module(name: str) -> ModuleType:
    """The module of a command that there is, imported when asked for. Its `run(command, arguments)` returns the
    exit code."""
    return import_module(f"safeimg.cli.{_MODULES[name]}")


def find(name: str) -> Command | None:
    """A command's options; None if there is no command of this name."""
    if name not in _MODULES:
        return None
    found: tuple[Command, ...] = module(name).COMMANDS
    return next(command for command in found if command.name == name)
