"""convert: images copied into a new one of any format."""

from __future__ import annotations

from safeimg.cli import values
from safeimg.cli.common import unwarned_name
from safeimg.cli.create import print_option_help
from safeimg.cli.errors import CommandError
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import display
from safeimg.cli.running import run_stoppable
from safeimg.cli.shared import (
    BACKING_FORMAT,
    CACHE,
    FORCE_SHARE,
    HELP,
    IMAGE_OPTS,
    JOURNALING,
    LONG_PROGRESS,
    OBJECT,
    OPTIONS,
    PROGRESS,
    QUIET,
    RATE,
    SHORT_FORMAT,
    SOURCE_CACHE,
)
from safeimg.cli.values import cache_mode, warn
from safeimg.drivers.errors import StorageError
from safeimg.drivers.formats.naming import Blockdev, from_options

COMMANDS = (
    Command(
        "convert",
        "Copy images into a new one of any format.",
        (
            Argument("source", "The images to copy, joined in this order.", several=True),
            Argument("target", "The image to write."),
        ),
        (
            HELP,
            OBJECT,
            IMAGE_OPTS,
            Option(
                "target-image-opts",
                None,
                "target-image-opts",
                None,
                "Take the target's name as driver=…,file.filename=… options (with -n).",
            ),
            FORCE_SHARE,
            Option("salvage", None, "salvage", None, "Go on after read errors; what cannot be read is zero."),
            Option("target-is-zero", None, "target-is-zero", None, "The target (-n) reads as zeroes."),
            Option("bitmaps", None, "bitmaps", None, "Copy the top image's persistent bitmaps."),
            Option(
                "skip-broken-bitmaps",
                None,
                "skip-broken-bitmaps",
                None,
                "With --bitmaps: leave inconsistent ones out.",
            ),
            SHORT_FORMAT._replace(help="Format of the sources."),
            Option("target-format", "O", None, "fmt", "Format of the target (raw if not given)."),
            Option(
                "backing",
                "B",
                None,
                "file",
                "Backing image of the target: what is equal there is not copied.",
            ),
            BACKING_FORMAT,
            Option("copy-offloading", "C", None, None, "Let the file system copy where it can."),
            Option("compress", "c", None, None, "Compress the target."),
            Option(
                "window",
                None,
                "window",
                "size",
                "With -c (zlib): 4k, which all readers know, or 32k: a tenth smaller; QEMU reads it, others may not.",
                values.window,
                own=True,
            ),
            OPTIONS,
            Option("snapshot", "l", None, "snapshot", "Convert an internal snapshot.", values.snapshot),
            Option(
                "sparse",
                "S",
                None,
                "size",
                "Runs of zeroes of that size (4k) become holes; 0: none do.",
                values.sparse_size,
            ),
            PROGRESS,
            LONG_PROGRESS,
            QUIET,
            Option("no-create", "n", None, None, "The target exists; write into it."),
            Option("undo", None, "undo", None, "With -n: keep what is overwritten until it is settled.", own=True),
            Option(
                "coroutines",
                "m",
                None,
                "count",
                "Copies that run in parallel (1 to 16, 8).",
                values.coroutines,
            ),
            Option("out-of-order", "W", None, None, "Write in any order."),
            RATE,
            CACHE,
            SOURCE_CACHE,
            *JOURNALING,
        ),
        (
            ("raw to qcow2", "convert -p -O qcow2 disk.raw disk.qcow2"),
            (
                "Compressed, for shipping",
                "convert -c -O qcow2 -o compression_type=zstd disk.qcow2 small.qcow2",
            ),
            ("A chain flattened into a raw image", "convert -O raw top.qcow2 disk.raw"),
        ),
        "Killed, it goes on where it was when the same command is run anew, or with `safeimg resume TARGET`: "
        "`safeimg rollback TARGET` removes what was begun.",
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    options: list[str] = arguments.all("options")
    words = arguments.positional
    _check(arguments)
    if print_option_help(options, arguments.last("target-format", "raw"), words[-1] if len(words) > 1 else None):
        return 0
    if len(words) < 2:
        raise CommandError("Must specify image file name")
    fmt, target_format = arguments.last("format"), arguments.last("target-format")
    source_cache = cache_mode(arguments.last("source-cache", "writeback"), "Invalid source cache option")
    sources = tuple(unwarned_name(arguments, word, fmt)[0] for word in words[:-1])
    target: str | Blockdev = words[-1]
    if arguments.flag("target-image-opts"):
        target = from_options(words[-1])
    cache: str = arguments.last("cache", _default_cache())

    from safeimg.cli.main import program_name
    from safeimg.drivers.transfer.core import Settings, sensible_workers
    from safeimg.ops.convert import convert
    from safeimg.ops.convert_options import Options
    from safeimg.ops.errors import Unanswered
    from safeimg.ops.launch import Environment
    from safeimg.recovery.gate import resumed, supersede

    request = Options(
        sources=sources,
        target=target,
        source_format=fmt,
        target_format=target_format,
        create_options=options,
        backing=arguments.last("backing"),
        backing_format=arguments.last("backing-format"),
        create=not arguments.flag("no-create"),
        target_is_zero=arguments.flag("target-is-zero"),
        compress=arguments.flag("compress"),
        window=arguments.last("window"),
        copy_offload=arguments.flag("copy-offloading"),
        sparse=arguments.last("sparse"),
        cache="none" if cache == "off" else cache,
        source_cache=source_cache,
        force_share=arguments.flag("force-share"),
        snapshot=arguments.last("snapshot"),
        bitmaps=arguments.flag("bitmaps"),
        skip_broken_bitmaps=arguments.flag("skip-broken-bitmaps"),
        salvage=arguments.flag("salvage"),
        undo=arguments.flag("undo"),
    )
    settings = Settings(
        workers=sensible_workers(arguments.last("coroutines", 8)),
        ordered=not arguments.flag("out-of-order"),
        rate=arguments.last("rate") or None,
        writeback=cache != "unsafe",
    )

    async def work(environment: Environment) -> None:
        if not await resumed(target, environment, "convert"):
            await convert(
                environment,
                request,
                supersede=lambda path: supersede(path, environment, "convert"),
                warn=warn,
            )

    with display(arguments) as shown:
        try:
            run_stoppable(arguments, shown, work, image=target, settings=settings, io_error=_io_error)
        except Unanswered as error:
            raise CommandError(str(error), code=0 if program_name() == "qemu-img" else 1) from error
        shown.finish()
    return 0


def _io_error(error: StorageError) -> str:
    from safeimg.ops.convert_plan import CopyFailed

    if not isinstance(error, CopyFailed):
        return str(error)
    unit = "offset" if error.what == "reading block status" else "byte"
    return f"error while {error.what} at {unit} {error.at}: {error.strerror}"


def _check(arguments: Arguments) -> None:
    """Refuses what makes no sense before any file is touched, in qemu-img's order."""
    flag = arguments.flag
    if flag("skip-broken-bitmaps") and not flag("bitmaps"):
        raise CommandError("Use of --skip-broken-bitmaps requires --bitmaps")
    if not flag("no-create"):
        for name in ("target-image-opts", "target-is-zero"):
            if flag(name):
                raise CommandError(f"--{name} requires use of -n flag")
    if flag("window") and not flag("compress"):
        raise CommandError("--window requires -c")
    if flag("copy-offloading"):
        for name, message in (
            ("compress", "Cannot enable copy offloading when -c is used"),
            ("sparse", "Cannot enable copy offloading when -S is used"),
            ("salvage", "Cannot use copy offloading in salvaging mode"),
        ):
            if flag(name):
                raise CommandError(message)
    if flag("no-create") and flag("options"):
        raise CommandError("-o has no effect when skipping image creation")


def _default_cache() -> str:
    """safeimg makes what it converts durable; called as qemu-img it does as that does."""
    from safeimg.cli.main import program_name

    return "unsafe" if program_name() == "qemu-img" else "writeback"
