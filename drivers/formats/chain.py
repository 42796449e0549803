"""Opening an image with all its backing images, by QEMU's rules for names and formats."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from safeimg.drivers.errors import (
    DriverError,
    FormatError,
    LockError,
    NotClosed,
    SecretMissing,
    StorageError,
    UnsupportedError,
    UsageError,
)
from safeimg.drivers.formats.api import Driver, Image, Opening, RuntimeOption
from safeimg.drivers.formats.naming import (
    FILE_DRIVERS,
    PROTOCOLS,
    Blockdev,
    Options,
    Value,
    below,
    from_argument,
    from_filename,
    plain,
    protocol,
    text_of,
)
from safeimg.drivers.formats.protocols import (
    Access,
    OwnOption,
    ReadOnly,
    open_file,
    refuse_unknown,
    take_access,
)
from safeimg.drivers.formats.registry import lookup, names, probe
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage import locks
from safeimg.drivers.storage.api import File, FileStat, FileSystem


class OpenError(DriverError):
    """An image could not be opened; the message is QEMU's. `__cause__` holds the error behind it, if any."""


class InfiniteLoop(OpenError):
    """A backing chain comes back to an image that is already part of it."""


def open_chain(
    fs: FileSystem,
    filename: str | Blockdev,
    *,
    format: str | None = None,
    write: bool | Callable[[int, str], bool] = False,
    cache: str = "writeback",
    backing: bool = True,
    force_share: bool = False,
    repair: bool | Callable[[int], bool] = False,
    warn: Callable[[str], None] | None = None,
    secrets: Secrets = NO_SECRETS,
    inspect: bool = False,
    aio: str | None = None,
    steady: bool = False,
) -> list[Image]:
    """The image and its backing images, top first.

    `filename`: a file name as on the command line, or the description of a block device. `format` is the top
    image's; it is probed if neither that nor the description names one. `write` is True to write to the top image,
    or a function of depth and filename. `backing` False opens the top alone. `repair` opens corrupt, fenced and
    dirty images for writing: all, or those at some depths. `warn` gets QEMU's warning when an image to write to was
    guessed to be raw. `secrets`: of encrypted images; without theirs, guest data cannot be read or written, which is
    refused here already unless `repair` is set. `inspect`: only metadata is looked at, which needs neither secrets nor
    external data files. `aio`: how files are to be accessed, checked as QEMU does; all are done by threads here.
    `steady`: nobody may write to any of the images meanwhile, as where one is opened for writing; else those of formats
    that hold guest data alone are read next to whoever writes to them, as by QEMU.

    Raises `OpenError` with QEMU's message; everything opened so far is closed then.
    """
    writes = write if callable(write) else lambda depth, _name: depth == 0 and bool(write)
    repairs = repair if callable(repair) else lambda depth: bool(repair)
    opener = _Opener(fs, cache, force_share, warn, secrets, inspect, aio, set())
    text = text_of(filename)
    images: list[Image] = []
    try:
        layer: _Layer | None = None
        while True:
            depth = len(images)
            try:
                if layer is None:
                    named = _named(filename, format)
                    plain_name = "" if named is filename or named.text.startswith("json:") else named.text
                    layer = _Layer(named.text, Options(_below_format(named.options)), format, plain_name)
                image = opener.open(layer, writes(depth, layer.name), repairs(depth))
                images.append(image)
                found = _next_layer(layer, image, backing)
                refuse_unknown(layer.options, image.format)
                if found is None:
                    break
                layer = found
            except OpenError:
                raise
            except DriverError as error:
                context = f"Could not open '{text}': " + depth * "Could not open backing file: "
                raise OpenError(context + _reason(error)) from error
        if steady or any(image.file.writable for image in images):
            _keep_writers_out(images, text)
        return images
    except BaseException:
        close_chain(images)
        raise


def _keep_writers_out(images: Sequence[Image], text: str) -> None:
    try:
        for image in images:
            if not image.file.writable:
                locks.lock(image.file, locks.READER)
    except DriverError as error:
        raise OpenError(f"Could not open '{text}': {_reason(error)}") from error


def look_at(
    fs: FileSystem,
    filename: str | Blockdev,
    *,
    format: str | None = None,
    cache: str = "writeback",
    backing: bool = True,
    repair: bool | Callable[[int], bool] = False,
    warn: Callable[[str], None] | None = None,
    secrets: Secrets = NO_SECRETS,
) -> list[Image]:
    """Opens an image that is to be written, to read and next to whoever has it open. What cannot be opened is refused
    in the words of opening it for writing."""
    try:
        return open_chain(
            fs, filename, format=format, backing=backing, force_share=True, repair=repair, secrets=secrets
        )
    except OpenError:
        try:
            try_open(
                fs, filename, format=format, cache=cache, backing=backing, repair=repair, warn=warn, secrets=secrets
            )
        except OpenError as error:
            if not isinstance(error.__cause__, NotClosed):  # QEMU repairs that, and goes on
                raise
        raise


