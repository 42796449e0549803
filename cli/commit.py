"""commit: an image's changes go into its backing image."""

from __future__ import annotations

from safeimg.cli.common import image_name, warn_image
from safeimg.cli.errors import usage
from safeimg.cli.options import Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import display
from safeimg.cli.running import run_stoppable
from safeimg.cli.shared import (
    CACHE,
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
)
from safeimg.cli.values import cache_mode
from safeimg.drivers.formats.naming import text_of

COMMANDS = (
    Command(
        "commit",
        "Write an image's changes into its backing image.",
        (IMAGE,),
        (
            HELP,
            OBJECT,
            IMAGE_OPTS,
            SHORT_FORMAT,
            CACHE,
            Option("base", "b", None, "base", "The image of the chain to commit to (the one below)."),
            Option("drop", "d", None, None, "Do not empty the image afterwards."),
            PROGRESS,
            LONG_PROGRESS,
            QUIET,
            RATE,
            Option(
                "no-undo",
                None,
                "no-undo",
                None,
                "Keep no before-images: faster, but it cannot be rolled back.",
                own=True,
            ),
            *JOURNALING,
        ),
        (
            ("Into the backing image, and empty the overlay", "commit overlay.qcow2"),
            ("Several layers at once", "commit -b base.qcow2 top.qcow2"),
            ("At 50 MiB a second, with progress", "commit -p -r 50M overlay.qcow2"),
        ),
        "Killed, it leaves a readable image: `safeimg resume BASE` (or the same command again) finishes it, "
        "`safeimg rollback BASE` takes it back.",
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    if len(arguments.positional) != 1:
        raise usage("Expecting one image file name")
    cache = cache_mode(arguments.last("cache", "writeback"), "Invalid cache option")
    name, fmt = image_name(arguments, arguments.positional[0], arguments.last("format"))
    from safeimg.drivers.errors import StorageError
    from safeimg.drivers.transfer.core import Settings
    from safeimg.ops.commit_job import commit
    from safeimg.ops.launch import Environment
    from safeimg.recovery.gate import begin_or_resume

    settings = Settings(rate=arguments.last("rate") or None, writeback=cache != "unsafe")

    failed_to_empty = False

    def emptying_failed() -> None:
        nonlocal failed_to_empty
        failed_to_empty = True

    async def work(environment: Environment) -> None:
        async def begin() -> None:
            await commit(
                environment,
                name,
                base=arguments.last("base"),
                fmt=fmt,
                drop=arguments.flag("drop"),
                cache=cache,
                undo=not arguments.flag("no-undo"),
                warn=warn_image,
                begun=shown.begin,
                emptying_failed=emptying_failed,
            )

        await begin_or_resume(name, environment, "commit", begin)

    def io_error(error: StorageError) -> str:
        if failed_to_empty:
            return f"Failed to empty {text_of(name)}: {error.strerror}"
        return f"Block job failed: {error.strerror}"

    with display(arguments) as shown:
        shown.hold(wholly=True)
        run_stoppable(
            arguments, shown, work, image=name, settings=settings, io_error=io_error
        )  # fmt: skip
        shown.finish()
    if not arguments.flag("quiet"):
        print("Image committed.")
    return 0
