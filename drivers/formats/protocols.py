"""What lies at the lower end of an image's description: the file that holds it.

A new protocol is a function here that makes a `File` of its options."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Mapping
from importlib.util import find_spec

from safeimg.drivers.errors import UnsupportedError, UsageError
from safeimg.drivers.formats.naming import (
    FILE_DRIVERS,
    PROTOCOLS,
    STRONG,
    Options,
    Value,
    below,
    from_filename,
    shown,
)
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import File, FileStat, FileSystem, look

_OPENED = ("blkdebug", *FILE_DRIVERS, "nbd", "null-aio", "null-co", "quorum")
_FORMATS = frozenset((
    "bochs", "luks", "parallels", "qcow", "qcow2", "qed", "vdi", "vhdx", "vmdk", "vpc",
))  # fmt: skip
_DISCARD = ("ignore", "off", "unmap", "on")
_DETECT_ZEROES = ("off", "on", "unmap")


def opened() -> tuple[str, ...]:
    """What images may lie in here, by the name of QEMU's driver."""
    return (*_OPENED, "ssh") if find_spec("paramiko") is not None else _OPENED


class Access(NamedTuple):
    """How a file is opened; what is below an image inherits it from there."""

    write: bool = False
    cache: str = "writeback"  # see `storage.api.CACHE_MODES`
    force_share: bool = False
    aio: str | None = None  # how the file is read and written


class OwnOption(UsageError):
    """What an image's options do not allow; what is wrong with the file below it QEMU finds first. `access`: how that
    is opened."""

    def __init__(self, message: str, access: Access) -> None:
        super().__init__(message)
        self.access = access


class ReadOnly(OwnOption):
    """An image that is to be written may only be read; what is wrong with the image itself QEMU finds first."""


def take_access(options: Options, given: Access) -> Access:
    """Takes the options that every block device has. `UsageError` for values that are none, `OwnOption` if those that
    what lies below it inherits are sound."""
    name = options.text("node-name")
    read_only = options.boolean("read-only")
    options.boolean("auto-read-only")
    share = options.boolean("force-share") or given.force_share
    direct, no_flush = options.boolean("cache.direct"), options.boolean("cache.no-flush")
    discard, zeroes = options.text("discard"), options.text("detect-zeroes")
    access = Access(given.write and not read_only, _cache(given.cache, direct, no_flush), share, given.aio)
    wrong = None
    if access.write and share:
        wrong = "force-share=on can only be used with read-only images"
    elif discard not in (None, *_DISCARD):
        wrong = "Invalid discard option"
    elif zeroes not in (None, *_DETECT_ZEROES):
        wrong = f"invalid parameter value: {zeroes}"
    elif zeroes == "unmap" and discard not in ("unmap", "on"):
        wrong = "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
    elif name is not None and not re.fullmatch(r"[A-Za-z][A-Za-z0-9\-._]{0,30}", name):
        wrong = f"Invalid node-name: '{name}'"
    if wrong is not None:
        raise OwnOption(wrong, access)
    if given.write and read_only:
        raise ReadOnly("Block node is read-only", access)
    return access


def _cache(mode: str, direct: bool | None, no_flush: bool | None) -> str:
    """The cache mode with its parts changed as far as given."""
    parts = {"none": (True, False), "directsync": (True, False), "unsafe": (False, True)}.get(mode, (False, False))
    wanted = (parts[0] if direct is None else direct, parts[1] if no_flush is None else no_flush)
    if wanted == parts:
        return mode
    through = mode in ("writethrough", "directsync")
    if wanted[0]:
        return "directsync" if through else "none"
    return "unsafe" if wanted[1] else "writethrough" if through else "writeback"


