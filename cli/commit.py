"""commit: an image's changes go into its backing image."""

from __future__ import annotations

from safeimg.cli.common import image_name
from safeimg.cli.errors import usage
from safeimg.cli.options import Command
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import display
from safeimg.cli.running import run_stoppable
from safeimg.cli.values import cache_mode


def run(command: Command, arguments: Arguments) -> int:
    if len(arguments.positional) != 1:
        raise usage("Expecting one image file name")
    name, fmt = image_name(arguments, arguments.positional[0], arguments.last("format"))
    cache = cache_mode(arguments.last("cache", "writeback"), "Invalid cache option")
    from safeimg.drivers.transfer.core import Settings
    from safeimg.ops.commit_job import commit
    from safeimg.ops.launch import Environment
    from safeimg.recovery.gate import begin_or_resume

    settings = Settings(rate=arguments.last("rate") or None, writeback=cache != "unsafe")

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
            )

        await begin_or_resume(name, environment, "commit", begin)

    with display(arguments) as shown:
        run_stoppable(arguments, shown, work, image=name, settings=settings)
        shown.finish()
    if not arguments.flag("quiet"):
        print("Image committed.")
    return 0
