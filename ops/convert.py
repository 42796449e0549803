"""convert: the guest content of one or several images, written to a new or an existing image of any format.

This module judges what was asked for and opens the images, in qemu-img's order and with its messages.
`convert_job` makes the job from them, `convert_steps` its steps.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from safeimg.drivers.errors import DriverError, LockError, StorageError, UsageError
from safeimg.drivers.formats.api import Driver, Image, Kind
from safeimg.drivers.formats.chain import OpenError, close_chain, local_path, only_top, open_chain
from safeimg.drivers.formats.naming import (
    NBD,
    Blockdev,
    from_filename,
    lasting,
    notices,
    protocol,
    protocol_driver,
    text_of,
)
from safeimg.drivers.formats.registry import lookup, names
from safeimg.drivers.formats.snapshots import load
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import CACHE_MODES, FileSystem, look
from safeimg.drivers.transfer.core import Transfer
from safeimg.ops.convert_bitmaps import check_source, check_target, with_copies
from safeimg.ops.convert_job import compressor, job_of
from safeimg.ops.convert_steps import PAGE, STEP_BYTES, STEP_SECONDS
from safeimg.ops.create import files_of, format_driver, make_durable, settle_pending
from safeimg.ops.create_options import for_driver, is_on, parse_options
from safeimg.ops.errors import Unanswered
from safeimg.ops.launch import Environment, Job, launch
from safeimg.ops.repair import open_sound
from safeimg.ops.session import refuse_pending_on

_SEVERAL = "Having a backing file for the target makes no sense when concatenating multiple input images"


class Blocks(NamedTuple):
    """Which part of the source `dd` copies. Counted as qemu-img does: `number` blocks from the beginning of the source,
    of which the first `skip` are left out."""

    size: int = 512  # bytes: bs=
    number: int | None = None  # count=
    skip: int = 0

    def part(self, source: int) -> tuple[int, int] | None:
        """Offset and length in a source of so many bytes; None if what is skipped reaches beyond its end."""
        end = source if self.number is None else min(source, self.number * self.size)
        start = self.skip * self.size
        return (start, end - start) if start <= end else None


class Options(NamedTuple):
    """What `convert` is asked for; the letters are qemu-img's options."""

    sources: tuple[str | Blockdev, ...]
    target: str | Blockdev
    source_format: str | None = None  # -f
    target_format: str | None = None  # -O; raw if None (with -n, too), unless the target is a `Blockdev`
    create_options: Sequence[str] = ()  # -o, as given
    backing: str | None = None  # -B
    backing_format: str | None = None  # -F
    create: bool = True  # not -n
    target_is_zero: bool = False
    compress: bool = False  # -c
    copy_offload: bool = False  # -C; accepted, and data goes through memory all the same
    sparse: int | None = None  # -S, bytes; 4096 if None
    cache: str = "writeback"  # -t, as given: what is none is refused where qemu-img looks at it
    source_cache: str = "writeback"  # -T
    force_share: bool = False  # -U
    snapshot: str | None = None  # -l
    bitmaps: bool = False
    skip_broken_bitmaps: bool = False
    salvage: bool = False  # what cannot be read is zero
    blocks: Blocks | None = None  # given: the command is dd
    undo: bool = False  # an existing target: keep what is overwritten until it is settled
    step_bytes: int = STEP_BYTES
    step_seconds: float = STEP_SECONDS
    defer: float = 1.0  # seconds of work on a new target after which its journal begins

    @property
    def command(self) -> str:
        return "convert" if self.blocks is None else "dd"

    @property
    def target_name(self) -> str:
        """As given."""
        return text_of(self.target)

    @property
    def format(self) -> str:
        """The target's."""
        return "raw" if self.target_format is None else self.target_format


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
    _check(options)
    chains: list[list[Image]] = []
    try:
        for name in options.sources:
            for notice in notices(name):
                warn(notice)
            chains.append(
                open_chain(fs, name, format=options.source_format, cache=options.source_cache,
                           force_share=options.force_share, secrets=secrets)
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
        _check_chain(options, several=len(chains) > 1)
        existing = _writes_existing(fs, options)
        creation = None if existing else _creation(options, several=len(chains) > 1, warn=warn)
        if options.bitmaps:
            check_source(chains, options.skip_broken_bitmaps, warn)
        if creation is None:
            for notice in notices(options.target):
                warn(notice)
            return _into_existing(fs, options, transfer, chains, part, secrets)
        job = _into_new(fs, options, transfer, chains, part, supersede, secrets, *creation)
        if options.blocks is not None and found is None:
            complain(f"{text_of(options.sources[0])}: cannot skip to specified offset")
        return job
    except BaseException:
        for chain in chains:
            close_chain(chain)
        raise


def _check(options: Options) -> None:
    """Refuses combinations that make no sense, before anything is opened."""
    if options.compress and options.copy_offload:
        raise UsageError("Cannot enable copy offloading when -c is used")
    if options.sparse is not None and options.copy_offload:
        raise UsageError("Cannot enable copy offloading when -S is used")
    if options.target_is_zero and options.create:
        raise UsageError("--target-is-zero requires use of -n flag")
    if options.create_options and not options.create:
        raise UsageError("-o has no effect when skipping image creation")


def _check_chain(options: Options, *, several: bool) -> None:
    """Refuses -B where it makes no sense, once the sources are open."""
    if options.target_is_zero and options.backing is not None:
        raise Unanswered("Cannot use --target-is-zero when the destination image has a backing file")
    if options.backing is not None and several and not options.create:
        raise UsageError(_SEVERAL)


def _check_cache(options: Options) -> None:
    if options.cache not in CACHE_MODES:
        raise UsageError(f"Invalid cache option: {options.cache}")


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
    _check_cache(options)
    if not isinstance(options.target, str) and options.target_format is not None:
        raise UsageError("--image-opts and --format are mutually exclusive")
    try:
        target = _open_target(fs, options, secrets, unfinished=False)
    except OpenError as error:
        if not (options.create and _is_on_server(options)):
            raise
        reason = str(error).removeprefix(f"Could not open '{options.target_name}': ")
        failed = "Protocol driver 'nbd' does not support image creation, and opening the image failed"
        raise _not_made(options, f"{failed}: {reason}") from error
    try:
        refuse_pending_on(fs, target[0].file.path)
        if options.bitmaps:
            check_target(lookup(target[0].format), target[0])
        if options.compress:
            compressor(target[0])
        if target[0].size < part[1] and options.create and _is_on_server(options):
            raise _not_made(options, "Cannot grow NBD nodes")
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
    _refuse_source(fs, options, path, chains)
    if supersede is None:
        refuse_pending_on(fs, path)
    else:
        settle_pending(fs, path, supersede)
    found = look(fs, path)
    new = [name for name in files_of(path, asked) if look(fs, name) is None]
    began = possible = False

    def ready() -> None:
        """What qemu-img looks at when it has made the file, and lost what was there."""
        nonlocal possible
        possible = True
        _check_cache(options)
        if options.bitmaps:
            check_target(driver)

    try:
        try:
            if found is not None and (found.is_device or stat.S_ISREG(found.mode)):
                # Creating empties the file, and must not do so to one that somebody uses.
                fs.open(path, write=True, locking=True).close()
            began = True
            driver.create(
                fs, path, part[1], asked, unfinished=options.command, secrets=secrets,
                ready=ready,
            )
        except DriverError as error:
            if possible and isinstance(error, UsageError):
                raise
            raise _while_converting(options, error) from error
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
        for name in new if began else ():
            if look(fs, name) is not None:
                fs.unlink(name)
        raise


def _unlocking(options: Options, driver: Driver, asked: Mapping[str, str]) -> Options:
    """The same, with what opening a target takes that was made with such options: its secret."""
    opening = {option.name: asked[option.name] for option in driver.runtime_options if option.name in asked}
    if not opening or not isinstance(options.target, str):
        return options
    named = from_filename(options.target)
    return options._replace(target=named._replace(options={**named.options, **opening}))


def _creation(
    options: Options, *, several: bool, warn: Callable[[str], None]
) -> tuple[Driver, dict[str, str]]:
    """The target's driver and the options it creates with, if it can make what is asked for."""
    if options.command == "dd" and options.format not in names():
        raise UsageError("Unknown file format")  # without its name
    driver = format_driver(options.format)
    local_path(options.target_name)  # what protocol it is comes first
    values = parse_options(driver.create_options, options.create_options, warn)
    known = {option.name for option in driver.create_options}
    for wanted, name, what in (
        (options.backing, "backing_file", "file"),
        (options.backing_format, "backing_fmt", "file format"),
    ):
        if wanted is not None:
            if name not in known:
                raise UsageError(f"Backing {what} not supported for file format '{driver.name}'")
            values[name] = wanted
    if "backing_file" in values:
        if several:
            raise UsageError(_SEVERAL)
        if "backing_fmt" not in values:
            raise UsageError("Use of backing file requires explicit backing format")
    if options.compress:
        if "compression_type" not in known:
            raise UsageError("Compression not supported for this file format")
        if values.get("preallocation", "off") != "off":
            raise UsageError("Compression and preallocation not supported at the same time")
        if is_on(values.get("encryption")) or "encrypt.format" in values:
            raise UsageError("Compression and encryption not supported at the same time")
    return driver, for_driver(driver.create_options, values)


def _refuse_source(fs: FileSystem, options: Options, path: str, chains: Iterable[Sequence[Image]]) -> None:
    """A source, or a backing image of one, must not be emptied to become the target."""
    target = look(fs, path)
    for layer in (layer for chain in chains for layer in chain):
        own = [layer.file.stat(), layer.data.stat()]
        if target is not None and (target.device, target.inode) in [(found.device, found.inode) for found in own]:
            held = f'Failed to get "write" lock\nIs another process using the image [{path}]?'
            raise _while_converting(options, LockError(held))


def _while_converting(options: Options, error: DriverError) -> UsageError:
    reason = str(error).removeprefix(f"{local_path(options.target_name)}: ")
    if isinstance(error, StorageError):
        verb = "resize file" if error.action == "truncate" else f"create '{options.target_name}'"
        reason = f"Could not {verb}: {error.strerror}"
    return _not_made(options, reason)


def _not_made(options: Options, reason: str) -> UsageError:
    what = "creating output image" if options.command == "dd" else f"converting {options.format}"
    return UsageError(f"{options.target_name}: error while {what}: {reason}")


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
        "sparse": PAGE if options.sparse is None else options.sparse,
        "zero_below": zero_below,
        "skip_below": skip_below,
        "step_bytes": options.step_bytes,
        "step_seconds": options.step_seconds,
        "defer": options.defer if created else 0.0,
    }
    layers = [*target, *(layer for chain in chains for layer in chain)]
    return job_of(layers, settings, transfer)