def open_file(
    fs: FileSystem,
    values: Mapping[str, Value],
    access: Access,
    *,
    seen: Callable[[FileStat], object] = lambda found: None,
) -> File:
    """Opens the file that `values` describe. `seen` is told of a local file that exists, and may refuse it.

    Raises `DriverError` in QEMU's words; other protocols and images inside images are `UnsupportedError`."""
    options = Options(values)
    driver = options.text("driver") or "file"
    if driver in FILE_DRIVERS:
        return _local(fs, driver, options, access, seen)
    if driver == "raw":
        return _window(fs, options, access, seen)
    if driver in ("null-co", "null-aio"):
        return _null(driver, options, access)
    if driver == "nbd":
        return _nbd(options, access, shown(values, driver, STRONG[driver]))
    if driver == "ssh":
        return _ssh(options, access, shown(values, driver, STRONG[driver]))
    if driver == "blkdebug":
        return _blkdebug(fs, options, access, seen)
    if driver == "quorum":
        return _quorum(fs, options, access, seen)
    if driver in _FORMATS:
        raise UnsupportedError(f"An image inside a {driver} image is not supported yet")
    if driver in PROTOCOLS:
        raise UnsupportedError(f"Protocol '{driver}' is not supported yet")
    raise UsageError(f"Unknown driver '{driver}'")


def _local(
    fs: FileSystem, driver: str, options: Options, access: Access, seen: Callable[[FileStat], object]
) -> File:
    access = take_access(options, access)
    path = options.text("filename")
    aio = options.choice("aio", ("threads", "native", "io_uring")) or access.aio
    locking = options.choice("locking", ("auto", "on", "off"))
    options.boolean("drop-cache")
    options.boolean("x-check-cache-dropped")
    options.number("aio-max-batch")
    if (manager := options.text("pr-manager")) is not None:
        raise UsageError(f"No persistent reservation manager with id '{manager}'")
    if not path:
        raise UsageError(f"The '{driver}' block driver requires a file name")
    refuse_unknown(options, driver, protocol=True)
    found = look(fs, path)
    if found is not None:
        if access.write and stat.S_ISDIR(found.mode):
            raise UsageError(f"Could not open '{path}': {os.strerror(errno.EISDIR)}")
        if aio == "native" and access.cache not in ("none", "directsync"):
            raise UsageError("aio=native was specified, but it requires cache.direct=on, which was not specified.")
        if driver != "file" and not (found.is_device or stat.S_ISCHR(found.mode)):
            raise UsageError(f"'{driver}' driver requires '{path}' to be either a character or block device")
        if not found.is_device and not stat.S_ISREG(found.mode):
            raise UsageError(f"'{driver}' driver requires '{path}' to be a regular file")
        seen(found)
    return fs.open(
        path, write=access.write, cache=access.cache, locking=locking != "off", force_share=access.force_share
    )


def _window(fs: FileSystem, options: Options, access: Access, seen: Callable[[FileStat], object]) -> File:
    """A part of another file, as raw's options name it."""
    from safeimg.drivers.storage.window import Window

    access = take_access(options, access)
    if access.write:
        raise UnsupportedError("Writing to an image that is a part of another file is not supported yet")
    offset, size = options.size("offset") or 0, options.size("size")
    below = options.child("file")
    if not below:
        raise UsageError('A block device must be specified for "file"')
    refuse_unknown(options, "raw")
    file = open_file(fs, below, access, seen=seen)
    try:
        return Window(file, offset, check_window(file.length(), offset, size))
    except BaseException:
        file.close()
        raise


def _null(driver: str, options: Options, access: Access) -> File:
    from safeimg.drivers.storage.null import DEFAULT_SIZE, NullFile

    access = take_access(options, access)
    name = options.text("filename")
    if name not in (None, "", f"{driver}://"):
        raise UsageError(f"The only allowed filename for this driver is '{driver}://'")
    size = options.size("size")
    reads_zeroes = options.boolean("read-zeroes") or False
    options.number("latency-ns")
    refuse_unknown(options, driver, protocol=True)
    return NullFile(
        f"{driver}://", DEFAULT_SIZE if size is None else size, reads_zeroes=reads_zeroes, write=access.write
    )


def _nbd(options: Options, access: Access, name: str) -> File:
    from safeimg.drivers.formats.nbd_names import take_named
    from safeimg.drivers.storage.nbd.file import open_export

    access = take_access(options, access)
    named = take_named(options)
    file = open_export(
        name, named.address, named.export, write=access.write, cache=access.cache, bitmap=named.bitmap,
        patience=named.patience,
    )  # fmt: skip
    try:
        refuse_unknown(options, "nbd", protocol=True)
    except UsageError:
        file.close()
        raise
    return file


