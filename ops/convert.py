"""convert: the guest content of one or several images, written to a new or an existing image of any format.

This module judges what was asked for and opens the images, in qemu-img's order and with its messages.
`convert_job` makes the job from them, `convert_steps` its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from safeimg.drivers.errors import DriverError, LockError, UsageError
from safeimg.drivers.formats.api import Driver, Image, Kind
from safeimg.drivers.formats.chain import (
    OpenError,
    backing_filename,
    close_chain,
    local_path,
    only_top,
    open_chain,
)
from safeimg.drivers.formats.naming import (
    NBD,
    from_filename,
    lasting,
    notices,
    protocol,
    protocol_driver,
    text_of,
)
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.formats.snapshots import load
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import FileStat, FileSystem, look
from safeimg.drivers.transfer.core import Transfer
from safeimg.ops.convert_bitmaps import check_source, check_target, with_copies
from safeimg.ops.convert_job import compressor, job_of
from safeimg.ops.convert_options import (
    Options,
    check,
    check_cache,
    check_chain,
    creation,
    not_made,
    while_converting,
)
from safeimg.ops.convert_steps import PAGE
from safeimg.ops.create import files_of, make_durable, settle_pending
from safeimg.ops.launch import Environment, Job, launch
from safeimg.ops.repair import open_sound
from safeimg.ops.session import refuse_pending_on


async def convert(
    environment: Environment,
    options: Options,
    *,
    supersede: Callable[[str], None] | None = None,
    warn: Callable[[str], None] = lambda message: None,
    complain: Callable[[str], None] = lambda message: None,
) -> None:
    """Converts. What is pending on a target that is replaced wholly is given up by `supersede(path)`, if no
    other image is changed by it; without `supersede`, that is refused as any other change is. `complain` is told
    when there is nothing to copy where dd was to start.

    `warn` gets warnings in qemu-img's words. Raises `DriverError` with qemu-img's message, `SomethingPending`,
    `OperationPaused`."""
    fs, transfer, secrets = environment.fs, environment.transfer, environment.secrets
    job = await open_sound(
        environment,
        lambda: open_job(
            fs, options, transfer, supersede=supersede, complain=complain, secrets=secrets, warn=warn
        ),
    )
    try:
        await launch(job, environment)
    finally:
        job.close()


def open_job(
    fs: FileSystem,
    options: Options,
    transfer: Transfer,
    *,
    supersede: Callable[[str], None] | None = None,
    complain: Callable[[str], None] = lambda message: None,
    secrets: Secrets = NO_SECRETS,
    warn: Callable[[str], None] = lambda message: None,
) -> Job:
    """Opens the sources, makes the target (or opens it, with -n), and plans how it is written.

    Raises `DriverError` with qemu-img's message. A file that was made is gone then; one that was there is
    empty."""
    check(options)
    chains: list[list[Image]] = []
    try:
        for name in options.sources:
            for notice in notices(name):
                warn(notice)
            chains.append(
                open_chain(fs, name, format=options.source_format, cache=options.source_cache,
                           force_share=options.force_share, steady=options.command == "convert", secrets=secrets)
            )  # fmt: skip
        if options.snapshot is not None:
            if len(chains) > 1 and not options.snapshot.startswith("snapshot."):
                raise UsageError("No support for concatenating multiple snapshot")
            chains[0] = load(
                chains[0], options.snapshot, protocol_driver(options.sources[0], options.source_format)
            )
        part = 0, sum(chain[0].size for chain in chains)
        if options.blocks is not None:
            found = options.blocks.part(part[1])
            part = found or (0, 0)
        check_chain(options, several=len(chains) > 1)
        existing = _writes_existing(fs, options)
        made = None if existing else creation(options, several=len(chains) > 1, warn=warn)
        if options.bitmaps:
            check_source(chains, options.skip_broken_bitmaps, warn)
        if made is None:
            for notice in notices(options.target):
                warn(notice)
            return _into_existing(fs, options, transfer, chains, part, secrets)
        job = _into_new(fs, options, transfer, chains, part, supersede, secrets, *made)
        if options.blocks is not None and found is None:
            complain(f"{text_of(options.sources[0])}: cannot skip to specified offset")
        return job
    except BaseException:
        for chain in chains:
            close_chain(chain)
        raise


def _writes_existing(fs: FileSystem, options: Options) -> bool:
    """With -n, and a block device or server as a raw target: its size is what it is, and it may hold anything."""
    if not options.create or (options.format == "raw" and _is_on_server(options)):
        return True
    found = look(fs, local_path(options.target_name)) if options.format == "raw" else None
    return found is not None and found.is_device


def _is_on_server(options: Options) -> bool:
    return isinstance(options.target, str) and protocol(options.target) in NBD


def _open_target(fs: FileSystem, options: Options, secrets: Secrets, *, unfinished: bool) -> list[Image]:
    format = options.format if isinstance(options.target, str) or unfinished else options.target_format
    return open_chain(
        fs, options.target, format=format, write=True, cache=options.cache, repair=unfinished and only_top,
        secrets=secrets,
    )  # fmt: skip


def _into_existing(
    fs: FileSystem,
    options: Options,
    transfer: Transfer,
    chains: list[list[Image]],
    part: tuple[int, int],
    secrets: Secrets,
) -> Job:
    check_cache(options)
    if not isinstance(options.target, str) and options.target_format is not None:
        raise UsageError("--image-opts and --format are mutually exclusive")
    try:
        target = _open_target(fs, options, secrets, unfinished=False)
    except OpenError as error:
        if not (options.create and _is_on_server(options)):
            raise
        reason = str(error).removeprefix(f"Could not open '{options.target_name}': ")
        failed = "Protocol driver 'nbd' does not support image creation, and opening the image failed"
        raise not_made(options, f"{failed}: {reason}") from error
    try:
        refuse_pending_on(fs, target[0].file.path)
        if options.bitmaps:
            check_target(lookup(target[0].format), target[0])
        if options.compress:
            compressor(target[0], options.window)
        if target[0].size < part[1] and options.create and _is_on_server(options):
            raise not_made(options, "Cannot grow NBD nodes")
        if target[0].size < part[1]:
            raise UsageError("output file is smaller than input file")
        return _job(fs, options, transfer, chains, part, target, created=False)
    except BaseException:
        close_chain(target)
        raise


def _into_new(
    fs: FileSystem,
    options: Options,
    transfer: Transfer,
    chains: list[list[Image]],
    part: tuple[int, int],
    supersede: Callable[[str], None] | None,
    secrets: Secrets,
    driver: Driver,
    asked: Mapping[str, str],
) -> Job:
    path = local_path(options.target_name)
    found = look(fs, path)
    is_source = found is not None and _is_among(found, chains)
    if supersede is None or is_source:  # nothing is given up for what will be refused
        refuse_pending_on(fs, path)
    else:
        settle_pending(fs, path, supersede)
    new = [name for name in files_of(path, asked) if look(fs, name) is None]
    possible = False

    def ready() -> None:
        """What qemu-img looks at when it has made the file, and lost what was there."""
        nonlocal possible
        if is_source:  # it must not be emptied to become the target
            raise LockError(f'Failed to get "write" lock\nIs another process using the image [{path}]?')
        possible = True
        check_cache(options)
        if options.bitmaps:
            check_target(driver)
        if found is not None:
            _try_backing(fs, options, asked, secrets)

    try:
        try:
            driver.create(
                fs, path, part[1], asked, unfinished=options.command, secrets=secrets,
                ready=ready,
            )
        except DriverError as error:
            if possible and isinstance(error, (UsageError, OpenError)):
                raise
            raise while_converting(options, error) from error
        for name in files_of(path, asked):
            make_durable(fs, name, options.cache)
        options = _unlocking(options, driver, asked)
        target = _open_target(fs, options, secrets, unfinished=True)
        try:
            if options.bitmaps:
                check_target(driver, target[0])
            return _job(fs, options, transfer, chains, part, target, created=True)
        except BaseException:
            close_chain(target)
            raise
    except BaseException:
        for name in new:
            if look(fs, name) is not None:
                fs.unlink(name)
        raise


def _try_backing(fs: FileSystem, options: Options, asked: Mapping[str, str], secrets: Secrets) -> None:
    """Refuses a backing image that cannot be opened, as opening the new image would."""
    if "backing_file" not in asked:
        return
    try:
        name = backing_filename(options.target_name, asked["backing_file"])
        close_chain(open_chain(fs, name, format=asked.get("backing_fmt"), secrets=secrets))
    except OpenError as error:
        reason = str(error).removeprefix(f"Could not open '{name}': ")
        raise OpenError(f"Could not open '{options.target_name}': Could not open backing file: {reason}") from error


def _unlocking(options: Options, driver: Driver, asked: Mapping[str, str]) -> Options:
    """The same, with what opening a target takes that was made with such options: its secret."""
    opening = {option.name: asked[option.name] for option in driver.runtime_options if option.name in asked}
    if not opening or not isinstance(options.target, str):
        return options
    named = from_filename(options.target)
    return options._replace(target=named._replace(options={**named.options, **opening}))


def _is_among(target: FileStat, chains: Iterable[Sequence[Image]]) -> bool:
    """Whether it is a source, or a backing image of one."""
    files = (file.stat() for chain in chains for layer in chain for file in (layer.file, layer.data))
    return any((file.device, file.inode) == (target.device, target.inode) for file in files)


def _holds_noise(image: Image) -> bool:
    """Whether a new image has places for data already that do not read as zeroes: holes that are decrypted."""
    return image.cipher is not None and any(extent.kind is Kind.DATA for extent in image.extents(0, image.size))


def _job(
    fs: FileSystem,
    options: Options,
    transfer: Transfer,
    chains: list[list[Image]],
    part: tuple[int, int],
    target: list[Image],
    *,
    created: bool,
) -> Job:
    if options.bitmaps:  # what cannot be copied is refused before anything is written
        with_copies(target[0], chains[0][0])
    size = part[1]
    backing = target[1].size if len(target) > 1 else 0
    if created:
        zero_below = size if _holds_noise(target[0]) else min(backing, size)
    else:
        zero_below = 0 if options.target_is_zero else size
    skip_below = 0
    if backing and len(chains) == 1 and len(chains[0]) > 1 and (created or options.backing is not None):
        # As in qemu-img: what the source's top layer has is copied, the target's backing image is to hold the
        # rest. Beyond the end of either backing image it cannot, and the content is copied.
        skip_below = min(backing, chains[0][1].size)
    settings: dict[str, Any] = {
        "layers": [len(target), *map(len, chains)],
        "formats": [target[0].format, *(chain[0].format for chain in chains)],
        "options": [lasting(name, fs.resolve) for name in (options.target, *options.sources)],
        "cache": options.cache,
        "source_cache": options.source_cache,
        "force_share": options.force_share,
        "snapshot": options.snapshot,
        "bitmaps": options.bitmaps,
        "salvage": options.salvage,
        "part": None if options.blocks is None else list(part),
        "created": created,
        "undo": options.undo and not created,
        "compress": options.compress,
        "window": options.window,
        "sparse": PAGE if options.sparse is None else options.sparse,
        "zero_below": zero_below,
        "skip_below": skip_below,
        "step_bytes": options.step_bytes,
        "step_seconds": options.step_seconds,
        "defer": options.defer if created else 0.0,
    }
    layers = [*target, *(layer for chain in chains for layer in chain)]
    return job_of(layers, settings, transfer)
