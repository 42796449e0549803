"""rebase: another backing image for an image."""

from __future__ import annotations

from safeimg.cli.common import image_name, warn_image
from safeimg.cli.errors import usage
from safeimg.cli.options import Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import Display, display
from safeimg.cli.running import run_stoppable
from safeimg.cli.shared import (
    BACKING_FORMAT,
    CACHE,
    FORCE_SHARE,
    HELP,
    IMAGE,
    IMAGE_OPTS,
    JOURNALING,
    LONG_PROGRESS,
    OBJECT,
    PROGRESS,
    QUIET,
    RATE,
    SHORT_FORMAT,
    SOURCE_CACHE,
)
from safeimg.cli.values import cache_mode

COMMANDS = (
    Command(
        "rebase",
        "Give an image another backing image.",
        (IMAGE,),
        (
            HELP,
            OBJECT,
            IMAGE_OPTS,
            FORCE_SHARE,
            SHORT_FORMAT,
            Option("backing", "b", None, "file", "The new backing image; an empty name for none."),
            BACKING_FORMAT,
            Option("unsafe", "u", None, None, "Change the name alone; what the image shows may change with it."),
            CACHE,
            SOURCE_CACHE,
            RATE,
            PROGRESS,
            LONG_PROGRESS,
            QUIET,
            *JOURNALING,
        ),
        (
            ("Onto a newer base; what differs is copied", "rebase -p -b new.qcow2 -F qcow2 overlay.qcow2"),
            ("Onto nothing: everything is copied", "rebase -b '' overlay.qcow2"),
            ("The base was moved or renamed", "rebase -u -b /new/place/base.qcow2 -F qcow2 overlay.qcow2"),
        ),
        "Killed, the image shows what it always did: `safeimg resume IMAGE` (or the same command again) finishes it, "
        "`safeimg rollback IMAGE` takes it back.",
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    if len(arguments.positional) != 1:
        raise usage("Expecting one image file name")
    backing: str | None = arguments.last("backing")
    unsafe = arguments.flag("unsafe")
    if backing is None and not unsafe:
        raise usage("Must specify backing file (-b) or use unsafe mode (-u)")
    with display(arguments) as shown:
        shown.report(0, 1)  # as qemu-img, before it looks at anything
        _rebase(arguments, backing, unsafe, shown)
    return 0


def _rebase(arguments: Arguments, backing: str | None, unsafe: bool, shown: Display) -> None:
    cache = cache_mode(arguments.last("cache", "writeback"), "Invalid cache option")
    cache_mode(arguments.last("source-cache", "writeback"), "Invalid source cache option")
    name, fmt = image_name(arguments, arguments.positional[0], arguments.last("format"))
    backing_format = arguments.last("backing-format")
    from safeimg.drivers.transfer.core import Settings
    from safeimg.ops.launch import Environment
    from safeimg.ops.rebase import rebase, rebase_unsafe
    from safeimg.recovery.gate import begin_or_resume

    async def work(environment: Environment) -> None:
        async def begin() -> None:
            if unsafe:
                await rebase_unsafe(
                    environment, name, backing, backing_format, fmt=fmt, cache=cache, warn=warn_image
                )
            else:
                await rebase(
                    environment, name, backing or "", backing_format, fmt=fmt, cache=cache, warn=warn_image
                )

        await begin_or_resume(name, environment, "rebase", begin)

    settings = Settings(rate=arguments.last("rate") or None, writeback=cache != "unsafe")
    run_stoppable(arguments, shown, work, image=name, settings=settings)
    shown.finish()
