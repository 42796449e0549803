"""convert: images copied into a new one of any format."""

from __future__ import annotations

from safeimg.cli.common import image_options
from safeimg.cli.create import print_option_help
from safeimg.cli.errors import CommandError
from safeimg.cli.options import Command
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import display
from safeimg.cli.running import run_stoppable
from safeimg.cli.values import cache_mode

_LATER = (("bitmaps", "--bitmaps"), ("snapshot", "-l"), ("salvage", "--salvage"))


def run(command: Command, arguments: Arguments) -> int:
    options: list[str] = arguments.all("options")
    words = arguments.positional
    if print_option_help(options, arguments.last("target-format", "raw"), words[-1] if words else None):
        return 0
    _check(arguments)
    sources, fmt = list(words[:-1]), arguments.last("format")
    target, target_format = words[-1], arguments.last("target-format")
    if arguments.flag("image-opts"):
        named = [image_options(text) for text in sources]
        sources, fmt = [name for name, _ in named], named[0][1]
    if arguments.flag("target-image-opts"):
        target, given = image_options(target)
        target_format = given or target_format
    cache = cache_mode(arguments.last("cache", _default_cache()), "Invalid cache option")

    from safeimg.drivers.transfer.core import Settings, sensible_workers
    from safeimg.ops.convert import Options, convert
    from safeimg.ops.create_options import split_options
    from safeimg.ops.launch import Environment
    from safeimg.recovery.gate import resumed, supersede

    request = Options(
        sources=tuple(sources),
        target=target,
        source_format=fmt,
        target_format=target_format,
        create_options=dict(split_options(",".join(options))),
        backing=arguments.last("backing"),
        backing_format=arguments.last("backing-format"),
        create=not arguments.flag("no-create"),
        target_is_zero=arguments.flag("target-is-zero"),
        compress=arguments.flag("compress"),
        copy_offload=arguments.flag("copy-offloading"),
        sparse=arguments.last("sparse"),
        cache=cache,
        source_cache=cache_mode(arguments.last("source-cache", "writeback"), "Invalid source cache option"),
        force_share=arguments.flag("force-share"),
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
                environment, request, supersede=lambda path: supersede(path, environment, "convert")
            )

    with display(arguments) as shown:
        run_stoppable(arguments, shown, work, image=target, settings=settings)
        shown.finish()
    return 0


def _check(arguments: Arguments) -> None:
    """Refuses what makes no sense before any file is touched, in qemu-img's order."""
    flag = arguments.flag
    if flag("image-opts") and flag("format"):
        raise CommandError("--image-opts and --format are mutually exclusive")
    if flag("skip-broken-bitmaps") and not flag("bitmaps"):
        raise CommandError("Use of --skip-broken-bitmaps requires --bitmaps")
    if not flag("no-create"):
        for name in ("target-image-opts", "target-is-zero"):
            if flag(name):
                raise CommandError(f"--{name} requires use of -n flag")
    elif flag("options"):
        raise CommandError("-o has no effect when skipping image creation")
    if flag("copy-offloading"):
        for name, message in (
            ("compress", "Cannot enable copy offloading when -c is used"),
            ("sparse", "Cannot enable copy offloading when -S is used"),
            ("salvage", "Cannot use copy offloading in salvaging mode"),
        ):
            if flag(name):
                raise CommandError(message)
    if len(arguments.positional) < 2:
        raise CommandError("Must specify image file name")
    cache_mode(arguments.last("source-cache", "writeback"), "Invalid source cache option")
    if flag("bitmaps") and arguments.last("target-format", "raw") == "raw":
        raise CommandError("Format driver 'raw' does not support bitmaps")
    for name, option in _LATER:
        if flag(name):
            raise CommandError(f"convert {option} is not supported yet")


def _default_cache() -> str:
    """safeimg makes what it converts durable; called as qemu-img it does as that does."""
    from safeimg.cli.main import program_name

    return "unsafe" if program_name() == "qemu-img" else "writeback"