def only_top(depth: int) -> bool:
    """Which layers may be broken: the image that is checked, or was just made."""
    return depth == 0


def try_open(
    fs: FileSystem,
    filename: str | Blockdev,
    *,
    format: str | None = None,
    cache: str = "writeback",
    backing: bool = True,
    force_share: bool = False,
    repair: bool | Callable[[int], bool] = False,
    warn: Callable[[str], None] | None = None,
    secrets: Secrets = NO_SECRETS,
) -> None:
    """Opens an image for writing, and nothing else. Raises `OpenError`, always with `force_share`: that is for
    reading, which shows where QEMU finds out."""
    close_chain(
        open_chain(
            fs, filename, format=format, write=True, cache=cache, backing=backing, force_share=force_share,
            repair=repair, warn=warn, secrets=secrets,
        )
    )


def refuse_locked(image: Image, filename: str | Blockdev, secrets: Secrets) -> None:
    """Raises `OpenError` if `image`, opened with `repair`, is encrypted and its secret was not given."""
    missing = _missing_secret(image)
    if missing is None:
        return
    named = from_argument(filename, image.format) if isinstance(filename, str) else filename
    reason: DriverError = SecretMissing(missing)
    try:
        if (secret := named.options.get(missing)) is not None:
            secrets.lookup(str(secret))
    except UsageError as error:
        reason = error
    raise OpenError(f"Could not open '{text_of(filename)}': {reason}")


def _missing_secret(image: Image) -> str | None:
    """The option that would name it, if the image cannot be read without."""
    return None if image.cipher is None else image.cipher.missing


def close_chain(images: list[Image]) -> None:
    for image in images:
        image.close()


def backing_filename(overlay: str, backing: str) -> str:
    """What an overlay's backing file name means: relative names start at the overlay's directory. `UsageError` if it
    has none: copies of it lie in several."""
    if backing.startswith("/") or protocol(backing) is not None:
        return backing
    if not overlay:
        raise UsageError("Cannot generate a base directory for quorum nodes")
    base = overlay[len("file:"):] if protocol(overlay) == "file" else overlay
    return posixpath.join(posixpath.dirname(plain(base)), backing)


def local_path(filename: str) -> str:
    """The path of a local file that is to be made; `UnsupportedError` for other protocols."""
    prefix = protocol(filename)
    if prefix is None:
        return filename
    if prefix == "file":
        return filename[len("file:"):]
    if prefix in PROTOCOLS:
        raise UnsupportedError(f"Making images with protocol '{prefix}' is not supported yet")
    raise UsageError(f"Unknown protocol '{prefix}'")


class _Layer(NamedTuple):
    """An image to be opened."""

    name: str  # what messages and callers call it
    options: Options
    format: str | None  # overrides the options'
    plain: str = ""  # its file name, if that is how it was named


def _named(filename: str | Blockdev, format: str | None) -> Blockdev:
    """What a file name means; that there is no such format comes first."""
    if not isinstance(filename, str):
        return filename
    if format is not None and not filename.startswith("json:"):
        _driver(format)
    return from_argument(filename, format)


def _driver(name: str) -> Driver:
    """Of the format that images of a format, a file or a protocol are opened as. `UsageError` if it is unknown."""
    return lookup("raw" if name in (*FILE_DRIVERS, *PROTOCOLS) else name)


def _below_format(options: Mapping[str, Value]) -> Mapping[str, Value]:
    """Options that put blkdebug on top of an image of some format, with blkdebug below the format instead: what it
    watches is the same, and what is asked of the image reaches its format."""
    if options.get("driver") != "blkdebug" or options.get("image.driver") not in names():
        return options
    own = {f"file.{key}": value for key, value in options.items() if not key.startswith("image.")}
    image = below(options, "image")
    file = {f"file.image.{key}": value for key, value in below(image, "file").items()}
    return {key: value for key, value in image.items() if not key.startswith("file.")} | own | file


def _next_layer(layer: _Layer, image: Image, wanted: bool) -> _Layer | None:
    """The backing image, which the layer's options may replace in whole or in part; None if there is none, or it is
    not `wanted`."""
    options = layer.options
    if options.has("backing") and options.peek("backing") in (None, ""):
        options.take("backing")
        return None
    if not wanted:
        return None
    node, replaced = options.text("backing"), options.child("backing")
    if node is not None:
        raise UsageError(f"Could not open backing file: Cannot find device='{node}' nor node-name='{node}'")
    if image.backing_file is None and not replaced:
        return None
    format = image.backing_format if "driver" not in replaced else None  # of more weight than what the name says
    name = ""
    elsewhere = replaced.get("file.driver", "file") not in (*FILE_DRIVERS, "null-co", "null-aio")
    if not ("file" in replaced or "file.filename" in replaced or elsewhere) and image.backing_file is not None:
        name = backing_filename(image.file.path, image.backing_file)
        try:
            replaced = {**from_filename(name).options, **replaced}
        except UsageError as error:
            raise UsageError(f"Could not open backing file: {error}") from error
    return _Layer(name or str(replaced.get("file.filename", "")), Options(replaced), format)


