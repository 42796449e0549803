"""map: where an image's data lies."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from safeimg.cli import values
from safeimg.cli.common import filesystem, image_name, print_text
from safeimg.cli.errors import CommandError, usage
from safeimg.cli.options import Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.shared import FORCE_SHARE, FORMAT, HELP, IMAGE, IMAGE_OPTS, OBJECT, OUTPUT
from safeimg.cli.values import MAX_SIZE, output_format

if TYPE_CHECKING:
    from safeimg.drivers.formats.api import Image
    from safeimg.ops.map import Entry

HEADING = f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File"

COMMANDS = (
    Command(
        "map",
        "Show where an image's data lies.",
        (IMAGE,),
        (
            HELP,
            FORMAT,
            OUTPUT,
            OBJECT,
            IMAGE_OPTS,
            FORCE_SHARE,
            Option("start-offset", "s", "start-offset", "offset", "Where to start.", values.start_offset),
            Option(
                "max-length", "l", "max-length", "len", "How much of the image to show.", values.max_length
            ),
        ),
        (
            ("Which file holds what", "map top.qcow2"),
            ("All ranges, for programs", "map --output=json top.qcow2"),
        ),
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    if len(arguments.positional) != 1:
        raise usage("Expecting one image file name")
    output = output_format(arguments.last("output"))
    name, fmt = image_name(arguments, arguments.positional[0], arguments.last("format"))
    from safeimg.drivers.errors import DriverError, StorageError
    from safeimg.drivers.formats.chain import close_chain, open_chain
    from safeimg.ops.map import block_map

    share = arguments.flag("force-share")
    layers = open_chain(filesystem(), name, format=fmt, force_share=share, secrets=arguments.secrets)
    start: int = arguments.last("start-offset", 0)
    length: int = arguments.last("max-length", MAX_SIZE)
    entries = block_map(layers, start, length)
    try:
        if output == "json":
            _print_json(entries, start)
        else:
            _print_table(entries, layers)
    except DriverError as error:
        sys.stdout.flush()
        if isinstance(error, StorageError):
            raise CommandError(f"Could not read file metadata: {error.strerror}") from error
        raise CommandError(str(error), "Could not read file metadata: Input/output error") from error
    finally:
        close_chain(layers)
    return 0


def _print_table(entries: Iterator[Entry], layers: Sequence[Image]) -> None:
    print(HEADING)
    for entry in entries:
        if entry.zero or not entry.data:
            continue
        if entry.offset is None:
            raise CommandError("File contains external, encrypted or compressed clusters.")
        line = f"{_hex(entry.start):<16}{_hex(entry.length):<16}{_hex(entry.offset):<16}"
        print_text(line + layers[entry.depth].data.path)


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"


def _print_json(entries: Iterator[Entry], start: int) -> None:
    from safeimg.ops.map import Entry

    print("[", end="")
    separator = ""
    for entry in entries:
        print(separator + _object(entry), end="")
        separator = ",\n"
    if not separator:  # an empty range is printed too
        print(_object(Entry(start, 0, 0, False, False, False, None)), end="")
    print("]")


def _object(entry: Entry) -> str:
    text = f'{{ "start": {entry.start}, "length": {entry.length}, "depth": {entry.depth}'
    for name, value in (("present", entry.present), ("zero", entry.zero), ("data", entry.data)):
        text += f', "{name}": {str(value).lower()}'
    return text + ("}" if entry.offset is None else f', "offset": {entry.offset}}}')
