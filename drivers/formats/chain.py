"""Opening an image with all its backing images, by QEMU's rules for names and formats."""

from __future__ import annotations

import posixpath
import stat
from collections.abc import Callable

from safeimg.drivers.errors import DriverError, FormatError, StorageError, UnsupportedError, UsageError
from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.registry import lookup, probe
from safeimg.drivers.storage.api import FileSystem

# Protocols that QEMU knows and safeimg does not handle yet.
_PROTOCOLS = frozenset((
    "blkdebug", "blkverify", "fat", "ftp", "ftps", "gluster", "gluster+rdma", "gluster+tcp", "gluster+unix",
    "host_cdrom", "host_device", "http", "https", "iscsi", "iser", "nbd", "nbd+tcp", "nbd+unix", "nbd+vsock",
    "nfs", "nvme", "rbd", "ssh", "vvfat",
))


class OpenError(DriverError):
    """An image could not be opened; the message is QEMU's. `__cause__` holds the error behind it, if any."""


class InfiniteLoop(OpenError):
    """A backing chain comes back to an image that is already part of it."""


def open_chain(
    fs: FileSystem,
    filename: str,
    *,
    format: str | None = None,
    write: bool | Callable[[int, str], bool] = False,
    cache: str = "writeback",
    backing: bool = True,
    force_share: bool = False,
    repair: bool = False,
    warn: Callable[[str], None] | None = None,
) -> list[Image]:
    """The image and its backing images, top first.

    `format` is the top image's; it is probed if None. `write` is True to write to the top image, or a
    function of depth and filename. `backing` False opens the top alone. `repair` opens corrupt, fenced and
    dirty images for writing. `warn` gets QEMU's warning when an image to write to was guessed to be raw.

    Raises `OpenError` with QEMU's message; everything opened so far is closed then.
    """
    writes = write if callable(write) else lambda depth, _name: depth == 0 and bool(write)
    images: list[Image] = []
    seen: set[tuple[int, int]] = set()
    name, name_format = filename, format
    try:
        while True:
            depth = len(images)
            context = f"Could not open '{filename}': " + depth * "Could not open backing file: "
            try:
                image = _open_layer(
                    fs, name, name_format, writes(depth, name), cache, force_share, repair, warn, seen
                )
            except OpenError:
                raise
            except DriverError as error:
                raise OpenError(context + _reason(error)) from error
            images.append(image)
            if not backing or image.backing_file is None:
                return images
            name, name_format = backing_filename(name, image.backing_file), image.backing_format
    except BaseException:
        close_chain(images)
        raise


def close_chain(images: list[Image]) -> None:
    for image in images:
        image.close()


def backing_filename(overlay: str, backing: str) -> str:
    """What an overlay's backing file name means: relative names start at the overlay's directory."""
    if backing.startswith("/") or protocol(backing) is not None:
        return backing
    base = overlay[len("file:"):] if protocol(overlay) == "file" else overlay
    return posixpath.join(posixpath.dirname(base), backing)


def protocol(filename: str) -> str | None:
    """The protocol a name begins with: what stands before a colon that comes before any slash."""
    colon = filename.find(":")
    if colon < 0 or "/" in filename[:colon]:
        return None
    return filename[:colon]


def local_path(filename: str) -> str:
    """The path of a local file's name; `UnsupportedError` for other protocols and for `json:`."""
    prefix = protocol(filename)
    if prefix is None:
        return filename
    if prefix == "file":
        return filename[len("file:"):]
    if prefix == "json":
        raise UnsupportedError("json: file names are not supported yet")
    if prefix in _PROTOCOLS:
        raise UnsupportedError(f"Protocol '{prefix}' is not supported yet")
    raise UsageError(f"Unknown protocol '{prefix}'")


def _open_layer(
    fs: FileSystem,
    name: str,
    name_format: str | None,
    write: bool,
    cache: str,
    force_share: bool,
    repair: bool,
    warn: Callable[[str], None] | None,
    seen: set[tuple[int, int]],
) -> Image:
    path = local_path(name)
    driver = None if name_format is None else lookup(name_format)
    found = fs.stat(path)
    if found is not None:
        if not found.is_device and not stat.S_ISREG(found.mode):
            raise UsageError(f"'file' driver requires '{path}' to be a regular file")
        if (found.device, found.inode) in seen:
            raise InfiniteLoop(f"Backing file '{name}' creates an infinite loop.")
        seen.add((found.device, found.inode))
    file = fs.open(path, write=write, cache=cache, locking=True, force_share=force_share)
    try:
        if driver is None:
            driver = probe(file)
            if write and warn is not None and driver.name == "raw":
                warn(
                    f"Image format was not specified for '{name}' and probing guessed raw.\n"
                    "         Automatically detecting the format is dangerous for raw images, "
                    "write operations on block 0 will be restricted.\n"
                    "         Specify the 'raw' format explicitly to remove the restrictions."
                )
        return driver.open(file, write=write, repair=repair)
    except BaseException:
        file.close()
        raise


def _reason(error: DriverError) -> str:
    if isinstance(error, StorageError) and error.action == "open":
        return f"Could not open '{error.path}': {error.strerror}"
    if isinstance(error, FormatError):
        return error.problem
    return str(error)
