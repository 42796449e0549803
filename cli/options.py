"""What a command and its options are, for the parser, the help and shell completion alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safeimg.drivers.records import NamedTuple


class Option(NamedTuple):
    """One option, as getopt_long knows it. `name` is how the command asks for it."""

    name: str
    short: str | None
    long: str | None
    argument: str | None  # what the argument is called in the help; None for a flag
    help: str
    check: Callable[[str], Any] | None = None  # turns the argument into a value, or raises `CommandError`
    constant: Any = True  # a flag's value
    ends: bool = False  # nothing behind it counts, as with --help
    own: bool = False  # safeimg's: only when written out, so that what abbreviates one of qemu-img's still does


class Argument(NamedTuple):
    """A positional argument, for the help."""

    name: str
    help: str
    required: bool = True
    several: bool = False


class Command(NamedTuple):
    """A command, as its module (`commands.module`) describes it."""

    name: str
    summary: str
    arguments: tuple[Argument, ...]
    options: tuple[Option, ...]
    examples: tuple[tuple[str, str], ...]  # what it does, the command line
    details: str = ""
    new: bool = False  # safeimg's own; qemu-img has none of that name
    alone: str = ""  # the letters of options of which there may be one, once
    takes_last: bool = False  # the last word is an argument, whatever it looks like (`resize disk -10G`)

    @property
    def syntax(self) -> str:
        words = []
        for argument in self.arguments:
            word = argument.name.upper() + ("…" if argument.several else "")
            words.append(word if argument.required else f"[{word}]")
        return " ".join(words)
