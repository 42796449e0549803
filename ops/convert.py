"""convert: the guest content of one or several images, written to a new or an existing image of any format.

This module judges what was asked for and opens the images, in qemu-img's order and with its messages;
`convert_steps` does the work. `open_conversion` makes a new conversion; `reopen` makes the same one from the
settings in a log, for recovery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

from safeimg.drivers.errors import DriverError, LockError, StorageError, UsageError
from safeimg.drivers.formats.api import Driver, Image
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.formats.registry import lookup, names
from safeimg.drivers.storage.api import FileSystem
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.view import ConcatenatedView, Source, View
from safeimg.ops.convert_steps import PAGE, STEP_BYTES, STEP_SECONDS, Convert, Policy
from safeimg.ops.convert_write import Compress


@dataclass(frozen=True, slots=True)
class Options:
    """What `convert` is asked for; the letters are qemu-img's options."""

    sources: tuple[str, ...]
    target: str
    source_format: str | None = None  # -f
    target_format: str | None = None  # -O; raw if None (with -n, too)
    create_options: Mapping[str, str] = field(default_factory=dict)  # -o
    backing: str | None = None  # -B
    backing_format: str | None = None  # -F
    create: bool = True  # not -n
    target_is_zero: bool = False
    compress: bool = False  # -c
    copy_offload: bool = False  # -C; accepted, and data goes through memory all the same
    sparse: int | None = None  # -S, bytes; 4096 if None
    cache: str = "writeback"  # -t
    source_cache: str = "writeback"  # -T
    force_share: bool = False  # -U
    undo: bool = False  # an existing target: keep what is overwritten until it is settled
    step_bytes: int = STEP_BYTES
    step_seconds: float = STEP_SECONDS

    def settings(self) -> dict[str, Any]:
        """Everything, JSON-like, for the log."""
        return asdict(self)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Options:
        """What `settings` returned, once more. `UsageError` if it is not that."""
        known = {each.name for each in fields(cls)}
        if not {"sources", "target"} <= set(settings) <= known:
            raise UsageError("the log does not say what is to be converted")
        values = dict(settings)
        values["sources"] = tuple(values["sources"])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion with its images open: `target` (itself first, then its backing images) and all sources'
    chains."""

    operation: Convert
    sources: tuple[tuple[Image, ...], ...]
    target: tuple[Image, ...]
    created: bool  # the target was made, or emptied, for this conversion

    def close(self) -> None:
        for chain in (*self.sources, self.target):
            close_chain(list(chain))


def check(options: Options) -> None:
    """Refuses combinations that make no sense, before anything is opened. `UsageError`."""
    if options.compress and options.copy_offload:
        raise UsageError("Cannot enable copy offloading when -c is used")
    if options.sparse is not None and options.copy_offload:
        raise UsageError("Cannot enable copy offloading when -S is used")
    if options.target_is_zero and options.create:
        raise UsageError("--target-is-zero requires use of -n flag")
    if options.create_options and not options.create:
        raise UsageError("-o has no effect when skipping image creation")


def open_conversion(fs: FileSystem, options: Options, transfer: Transfer) -> Conversion:
    """Opens the sources, makes the target (or opens it, with -n), and plans how it is written.

    Raises `DriverError` with qemu-img's message. A file that was made is gone then; one that was there is
    empty."""
    check(options)
    chains: list[list[Image]] = []
    try:
        _open_sources(fs, options, chains)
        size = sum(chain[0].size for chain in chains)
        if _writes_existing(fs, options):
            return _into_existing(fs, options, transfer, chains, size)
        return _into_new(fs, options, transfer, chains, size)
    except BaseException:
        for chain in chains:
            close_chain(chain)
        raise


def reopen(fs: FileSystem, options: Options, transfer: Transfer, *, created: bool,
           unlinked: Sequence[tuple[int, int]] = ()) -> Conversion:
    """Opens the images of a conversion that has begun, for its next steps. `created` and `unlinked`: from the
    log."""
    chains: list[list[Image]] = []
    try:
        _open_sources(fs, options, chains)
        target = _open_target(fs, options, repair=True)
        chains.append(target)
        return _assemble(options, transfer, chains[:-1], target, created=created, unlinked=unlinked)
    except BaseException:
        for chain in chains:
            close_chain(chain)
        raise


def _open_sources(fs: FileSystem, options: Options, chains: list[list[Image]]) -> None:
    for name in options.sources:
        chains.append(open_chain(fs, name, format=options.source_format, cache=options.source_cache,
                                 force_share=options.force_share))


def _open_target(fs: FileSystem, options: Options, *, repair: bool = False) -> list[Image]:
    """`repair` takes a target that is not finished yet, or fenced."""
    return open_chain(fs, options.target, format=_target_format(options), write=True, cache=options.cache,
                      repair=repair)


def _target_format(options: Options) -> str:
    return options.target_format if options.target_format is not None else "raw"


def _writes_existing(fs: FileSystem, options: Options) -> bool:
    """With -n, and a block device as a raw target: its size is what it is, and it may hold anything."""
    if not options.create:
        return True
    found = fs.stat(options.target)
    return found is not None and found.is_device and _target_format(options) == "raw"


def _into_existing(fs: FileSystem, options: Options, transfer: Transfer, chains: list[list[Image]],
                   size: int) -> Conversion:
    target = _open_target(fs, options)
    try:
        if options.target_is_zero and len(target) > 1:
            raise UsageError("Cannot use --target-is-zero when the destination image has a backing file")
        if options.compress:
            _compressor(target[0])
        if target[0].size < size:
            raise UsageError("output file is smaller than input file")
        return _assemble(options, transfer, chains, target, created=False)
    except BaseException:
        close_chain(target)
        raise


def _into_new(fs: FileSystem, options: Options, transfer: Transfer, chains: list[list[Image]],
              size: int) -> Conversion:
    driver = _creator(options, several=len(chains) > 1)
    _refuse_source(fs, options, chains)
    existed = fs.stat(options.target) is not None
    asked = {name: value for name, value in options.create_options.items() if name != "size"}
    if options.backing is not None:
        asked["backing_file"] = options.backing
    if options.backing_format is not None:
        asked["backing_fmt"] = options.backing_format
    began = False
    try:
        try:
            if existed:
                # Creating empties the file, and must not do so to one that somebody uses.
                fs.open(options.target, write=True, locking=True).close()
            began = True
            driver.create(fs, options.target, size, asked, cache=options.cache, unfinished="convert")
        except DriverError as error:
            raise _while_converting(options, error) from error
        target = _open_target(fs, options, repair=True)
        try:
            return _assemble(options, transfer, chains, target, created=True)
        except BaseException:
            close_chain(target)
            raise
    except BaseException:
        if began and not existed and fs.stat(options.target) is not None:
            fs.unlink(options.target)
        raise


def _creator(options: Options, *, several: bool) -> Driver:
    """The target's driver, if it can make what is asked for."""
    format = _target_format(options)
    if format not in names():
        raise UsageError(f"Unknown file format '{format}'")
    driver = lookup(format)
    known = {option.name for option in driver.create_options}
    for name in options.create_options:
        if name not in known:
            raise UsageError(f"Invalid parameter '{name}'")
    for wanted, name, what in ((options.backing, "backing_file", "file"),
                               (options.backing_format, "backing_fmt", "format")):
        if wanted is not None and name not in known:
            raise UsageError(f"Backing {what} not supported for file format '{format}'")
    backing = options.backing if options.backing is not None else options.create_options.get("backing_file")
    if backing is not None:
        if several:
            raise UsageError(
                "Having a backing file for the target makes no sense when concatenating multiple input images"
            )
        if options.backing_format is None and "backing_fmt" not in options.create_options:
            raise UsageError("Use of backing file requires explicit backing format")
    if options.compress:
        if "compression_type" not in known:
            raise UsageError("Compression not supported for this file format")
        if options.create_options.get("preallocation", "off") != "off":
            raise UsageError("Compression and preallocation not supported at the same time")
    return driver


