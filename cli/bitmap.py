"""bitmap: the persistent bitmaps of an image."""

from __future__ import annotations

from safeimg.cli.common import image_name, warn_image
from safeimg.cli.errors import CommandError
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import display
from safeimg.cli.running import run_stoppable
from safeimg.cli.shared import HELP, IMAGE, IMAGE_OPTS, JOURNALING, OBJECT, SHORT_FORMAT
from safeimg.cli.values import complain, size


def _granularity(text: str) -> int:
    return size("granularity", text)


def _merge(text: str) -> tuple[str, str]:
    return "merge", text


def _action(name: str, help: str) -> Option:
    return Option("action", None, name, None, help, constant=(name, ""))


COMMANDS = (
    Command(
        "bitmap",
        "Change the persistent bitmaps of an image.",
        (IMAGE, Argument("bitmap", "The bitmap's name.")),
        (
            HELP,
            OBJECT,
            IMAGE_OPTS,
            SHORT_FORMAT,
            _action("add", "Create the bitmap, enabled."),
            _action("remove", "Remove it."),
            _action("clear", "Clear all of its bits."),
            _action("enable", "Record writes in it from now on."),
            _action("disable", "Record no more writes in it."),
            Option("action", None, "merge", "source", "Set the bits of another bitmap in it.", _merge),
            Option(
                "source-file",
                "b",
                "source-file",
                "file",
                "The image whose bitmaps are merged, if not this one.",
            ),
            Option("source-format", "F", "source-format", "fmt", "Its format."),
            Option(
                "granularity",
                "g",
                "granularity",
                "size",
                "Bytes that a bit of an added bitmap stands for.",
                _granularity,
            ),
            *JOURNALING,
        ),
        (
            ("Start to record writes", "bitmap --add disk.qcow2 monday"),
            ("Stop, and start over under another name", "bitmap --disable disk.qcow2 monday"),
            (
                "What an overlay recorded, before it is committed",
                "bitmap --merge monday -b top.qcow2 base.qcow2 monday",
            ),
        ),
        "The actions are done in the order given, all of them at once or, if one is refused, none.",
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    from safeimg.ops.bitmap_plan import BitmapAction

    asked: list[tuple[str, str]] = arguments.all("action")
    kinds = {kind for kind, _ in asked}
    granularity = arguments.last("granularity", 0)
    source, source_format = arguments.last("source-file"), arguments.last("source-format")
    _check(arguments, kinds, granularity, source, source_format)
    filename, bitmap = arguments.positional
    name, fmt = image_name(arguments, filename, arguments.last("format"))
    actions = [
        BitmapAction(kind, bitmap, granularity if kind == "add" else 0, merged) for kind, merged in asked
    ]

    from safeimg.ops.bitmap import change_bitmaps
    from safeimg.ops.launch import Environment
    from safeimg.recovery.gate import begin_or_resume

    async def work(environment: Environment) -> None:
        async def begin() -> None:
            await change_bitmaps(
                environment,
                name,
                actions,
                fmt=fmt,
                source=source,
                source_format=source_format,
                warn=warn_image,
                complain=complain,
            )

        await begin_or_resume(name, environment, "bitmap", begin)

    with display(arguments) as shown:
        run_stoppable(arguments, shown, work, image=name)
        shown.finish()
    return 0


def _check(
    arguments: Arguments, kinds: set[str], granularity: int, source: str | None, source_format: str | None
) -> None:
    """Refuses what makes no sense before any file is touched, in qemu-img's order."""
    if not kinds:
        raise CommandError(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge"
        )
    if granularity and "add" not in kinds:
        raise CommandError("granularity only supported with --add")
    if source is not None and "merge" not in kinds:
        raise CommandError("Merge bitmap source file only supported with --merge")
    if source_format is not None and source is None:
        raise CommandError("-F only supported with -b")
    if len(arguments.positional) != 2:
        raise CommandError("Expecting filename and bitmap name")
