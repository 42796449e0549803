"""create: a new, empty image."""

from __future__ import annotations

import sys

from safeimg.cli.common import filesystem, print_text
from safeimg.cli.errors import CommandError, usage
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.shared import BACKING_FORMAT, HELP, OBJECT, OPTIONS, QUIET, SHORT_FORMAT
from safeimg.cli.values import size, warn

COMMANDS = (
    Command(
        "create",
        "Create a disk image.",
        (
            Argument("filename", "The image to create."),
            Argument(
                "size",
                "Virtual size: bytes, or with k, M, G, T, P, E. Taken from the backing image if left out.",
                False,
            ),
        ),
        (
            HELP,
            OBJECT,
            Option("backing", "b", None, "file", "Backing image."),
            BACKING_FORMAT,
            SHORT_FORMAT._replace(help="Format of the image (raw if not given)."),
            OPTIONS,
            QUIET,
            Option("unsafe", "u", None, None, "Do not look at the backing image; it need not exist."),
        ),
        (
            ("A growing image of 20 GiB", "create -f qcow2 disk.qcow2 20G"),
            (
                "An overlay, of its backing image's size",
                "create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2",
            ),
            (
                "Small clusters, wide refcounts",
                "create -f qcow2 -o cluster_size=16k,refcount_bits=64 disk.qcow2 1T",
            ),
        ),
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    options: list[str] = arguments.all("options")
    fmt: str = arguments.last("format", "raw")
    filename = arguments.positional[0] if arguments.positional else None
    if print_option_help(options, fmt, filename):
        return 0
    if filename is None:
        raise usage("Expecting image file name")
    length = size("image size", arguments.positional[1]) if len(arguments.positional) > 1 else None
    if len(arguments.positional) > 2:
        raise usage(f"Unexpected argument: {arguments.positional[2]}")
    from safeimg.drivers.errors import FormatNotSaid
    from safeimg.ops.create import Request, create

    request = Request(
        filename,
        fmt,
        length,
        tuple(options),
        arguments.last("backing"),
        arguments.last("backing-format"),
        arguments.flag("unsafe"),
        secrets=arguments.secrets,
    )
    try:
        create(
            filesystem(),
            request,
            say=lambda line: None if arguments.flag("quiet") else _say(line),
            supersede=_supersede,
            warn=warn,
        )
    except FormatNotSaid as error:
        raise CommandError(str(error), end="") from error
    return 0


def _say(line: str) -> None:
    """At once: before what may be printed on stderr."""
    print_text(line)
    sys.stdout.flush()


def _supersede(path: str) -> None:
    """Gives up, on record, what is pending on a file that is about to be replaced."""
    from safeimg.cli.running import environment
    from safeimg.recovery.gate import supersede

    supersede(path, environment(), "create")


def print_option_help(options: list[str], fmt: str, filename: str | None) -> bool:
    """Answers `-o help`; False if it was not asked for."""
    if not options:
        return False
    from safeimg.drivers.errors import DriverError
    from safeimg.drivers.formats.chain import local_path
    from safeimg.ops.create import format_driver
    from safeimg.ops.create_options import asks_for_help, help_lines

    if not any(asks_for_help(text) for text in options):
        return False
    try:
        driver = format_driver(fmt)
        if filename is not None:
            local_path(filename)
    except DriverError as error:
        raise CommandError(str(error)) from error
    print("\n".join(help_lines(driver.name, driver.create_options, with_file=filename is not None)))
    return True