def _refuse_source(fs: FileSystem, options: Options, chains: Iterable[Sequence[Image]]) -> None:
    """A source, or a backing image of one, must not be emptied to become the target."""
    target = fs.stat(options.target)
    for chain in chains:
        for layer in chain:
            own = layer.file.stat()
            if target is not None and (own.device, own.inode) == (target.device, target.inode):
                held = f'Failed to get "write" lock\nIs another process using the image [{options.target}]?'
                raise _while_converting(options, LockError(held))


def _while_converting(options: Options, error: DriverError) -> UsageError:
    reason = str(error)
    if isinstance(error, StorageError):
        reason = f"Could not create '{options.target}': {error.strerror}"
    return UsageError(f"{options.target}: error while converting {_target_format(options)}: {reason}")


def _assemble(options: Options, transfer: Transfer, chains: list[list[Image]], target: list[Image], *,
              created: bool, unlinked: Sequence[tuple[int, int]] = ()) -> Conversion:
    views = [View(chain) for chain in chains]
    source: Source = views[0] if len(views) == 1 else ConcatenatedView(views)
    backing = target[1].size if len(target) > 1 else 0
    if created:
        zero_below = backing
    else:
        zero_below = 0 if options.target_is_zero else source.size
    skip_below = 0
    if backing and len(chains) == 1 and len(chains[0]) > 1 and (created or options.backing is not None):
        # As in qemu-img: what the source's top layer has is copied, the target's backing image is to hold the
        # rest. Beyond the end of either backing image it cannot, and the content is copied.
        skip_below = min(backing, chains[0][1].size)
    policy = Policy(
        sparse=PAGE if options.sparse is None else options.sparse,
        compress=_compressor(target[0]) if options.compress else None,
        zero_below=zero_below,
        skip_below=skip_below,
        existing=not created,
        undo=options.undo and not created,
        ahead=created and target[0].format != "raw" and not target[0].file.stat().is_device,
        step_bytes=options.step_bytes,
        step_seconds=options.step_seconds,
    )
    operation = Convert(source, target, transfer, policy, unlinked=unlinked)
    return Conversion(operation, tuple(tuple(chain) for chain in chains), tuple(target), created)


def _compressor(target: Image) -> Compress:
    """Compresses a cluster as the target wants it."""
    from safeimg.drivers.formats.qcow2.image import Qcow2Image

    if not isinstance(target, Qcow2Image):
        raise UsageError("Compression not supported for this file format")
    from safeimg.drivers.formats.qcow2.compression import compress

    packed: Callable[[memoryview], bytes | None] = partial(compress, target.header.compression_type)
    return packed
