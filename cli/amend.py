"""amend: options of an image that exists."""

from __future__ import annotations

from safeimg.cli.common import image_name, warn_image
from safeimg.cli.errors import CommandError, usage
from safeimg.cli.options import Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import Display, display
from safeimg.cli.running import run_stoppable
from safeimg.cli.shared import (
    CACHE,
    HELP,
    IMAGE,
    IMAGE_OPTS,
    JOURNALING,
    LONG_PROGRESS,
    OBJECT,
    OPTIONS,
    PROGRESS,
    QUIET,
    SHORT_FORMAT,
)
from safeimg.cli.values import cache_mode
from safeimg.drivers.formats.naming import Blockdev, is_protocol

COMMANDS = (
    Command(
        "amend",
        "Change options of an image.",
        (IMAGE,),
        (
            HELP,
            OBJECT,
            IMAGE_OPTS,
            SHORT_FORMAT,
            CACHE,
            OPTIONS,
            Option("force", None, "force", None, "Allow what may make the image's data unreadable."),
            PROGRESS,
            LONG_PROGRESS,
            QUIET,
            *JOURNALING,
        ),
        (
            ("For QEMU before 1.1", "amend -o compat=0.10 disk.qcow2"),
            ("Room for many snapshots", "amend -o refcount_bits=32 disk.qcow2"),
            ("What can be changed", "amend -f qcow2 -o help"),
        ),
        "All options are checked before anything is changed, and change together: killed, `safeimg resume IMAGE` "
        "(or the same command again) finishes them, `safeimg rollback IMAGE` takes them back.",
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    options: list[str] = arguments.all("options")
    if not options:
        raise usage("Must specify options (-o)")
    with display(arguments) as shown:
        return _amend(arguments, options, shown)


def _amend(arguments: Arguments, options: list[str], shown: Display) -> int:
    words, fmt = arguments.positional, arguments.last("format")
    from safeimg.ops.create_options import asks_for_help

    helps = any(asks_for_help(text) for text in options)
    if helps and fmt is not None and not arguments.flag("image-opts"):
        return _help(None, fmt, "writeback", arguments, shown)
    if len(words) != 1:
        raise CommandError("Expecting one image file name")
    cache = cache_mode(arguments.last("cache", "writeback"), "Invalid cache option")
    name, fmt = image_name(arguments, words[0], fmt)
    if helps:
        return _help(name, fmt, cache, arguments, shown)
    from safeimg.ops.amend import amend
    from safeimg.ops.launch import Environment
    from safeimg.recovery.gate import begin_or_resume

    async def work(environment: Environment) -> None:
        begun = False

        async def begin() -> None:
            nonlocal begun
            begun = True
            await amend(
                environment, name, options, fmt=fmt, cache=cache, force=arguments.flag("force"), warn=warn_image,
                begun=shown.begin,
            )  # fmt: skip

        await begin_or_resume(name, environment, "amend", begin)
        if not begun and "size" in ",".join(options):  # what was resumed had yet to change the size
            await begin()

    shown.hold()
    try:
        run_stoppable(arguments, shown, work, image=name)
    finally:
        shown.finish()  # as qemu-img does, even if the format refuses
    return 0


def _help(name: str | Blockdev | None, fmt: str | None, cache: str, arguments: Arguments, shown: Display) -> int:
    """`-o help`, for a format or for that of an image."""
    from safeimg.drivers.errors import UsageError
    from safeimg.drivers.formats.registry import lookup
    from safeimg.ops.amend import amendable, image_driver
    from safeimg.ops.create_options import amend_help_lines

    if name is not None:
        shown.hold()
        driver = run_stoppable(
            arguments, shown, lambda around: image_driver(around, name, fmt, cache, warn_image), image=name
        )
    else:
        try:
            driver = lookup(fmt or "")
        except UsageError as error:
            if is_protocol(fmt or ""):
                raise CommandError(f"Format driver '{fmt}' does not support option amendment") from error
            raise CommandError(f"Unknown file format '{fmt}'") from error
    print("\n".join(amend_help_lines(driver.name, amendable(driver, name, fmt).options)))
    return 0