def _file_options(options: Options, driver: str | None) -> dict[str, Value]:
    """The options of the file that holds an image: its `file.…`, or all of them where the image is a file itself."""
    if driver in FILE_DRIVERS or driver in PROTOCOLS:
        return {"driver": driver, **options.rest()}
    node, child = options.text("file"), options.child("file")
    if node is not None and (child or options.has("filename")):
        raise UsageError("Cannot reference an existing block device with additional options or a new filename")
    if node is not None:
        raise UsageError(f"Cannot find device='{node}' nor node-name='{node}'")
    if not child and driver is None:
        raise UsageError("Must specify either driver or file")
    return child


def _given(
    options: Options, known: Sequence[RuntimeOption], secrets: Secrets,
    open_beside: Callable[[Mapping[str, Any]], File] | None,
) -> Opening:  # fmt: skip
    """Takes those that the driver knows."""
    read: dict[str, Callable[[str], str | int | bool | None]] = {
        "bool": options.boolean, "size": options.size, "num": options.number, "str": options.text,
    }  # fmt: skip
    found = {option.name: read[option.kind](option.name) for option in known if option.kind != "file"}
    files = {}
    for name in (option.name for option in known if option.kind == "file"):
        if (node := options.text(name)) is not None:
            raise UsageError(f"Cannot find device='{node}' nor node-name='{node}'")
        if child := options.child(name):
            files[name] = child
    given = {name: value for name, value in found.items() if value is not None}
    return Opening(given, secrets, files, open_beside)


class _Opener(NamedTuple):
    """Opens layer after layer of a chain."""

    fs: FileSystem
    cache: str
    force_share: bool
    warn: Callable[[str], None] | None
    secrets: Secrets
    inspect: bool
    aio: str | None
    seen: set[tuple[int, int]]

    def open(self, layer: _Layer, write: bool, repair: bool) -> Image:
        options, untaken = layer.options, layer.options.copy()
        access, wrong = Access(write, self.cache, self.force_share, self.aio), None
        try:
            access = take_access(options, access)
        except OwnOption as error:
            access, wrong = error.access, error
        own = options.text("driver")
        name = own if layer.format is None else layer.format
        driver = None if name is None else _driver(name)
        file_options = _file_options(options, name)
        if wrong is not None and (name in FILE_DRIVERS or name in PROTOCOLS):
            raise wrong
        if not file_options:
            if wrong is not None and not isinstance(wrong, ReadOnly):
                raise wrong
            raise UsageError('A block device must be specified for "file"')
        try:
            file = open_file(self.fs, file_options, access, seen=lambda found: self._note(layer.name, found))
        except LockError:
            if write and driver is not None and driver.shared:  # QEMU locks such a file when the image is open
                looking = self._replace(force_share=True, seen=set())
                looking.open(layer._replace(options=untaken), False, repair).close()
            raise
        try:
            if wrong is not None and not isinstance(wrong, ReadOnly):
                raise wrong
            if driver is None:
                driver = _probed(file)
                if access.write and self.warn is not None and driver.name == "raw":
                    self.warn(
                        f"Image format was not specified for '{layer.plain or file.path}' and probing guessed raw.\n"
                        "         Automatically detecting the format is dangerous for raw images, "
                        "write operations on block 0 will be restricted.\n"
                        "         Specify the 'raw' format explicitly to remove the restrictions."
                    )
            if not (access.write or driver.shared):
                locks.lock(file, locks.READER)
            beside = None if self.inspect else partial(self._open_beside, access)
            try:
                given = _given(options, driver.runtime_options, self.secrets, beside)
            except UsageError:
                with suppress(NotClosed):  # what is wrong with the image itself comes first, but for what is repaired
                    driver.open(file, write=access.write, repair=repair).close()
                raise
            image = driver.open(file, write=access.write, repair=repair, given=given)
        except BaseException:
            file.close()
            raise
        missing = _missing_secret(image)
        if missing is not None and not (self.inspect or repair):
            image.close()
            raise SecretMissing(missing)
        if wrong is not None:
            image.close()
            raise wrong
        return image

    def _open_beside(self, access: Access, values: Mapping[str, Any]) -> File:
        file = open_file(self.fs, values, access)
        if not access.force_share:
            locks.lock(file, locks.DATA_WRITER if access.write else locks.DATA_READER)
        return file

    def _note(self, name: str, found: FileStat) -> None:
        if (found.device, found.inode) in self.seen:
            raise InfiniteLoop(f"Backing file '{name}' creates an infinite loop.")
        self.seen.add((found.device, found.inode))


def _probed(file: File) -> Driver:
    try:
        return probe(file)
    except StorageError as error:
        raise UsageError(f"Could not read image for determining its format: {error.strerror}") from error


def _reason(error: DriverError) -> str:
    if isinstance(error, StorageError) and error.action == "open":
        return f"Could not open '{error.path}': {error.strerror}"
    if isinstance(error, FormatError):
        return error.problem
    return str(error)
