"""How a command fails: what is printed, and the exit code."""

from __future__ import annotations


class CommandError(Exception):
    """Ends a command. Each of `messages` is printed behind the program's name; `hint` adds qemu-img's pointer
    to the help, as it does for mistakes in the syntax; `end` is what the last message ends with."""

    def __init__(self, *messages: str, code: int = 1, hint: bool = False, end: str = "\n") -> None:
        self.end = end
        self.messages = messages
        self.code = code
        self.hint = hint
        super().__init__("; ".join(messages))


class Answer(Exception):
    """An option asks for information instead of work: `args` are the lines that answer it."""


def usage(message: str) -> CommandError:
    """A mistake in the syntax of a command that qemu-img has."""
    return CommandError(message, hint=True)
