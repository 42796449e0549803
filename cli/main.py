"""The entry point: finds the command and runs it. Imports nothing heavy before it knows what is needed."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TextIO

from safeimg.cli.commands import PROGRAM, find, module
from safeimg.cli.config import configure
from safeimg.cli.errors import Answer, CommandError, usage
from safeimg.cli.options import Command
from safeimg.cli.parser import parse

HELPED = ("--install-completion", "--show-completion")


def program_name() -> str:
    """How the program calls itself in messages: "qemu-img" when called through a link of that name."""
    return "qemu-img" if os.path.basename(sys.argv[0]) == "qemu-img" else "safeimg"


def main() -> None:
    """Runs the command line and exits with its code. Never shows a traceback (but see SAFEIMG_DEBUG)."""
    _open_streams()
    code = guarded(sys.argv)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
        code = code or 1
    except OSError as error:
        silence(sys.stdout)
        code = code or _fail(_explain(error))
    sys.exit(code)


def _open_streams() -> None:
    """Those that the caller has closed lead nowhere: an image must not get their numbers, and what is printed with
    them."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest one that is free
            setattr(sys, name, os.fdopen(number, mode))


def guarded(words: list[str]) -> int:
    """Runs `words` (the program's name first); failures of every kind become one message and an exit code."""
    try:
        return dispatch(words)
    except Answer as answer:
        print(*answer.args, sep="\n", end="\n" if answer.args else "")
        return 0
    except CommandError as error:
        return _fail(error)
    except BaseException as error:
        if isinstance(error, SystemExit) or os.environ.get("SAFEIMG_DEBUG"):
            raise
        if isinstance(error, BrokenPipeError):
            silence(sys.stdout)
            return 1
        return _fail(_explain(error))


def dispatch(words: list[str]) -> int:
    """The exit code of the command that `words` name."""
    if "_SAFEIMG_COMPLETE" in os.environ or (len(words) > 1 and words[1] in HELPED):
        return int(import_module("safeimg.cli.help").run_typer(words[1:]))
    if len(words) == 1:
        raise usage("Not enough arguments")
    arguments, asked = parse(PROGRAM, words, permute=False)
    if asked == "help":
        return show_help(None)
    if asked == "version":
        print(version_line())
        return 0
    if not arguments.positional:
        raise usage("Not enough arguments")
    name = arguments.positional[0]
    command = find(name)
    if command is None:
        raise usage(f"Command not found: {name}")
    try:
        own, asked = parse(command, arguments.positional)
    except CommandError as error:
        # 1 means to say that images differ; qemu-img says it all the same where the syntax is wrong.
        if command.new or (command.name == "compare" and not error.hint):
            raise CommandError(*error.messages, code=2, hint=error.hint) from None
        raise
    if asked == "help":
        return show_help(command)
    configure()
    return int(module(name).run(command, own))


def show_help(command: Command | None) -> int:
    """As safeimg: the command's own; as qemu-img: what that shows of all commands."""
    if program_name() == "qemu-img":
        return int(import_module("safeimg.cli.overview").show())
    return int(import_module("safeimg.cli.help").show(command))


def version_line() -> str:
    from safeimg.journal.version import VERSION

    if program_name() == "qemu-img":  # tools look for this line, to know which options they may use
        return f"qemu-img version 7.2.0 (safeimg {VERSION})"
    return f"safeimg version {VERSION} (commands of qemu-img 7.2)"


def _fail(error: CommandError) -> int:
    """Prints the messages: before what waits to be printed on stdout, as in qemu-img, where that is not a terminal."""
    name = program_name()
    try:
        lines = "\n".join(f"{name}: {message}" for message in error.messages)
        if lines:
            print(lines, end=error.end, file=sys.stderr)
        if error.hint:
            print(f"Try '{name} --help' for more information", file=sys.stderr)
    except OSError:  # the exit code tells
        silence(sys.stderr)
    return error.code


def _explain(error: BaseException) -> CommandError:
    """One line for whatever went wrong, and its exit code."""
    if isinstance(error, BaseExceptionGroup):  # trio's nurseries wrap what their children raise
        return _explain(error.exceptions[0])
    if isinstance(error, KeyboardInterrupt):
        return CommandError(*(["interrupted"] if program_name() == "safeimg" else []), code=130)
    if isinstance(error, MemoryError):
        return CommandError("out of memory")
    if isinstance(error, RecursionError):
        return CommandError("the images are nested too deeply")
    if isinstance(error, UnicodeEncodeError):
        return CommandError(f"cannot print {error.object[error.start : error.end]!r}: set a UTF-8 locale")
    known = (
        sys.modules.get("safeimg.drivers.errors"),
        sys.modules.get("safeimg.journal.errors"),
        sys.modules.get("safeimg.ops.errors"),
    )
    for holder, kind in zip(known, ("DriverError", "JournalError", "OperationError"), strict=True):
        if holder is not None and isinstance(error, getattr(holder, kind)):
            code = (
                getattr(error, "exit_code", 1) if program_name() == "safeimg" else 1
            )  # qemu-img has no others
            return CommandError(*getattr(error, "messages", (str(error),)), code=code)
    if isinstance(error, OSError) and error.strerror:
        return CommandError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return CommandError(f"internal error: {type(error).__name__}: {error} (SAFEIMG_DEBUG=1 shows where)")


def silence(stream: TextIO) -> None:
    """Nobody can read it any more: keeps the interpreter from complaining about it when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