def _ssh(options: Options, access: Access, name: str) -> File:
    from safeimg.drivers.formats.ssh_names import take_named
    from safeimg.drivers.storage.ssh import open_remote

    access = take_access(options, access)
    named = take_named(options)
    file = open_remote(name, named.address, named.user, named.path, named.check)
    if access.write:
        file.close()
        raise UnsupportedError("Writing over ssh is not supported yet")
    return file


def _blkdebug(fs: FileSystem, options: Options, access: Access, seen: Callable[[FileStat], object]) -> File:
    from safeimg.drivers.storage.blkdebug import Blkdebug, read_rules, rules_of

    access = take_access(options, access)
    config, image = options.text("config"), options.child("image")
    node = options.text("image")
    if (name := options.text("filename")) is not None:
        _, _, name = name.partition(":")
        config, colon, name = name.partition(":")
        if not colon:
            raise UsageError("blkdebug requires both config file and image path")
        image = below(from_filename(name).options, "file")
    rules = read_rules(config) if config else []
    rules += rules_of("inject-error", options.child("inject-error"))
    rules += rules_of("set-state", options.child("set-state"))
    for limit in ("align", "max-transfer", "opt-write-zero", "max-write-zero", "opt-discard", "max-discard"):
        options.size(limit)  # safeimg's requests are as large as before
    if node is not None:
        raise UsageError(f"Cannot find device='{node}' nor node-name='{node}'")
    if not image:
        raise UsageError('A block device must be specified for "image"')
    file = open_file(fs, image, access, seen=seen)
    try:
        refuse_unknown(options, "blkdebug", protocol=True)
    except UsageError:
        file.close()
        raise
    return Blkdebug(file, rules)


def _quorum(fs: FileSystem, options: Options, access: Access, seen: Callable[[FileStat], object]) -> File:
    from safeimg.drivers.storage.quorum import Quorum

    access = take_access(options, access)
    children = options.child("children")
    threshold = options.number("vote-threshold") or 0
    options.boolean("blkverify")
    options.boolean("rewrite-corrupted")
    pattern = options.text("read-pattern")
    numbers = sorted({key.partition(".")[0] for key in children}, key=lambda number: (len(number), number))
    if not numbers:
        raise UsageError("Number of provided children must be 1 or more")
    if threshold < 1:
        raise UsageError("Parameter 'vote-threshold' expects a value >= 1")
    if threshold > len(numbers):
        raise UsageError("threshold may not exceed children count")
    if pattern not in (None, "quorum", "fifo"):
        raise UsageError("Please set read-pattern as fifo or quorum")
    refuse_unknown(options, "quorum")
    if access.write:
        raise UnsupportedError("Writing to a quorum is not supported yet")
    files: list[File] = []
    found: dict[tuple[int, int], FileStat] = {}  # copies may be one and the same file
    try:
        for number in numbers:
            files.append(open_file(
                fs, below(children, number), access, seen=lambda of: found.setdefault((of.device, of.inode), of),
            ))  # fmt: skip
        for each in found.values():
            seen(each)
        return Quorum(files, threshold, first_only=pattern == "fifo")
    except BaseException:
        for file in files:
            file.close()
        raise


def check_window(length: int, offset: int, size: int | None) -> int | None:
    """The size of a part of a file of `length` bytes, None if it goes on to the end. `UsageError` in QEMU's words."""
    if offset > length:
        raise UsageError(
            f"Offset ({offset}) cannot be greater than size of the containing file ({length})"
        )
    if size is None:
        return None
    if offset + size > length:
        raise UsageError(
            f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the "
            f"containing file ({length})"
        )
    if size % 512:
        raise UsageError("Specified size is not multiple of 512")
    return size


def refuse_unknown(options: Options, driver: str, *, protocol: bool = False) -> None:
    """`UsageError` if there is an option that nobody took."""
    if options.left is not None:
        what = f"protocol '{driver}' doesn't" if protocol else f"format '{driver}' does not"
        raise UsageError(f"Block {what} support the option '{options.left}'")
