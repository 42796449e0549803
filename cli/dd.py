"""dd: a part of an image, or all of it, copied into a new one."""

from __future__ import annotations

from safeimg.cli.common import image_name
from safeimg.cli.errors import CommandError
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import display
from safeimg.cli.running import run_stoppable
from safeimg.cli.shared import FORCE_SHARE, HELP, IMAGE_OPTS, JOURNALING, OBJECT, SHORT_FORMAT
from safeimg.cli.values import complain, size

MAX_BLOCK = (1 << 31) - 1

COMMANDS = (
    Command(
        "dd",
        "Copy a part of an image into a new one.",
        (
            Argument("if=INPUT", "The image to read."),
            Argument("of=OUTPUT", "The image to write. What is there is replaced."),
            Argument("bs=SIZE", "Bytes of a block (512).", False),
            Argument("count=N", "Stop behind that many blocks of the input.", False),
            Argument("skip=N", "Leave out that many blocks at its beginning.", False),
        ),
        (
            HELP,
            SHORT_FORMAT._replace(help="Format of the input."),
            Option("target-format", "O", None, "fmt", "Format of the output (raw if not given)."),
            FORCE_SHARE,
            OBJECT,
            IMAGE_OPTS,
            *JOURNALING,
        ),
        (
            ("The first mebibyte", "dd bs=1M count=1 if=disk.qcow2 of=start.raw"),
            ("All but the first sector", "dd -O qcow2 skip=1 if=disk.raw of=rest.qcow2"),
        ),
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    operands = dict(_operand(word) for word in arguments.positional)
    if arguments.flag("image-opts") and arguments.flag("format"):
        raise CommandError("--image-opts and --format are mutually exclusive")
    if "if" not in operands or "of" not in operands:
        raise CommandError("Must specify both input and output files")
    fmt: str | None = arguments.last("format")
    target_format: str = arguments.last("target-format", "raw")
    source, target = str(operands["if"]), str(operands["of"])
    from safeimg.drivers.transfer.core import Settings, sensible_workers
    from safeimg.ops.convert import convert
    from safeimg.ops.convert_options import Blocks, Options
    from safeimg.ops.launch import Environment
    from safeimg.recovery.gate import resumed, supersede

    count, skip, block = operands.get("count"), operands.get("skip", 0), operands.get("bs", 512)
    assert isinstance(block, int) and isinstance(skip, int) and not isinstance(count, str)
    request = Options(
        sources=(image_name(arguments, source, fmt)[0],),
        target=target,
        source_format=fmt,
        target_format=target_format,
        sparse=0,
        force_share=arguments.flag("force-share"),
        blocks=Blocks(block, count, skip),
    )

    async def work(environment: Environment) -> None:
        if not await resumed(target, environment, "dd"):
            await convert(
                environment, request, supersede=lambda path: supersede(path, environment, "dd"),
                complain=complain,
            )  # fmt: skip

    settings = Settings(workers=sensible_workers(8), writeback=True)
    with display(arguments) as shown:
        run_stoppable(arguments, shown, work, image=target, settings=settings)
    return 0


def _operand(word: str) -> tuple[str, str | int]:
    name, _, value = word.partition("=")
    if name in ("if", "of"):
        return name, value
    if name == "bs":
        block = size("bs", value, maximum=1 << 128)
        if not 1 <= block <= MAX_BLOCK:
            raise CommandError(f"Invalid bs specified. Must be between 1 and {MAX_BLOCK}.")
        return name, block
    if name in ("count", "skip"):
        return name, size(name, value)
    raise CommandError(f"unrecognized operand {name}")
