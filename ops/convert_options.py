"""What `convert` and `dd` are asked for, and whether it makes sense: what can be judged before a target is made, in
qemu-img's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from safeimg.drivers.errors import DriverError, StorageError, UsageError
from safeimg.drivers.formats.api import Driver
from safeimg.drivers.formats.chain import local_path
from safeimg.drivers.formats.naming import Blockdev, text_of
from safeimg.drivers.formats.registry import names
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import CACHE_MODES
from safeimg.ops.convert_steps import STEP_BYTES, STEP_SECONDS
from safeimg.ops.create import format_driver
from safeimg.ops.create_options import for_driver, is_on, parse_options
from safeimg.ops.errors import Unanswered

_SEVERAL = "Having a backing file for the target makes no sense when concatenating multiple input images"
NO_WINDOW = "--window is for compression_type=zlib: zstd always sees a whole cluster"


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
    window: int | None = None  # bytes of deflate's windows: QEMU's if None
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


def check(options: Options) -> None:
    """Refuses combinations that make no sense, before anything is opened."""
    if options.compress and options.copy_offload:
        raise UsageError("Cannot enable copy offloading when -c is used")
    if options.sparse is not None and options.copy_offload:
        raise UsageError("Cannot enable copy offloading when -S is used")
    if options.target_is_zero and options.create:
        raise UsageError("--target-is-zero requires use of -n flag")
    if options.create_options and not options.create:
        raise UsageError("-o has no effect when skipping image creation")


def check_chain(options: Options, *, several: bool) -> None:
    """Refuses -B where it makes no sense, once the sources are open."""
    if options.target_is_zero and options.backing is not None:
        raise Unanswered("Cannot use --target-is-zero when the destination image has a backing file")
    if options.backing is not None and several and not options.create:
        raise UsageError(_SEVERAL)


def check_cache(options: Options) -> None:
    if options.cache not in CACHE_MODES:
        raise UsageError(f"Invalid cache option: {options.cache}")


def creation(
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
        if options.window is not None and values.get("compression_type", "zlib") != "zlib":
            raise UsageError(NO_WINDOW)
        if values.get("preallocation", "off") != "off":
            raise UsageError("Compression and preallocation not supported at the same time")
        if is_on(values.get("encryption")) or "encrypt.format" in values:
            raise UsageError("Compression and encryption not supported at the same time")
    return driver, for_driver(driver.create_options, values)


def while_converting(options: Options, error: DriverError) -> UsageError:
    reason = str(error).removeprefix(f"{local_path(options.target_name)}: ")
    if isinstance(error, StorageError):
        verb = "resize file" if error.action == "truncate" else f"create '{options.target_name}'"
        reason = f"Could not {verb}: {error.strerror}"
    return not_made(options, reason)


def not_made(options: Options, reason: str) -> UsageError:
    what = "creating output image" if options.command == "dd" else f"converting {options.format}"
    return UsageError(f"{options.target_name}: error while {what}: {reason}")
