"""create: a new, empty image."""

from __future__ import annotations

import errno
import posixpath
from collections.abc import Callable, Mapping

from safeimg.drivers.errors import DriverError, FormatError, FormatNotSaid, StorageError, UsageError
from safeimg.drivers.formats.api import Driver
from safeimg.drivers.formats.chain import OpenError, backing_filename, close_chain, local_path, open_chain
from safeimg.drivers.formats.naming import notices
from safeimg.drivers.formats.registry import lookup, names
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import FileSystem, look
from safeimg.journal.find import find, follow
from safeimg.ops.create_options import for_driver, formatting, parse_options
from safeimg.ops.errors import SomethingPending
from safeimg.ops.session import DATA_FILE, refuse_pending_on

_NO_SIZE = (1 << 64) - 1  # qemu-img takes it for none
_OWN_BACKING = "Error: Trying to create an image with the same filename as the backing file"


class Request(NamedTuple):
    """What create is asked for; the letters are qemu-img's options."""

    filename: str
    format: str = "raw"  # -f
    size: int | None = None  # bytes; None: the backing image's
    options: tuple[str, ...] = ()  # -o
    backing: str | None = None  # -b
    backing_format: str | None = None  # -F
    unsafe: bool = False  # -u: do not look at the backing image
    cache: str = "writeback"
    secrets: Secrets = NO_SECRETS  # those that options name


def create(
    fs: FileSystem,
    request: Request,
    *,
    say: Callable[[str], None],
    supersede: Callable[[str], None],
    warn: Callable[[str], None] | None = None,
) -> None:
    """Writes the image. `say` gets the line that qemu-img prints before it does.

    `supersede(path)` gives up the operation pending on the file that is replaced, if no other image is
    changed by it. The image is durable when this returns (unless the cache mode is `unsafe`). Raises
    `DriverError` whose message is qemu-img's, the file's name in front, and `SomethingPending`."""
    try:
        _create(fs, request, say, supersede, warn)
    except FormatNotSaid as error:
        raise FormatNotSaid(f"{request.filename}: {error}") from error
    except DriverError as error:
        raise UsageError(f"{request.filename}: {_reason(error, request)}") from error


def format_driver(name: str) -> Driver:
    """The driver; `UsageError` in the words of create and convert if there is none."""
    if name not in names():
        raise UsageError(f"Unknown file format '{name}'")
    return lookup(name)


def _create(
    fs: FileSystem,
    request: Request,
    say: Callable[[str], None],
    supersede: Callable[[str], None],
    warn: Callable[[str], None] | None,
) -> None:
    driver = format_driver(request.format)
    path = local_path(request.filename)
    values = parse_options(driver.create_options, request.options, warn)
    known = {option.name for option in driver.create_options}
    if request.size is not None and "size" in values:
        raise UsageError("The image size must be specified only once")
    if request.backing is not None:
        if "backing_file" not in known:
            raise UsageError(f"Backing file not supported for file format '{driver.name}'")
        values["backing_file"] = request.backing
    if request.backing_format is not None:
        if "backing_fmt" not in known:
            raise UsageError(f"Backing file format not supported for file format '{driver.name}'")
        values["backing_fmt"] = request.backing_format
    if request.size is not None:
        values["size"] = str(request.size)
    if "backing_file" in values:
        backing_size = _look_at_backing(fs, request, path, values["backing_file"], values.get("backing_fmt"), warn)
        if backing_size is not None:
            values.setdefault("size", str(backing_size))
    if "size" not in values or int(values["size"]) == _NO_SIZE:
        raise UsageError("Image creation needs a size parameter")
    say(formatting(request.filename, driver.name, driver.create_options, values))
    size = int(values["size"])
    settle_pending(fs, path, supersede)
    asked = for_driver(driver.create_options, values)
    driver.create(fs, path, size, asked, cache=request.cache, secrets=request.secrets)
    for made in files_of(path, asked):
        make_durable(fs, made, request.cache)


def settle_pending(fs: FileSystem, path: str, supersede: Callable[[str], None]) -> None:
    """A pending operation ends with the file it was about; one that changes others too has to be settled."""
    try:
        refuse_pending_on(fs, path)
    except SomethingPending as pending:
        log = follow(fs, find(fs, path))
        if log is None or fs.resolve(pending.home) != fs.resolve(path):
            raise
        if any(image.writes and image.role != DATA_FILE for image in log.declared.images[1:]):
            raise
        if look(fs, path) is not None:
            fs.open(path, write=True, locking=True).close()  # somebody uses it: nothing is given up for that
        supersede(path)


def _look_at_backing(
    fs: FileSystem,
    request: Request,
    path: str,
    backing: str,
    backing_format: str | None,
    warn: Callable[[str], None] | None,
) -> int | None:
    """The backing image's virtual size; None where it is not to be looked at."""
    if not backing:
        raise UsageError("Expected backing file name, got empty string")
    if backing == request.filename:
        raise UsageError(_OWN_BACKING)
    if request.unsafe:
        if backing_format is None:
            raise UsageError("Backing file specified without backing format")
        return None
    name = backing_filename(request.filename, backing)
    if warn is not None:
        for notice in notices(name):
            warn(notice)
    try:
        layers = open_chain(fs, name, format=backing_format, force_share=True, inspect=True)
    except OpenError as error:
        reason = str(error).removeprefix(f"Could not open '{name}': ")
        raise UsageError(f"{reason}\nCould not open backing image.") from error
    try:
        target = look(fs, path)
        for layer in layers:
            status = layer.file.stat()
            if target is not None and (status.device, status.inode) == (target.device, target.inode):
                raise UsageError(_OWN_BACKING)
        if backing_format is None:
            raise FormatNotSaid(
                f"Backing file specified without backing format\nDetected format of {layers[0].format}."
            )
        return layers[0].size
    finally:
        close_chain(layers)


def files_of(path: str, options: Mapping[str, str]) -> list[str]:
    """The files that creating an image at `path` makes: the image, and its external data file."""
    return [path, *(local_path(options[name]) for name in ("data_file",) if name in options)]


def make_durable(fs: FileSystem, path: str, cache: str) -> None:
    if cache == "unsafe":
        return
    file = fs.open(path)
    try:
        file.sync_all()
    finally:
        file.close()
    fs.sync_directory(posixpath.dirname(fs.resolve(path)))


def _reason(error: DriverError, request: Request) -> str:
    if isinstance(error, StorageError):
        if error.errno == errno.EFBIG:
            hint = " (try using a larger cluster size)" if request.format == "qcow2" else ""
            return f"The image size is too large for file format '{request.format}'{hint}"
        if error.action in ("open", "create"):
            return f"Could not {error.action} '{error.path}': {error.strerror}"
        if error.action == "truncate":
            return f"Could not resize file: {error.strerror}"
        return f"Could not {error.action}: {error.strerror}"
    if isinstance(error, FormatError):
        return error.problem
    return str(error).removeprefix(f"{request.filename.removeprefix('file:')}: ")
