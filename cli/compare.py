"""compare: whether two images hold the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeimg.cli.common import filesystem, image_name, print_text
from safeimg.cli.errors import CommandError, usage
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import Display, display
from safeimg.cli.shared import (
    FORCE_SHARE,
    HELP,
    IMAGE_OPTS,
    LONG_PROGRESS,
    OBJECT,
    PROGRESS,
    QUIET,
    SHORT_FORMAT,
    SOURCE_CACHE,
)
from safeimg.cli.values import cache_mode

if TYPE_CHECKING:
    from safeimg.drivers.formats.api import Image

DIFFERENT, CANNOT_OPEN, UNMAPPED, UNREADABLE = 1, 2, 3, 4

COMMANDS = (
    Command(
        "compare",
        "Compare the content of two images.",
        (Argument("first", "An image."), Argument("second", "Another one.")),
        (
            HELP,
            OBJECT,
            IMAGE_OPTS,
            SHORT_FORMAT._replace(help="Format of the first image."),
            Option("second-format", "F", None, "fmt", "Format of the second image."),
            SOURCE_CACHE,
            PROGRESS,
            LONG_PROGRESS,
            QUIET,
            Option("strict", "s", None, None, "Sizes and allocation must be the same too."),
            FORCE_SHARE,
        ),
        (
            ("The same content?", "compare disk.raw disk.qcow2"),
            ("With progress", "compare -p a.qcow2 b.qcow2"),
        ),
        "Exit code 0: identical; 1: different; 2: an image cannot be opened; 3, 4: its metadata or data "
        "cannot be read.",
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    if len(arguments.positional) != 2:
        raise usage("Expecting two image file names")
    formats = arguments.last("format"), arguments.last("second-format")
    from safeimg.drivers.errors import DriverError
    from safeimg.drivers.formats.chain import close_chain, open_chain

    fs, chains = filesystem(), list[list["Image"]]()
    with display(arguments) as shown:
        cache = cache_mode(
            arguments.last("source-cache", "writeback"), "Invalid source cache option", code=CANNOT_OPEN
        )
        if arguments.flag("image-opts") and (formats[0] or formats[1]):
            raise CommandError("--image-opts and --format are mutually exclusive", code=CANNOT_OPEN)
        try:
            for text, fmt in zip(arguments.positional, formats, strict=True):
                name, fmt = image_name(arguments, text, fmt, code=CANNOT_OPEN)
                share = arguments.flag("force-share")
                chains.append(
                    open_chain(
                        fs, name, format=fmt, cache=cache, force_share=share, secrets=arguments.secrets
                    )
                )
        except DriverError as error:
            raise CommandError(str(error), code=CANNOT_OPEN) from error
        else:
            return _compare(arguments, chains, shown)
        finally:
            for chain in chains:
                close_chain(chain)


def _compare(arguments: Arguments, chains: list[list[Image]], shown: Display) -> int:
    from safeimg.ops.compare import Outcome, UnmappedError, UnreadableError, compare

    quiet = arguments.flag("quiet")

    def say(message: str) -> None:
        if not quiet:
            print_text(message)

    try:
        result = compare(
            chains[0],
            chains[1],
            strict=arguments.flag("strict"),
            report=shown.report,
            larger=lambda: say("Warning: Image size mismatch!"),
        )
    except UnmappedError as error:
        name = arguments.positional[error.which]
        message = f"Sector allocation test failed for {name}"
        raise CommandError(str(error.__cause__), message, code=UNMAPPED) from error
    except UnreadableError as error:
        name = arguments.positional[error.which]
        why = getattr(error.__cause__, "strerror", "Input/output error")
        message = f"Error while reading offset {error.offset} of {name}: {why}"
        raise CommandError(message, code=UNREADABLE) from error
    if result.outcome is Outcome.IDENTICAL:
        say("Images are identical.")
    elif result.outcome is Outcome.SIZE:
        say("Strict mode: Image size mismatch!")
    elif result.outcome is Outcome.STATUS:
        say(f"Strict mode: Offset {result.offset} block status mismatch!")
    else:
        say(f"Content mismatch at offset {result.offset}!")
    return 0 if result.outcome is Outcome.IDENTICAL else DIFFERENT
