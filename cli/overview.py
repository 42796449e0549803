"""What qemu-img prints when it is asked for help: programs look into it for the commands, options and formats that
they may use. Made from the commands' tables."""

from __future__ import annotations

from collections.abc import Iterator

from safeimg.cli.commands import find, names
from safeimg.cli.main import version_line
from safeimg.cli.options import Command
from safeimg.drivers.formats import registry
from safeimg.drivers.formats.protocols import opened


def show() -> int:
    print("\n".join(_lines()))
    return 0


def _lines() -> Iterator[str]:
    yield version_line()
    yield "usage: qemu-img [standard options] command [command options]"
    yield "QEMU disk image utility, made crash-safe"
    yield ""
    yield "    '-h', '--help'       this help"
    yield "    '-V', '--version'    the version"
    yield "    '-T', '--trace'      [[enable=]<pattern>][,events=<file>][,file=<file>]"
    yield ""
    yield "Command syntax:"
    for name in names():
        command = find(name)
        if command is not None and not command.new:
            yield f"  {_syntax(command)}"
    yield ""
    yield "'safeimg COMMAND --help' tells what each of them does."
    yield ""
    yield supported()


def supported() -> str:
    """The line that programs look for: the formats, and what images may lie in."""
    return f"Supported formats: {' '.join(sorted((*registry.names(), *opened())))}"


def _syntax(command: Command) -> str:
    words = [command.name]
    for option in command.options:
        if option.name == "help":
            continue
        short = f"-{option.short}" if option.short else ""
        long = f"--{option.long}" if option.long else ""
        given = "" if option.argument is None else f"={option.argument}" if long else f" {option.argument}"
        words.append(f"[{' | '.join(filter(None, (short, long)))}{given}]")
    for argument in command.arguments:
        word = argument.name + (" [...]" if argument.several else "")
        words.append(word if argument.required else f"[{word}]")
    return " ".join(words)
