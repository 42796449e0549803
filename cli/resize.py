"""resize: another virtual size for an image."""

from __future__ import annotations

from collections.abc import Callable

from safeimg.cli.common import image_name, warn_image
from safeimg.cli.errors import CommandError, usage
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import display
from safeimg.cli.running import run_stoppable
from safeimg.cli.shared import (
    HELP,
    IMAGE,
    IMAGE_OPTS,
    JOURNALING,
    OBJECT,
    QUIET,
    SHORT_FORMAT,
)
from safeimg.cli.values import warn


def _preallocation(text: str) -> str:
    from safeimg.ops.resize import PREALLOCATIONS

    if text not in PREALLOCATIONS:
        raise CommandError(f"Invalid preallocation mode '{text}'")
    return text


COMMANDS = (
    Command(
        "resize",
        "Change an image's virtual size.",
        (
            IMAGE,
            Argument("size", "The new size, or with + or - how much it grows or shrinks: bytes, or with k, M, G …"),
        ),
        (
            HELP,
            OBJECT,
            SHORT_FORMAT,
            Option(
                "preallocation",
                None,
                "preallocation",
                "mode",
                "Allocate what the image grows by: off, metadata, falloc or full.",
                _preallocation,
            ),
            QUIET,
            Option("shrink", None, "shrink", None, "Make it smaller: what lies behind the new end is lost."),
            IMAGE_OPTS,
            *JOURNALING,
        ),
        (
            ("20 GiB more", "resize disk.qcow2 +20G"),
            ("To 50 GiB, with the space for it reserved", "resize --preallocation=falloc -f raw disk.raw 50G"),
            ("Smaller, once the guest's file system is", "resize --shrink disk.qcow2 10G"),
        ),
        "Killed, it can be finished (`safeimg resume IMAGE`, or the same command with a size that is no difference) "
        "or taken back (`safeimg rollback IMAGE`) until a shrunken file is cut at its very end.",
        takes_last=True,
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    preallocation = arguments.last("preallocation", "off")
    from safeimg.ops.resize import ShrinkRefused, resize

    if len(arguments.positional) != 2:
        raise usage("Expecting image file name and size")
    wanted = _size(arguments.positional[1])
    name, fmt = image_name(arguments, arguments.positional[0], arguments.last("format"))
    from safeimg.ops.launch import Environment
    from safeimg.recovery.gate import begin_or_resume

    async def work(environment: Environment) -> None:
        async def begin() -> None:
            await resize(
                environment,
                name,
                wanted,
                fmt=fmt,
                preallocation=preallocation,
                shrink=arguments.flag("shrink"),
                warn=warn_image,
            )

        await begin_or_resume(name, environment, "resize", begin)

    with display(arguments) as shown:
        try:
            run_stoppable(arguments, shown, work, image=name)
        except ShrinkRefused as error:
            raise CommandError(
                str(error),
                "warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing "
                "such an operation, make sure there is no important data there.",
            ) from error
    if not arguments.flag("quiet"):
        print("Image resized.")
    return 0


def _size(text: str) -> Callable[[int], int]:
    """What the present size becomes, from `text`: SIZE, +SIZE or -SIZE."""
    from safeimg.ops.sizes import parse_size

    sign, digits = (text[0], text[1:]) if text[:1] in ("+", "-") else ("", text)
    value = parse_size(digits, warn)
    if value is not None and value >= 1 << 64:
        raise CommandError(f"Value '{digits}' is out of range for parameter 'size'")
    if value is None:
        raise CommandError(
            "Parameter 'size' expects a non-negative number below 2^64\n"
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            "and exabytes, respectively."
        )
    if not sign:
        return lambda size: _signed(value)
    return lambda size: _signed(size + value if sign == "+" else size - value)


def _signed(value: int) -> int:
    """As qemu-img counts: in 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
