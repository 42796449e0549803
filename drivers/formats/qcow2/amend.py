"""What `amend -o` can change of a qcow2 image that exists, but for its size. Implements `formats.features.Amending`.

Each option is an amendment of its own; QEMU's order is kept: up to version 3 first, down to version 2 last.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

from safeimg.drivers.errors import SnapshotDamaged, UsageError
from safeimg.drivers.formats.api import Changes, CreateOption, Image, Kind, Planner
from safeimg.drivers.formats.encryption import luks_amend_options
from safeimg.drivers.formats.features import Amendment
from safeimg.drivers.formats.options import bool_option, number_option, size_option
from safeimg.drivers.formats.qcow2.amend_keys import Keys, check_encrypted, check_keys
from safeimg.drivers.formats.qcow2.driver import CREATE_OPTIONS, own_image, own_planner
from safeimg.drivers.formats.qcow2.empty import change_refcount_width
from safeimg.drivers.formats.qcow2.encryption import PREFIX
from safeimg.drivers.formats.qcow2.extensions import EXT_BITMAPS, EXT_DATA_FILE, Extension
from safeimg.drivers.formats.qcow2.header import (
    COMPRESSION_TYPE,
    CORRUPT,
    DIRTY,
    EXTERNAL_DATA_FILE,
    HEADER_LENGTH,
    LAZY_REFCOUNTS,
    RAW_EXTERNAL_DATA,
    ZLIB,
    ZSTD,
    Header,
)
from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.rewrite import current_header, rewrite_header
from safeimg.drivers.formats.qcow2.zeroes import expand_zero_clusters

_NAMES = (
    "backing_file", "backing_fmt", "compat", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits", "size",
)
_CREATED = [option for option in CREATE_OPTIONS if option.name in _NAMES]
_VERSIONS = {"1.1": 3, "v3": 3, "0.10": 2, "v2": 2}
_NEWER = "(use compat=1.1 or greater)"


class Qcow2Amending:
    """See `formats.features.Amending`."""

    options: Sequence[CreateOption] = tuple(
        sorted(
            (option._replace(default=None) for option in (*_CREATED, *luks_amend_options(PREFIX))),
            key=lambda option: option.name,
        )
    )

    def check(self, image: Image, values: Mapping[str, str], *, force: bool) -> None:
        own = own_image(image)
        header, path = own.header, own.file.path
        slots = any(name.startswith(PREFIX) for name in values)
        if slots:
            check_encrypted(own)
        version = _version(values, header.version)
        if "data_file" in values and not header.has_data_file:
            raise UsageError("data-file can only be set for images that use an external data file")
        if bool_option(path, values, "data_file_raw") and not header.data_file_is_raw:
            raise UsageError("data-file-raw cannot be set on existing images")
        bits = number_option(path, values, "refcount_bits", header.refcount_bits)
        if not 1 <= bits <= 64 or bits & (bits - 1):
            raise UsageError("Refcount width must be a power of two and may not exceed 64 bits")
        if slots:
            check_keys(own, values, force=force)
        if bits not in (header.refcount_bits, 16) and version < 3:
            raise UsageError(
                f"Refcount widths other than 16 bits require compatibility level 1.1 or above {_NEWER}"
            )
        _check_backing(header, values)
        lazy = bool_option(path, values, "lazy_refcounts", header.lazy_refcounts)
        if lazy and not header.lazy_refcounts and version < 3:
            raise UsageError(f"Lazy refcounts only supported with compatibility level 1.1 and above {_NEWER}")
        size = size_option(path, values, "size", 0) or own.size
        if size % 512:
            raise UsageError("The new size must be a multiple of 512")
        if version < header.version:
            _check_downgrade(own, bits, size)

    def erased(self, image: Image, values: Mapping[str, str]) -> Sequence[tuple[int, int]]:
        header = own_image(image).header
        if header.encryption is None or not any(name.startswith(PREFIX) for name in values):
            return ()
        clusters = -(-header.encryption.length // header.cluster_size)
        return [(header.encryption.offset, clusters * header.cluster_size)]

    def amendments(self, values: Mapping[str, str]) -> Sequence[Amendment]:
        found: list[Amendment] = []
        version = _version(values, 0)
        if version == 3:
            found.append(_upgrade)
        if "refcount_bits" in values:
            found.append(_RefcountBits(number_option("", values, "refcount_bits", 16)))
        if "data_file" in values:
            found.append(_DataFile(values["data_file"]))
        if "data_file_raw" in values and not bool_option("", values, "data_file_raw"):
            found.append(_not_raw)
        if "lazy_refcounts" in values:
            found.append(_LazyRefcounts(bool_option("", values, "lazy_refcounts")))
        if any(name.startswith(PREFIX) for name in values):
            found.append(Keys(values))
        if version == 2:
            found += [_expand, _downgrade]
        return found


def _version(values: Mapping[str, str], current: int) -> int:
    compat = values.get("compat")
    if compat is None:
        return current
    if compat not in _VERSIONS:
        raise UsageError(f"Unknown compatibility level {compat}")
    return _VERSIONS[compat]


def _check_backing(header: Header, values: Mapping[str, str]) -> None:
    """The backing image's name and format may be given, but only as they are."""
    if "backing_file" not in values and "backing_fmt" not in values:
        return
    if (values.get("backing_file"), values.get("backing_fmt")) != (header.backing_file, header.backing_format):
        raise UsageError("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.")


def _check_downgrade(image: Qcow2Image, refcount_bits: int, size: int) -> None:
    """Refuses what version 2 has no place for."""
    header = image.header
    if refcount_bits != 16:
        raise UsageError("compat=0.10 requires refcount_bits=16")
    if header.incompatible_features & EXTERNAL_DATA_FILE:
        raise UsageError("Cannot downgrade an image with a data file")
    if any(snapshot.vm_state_size >> 32 or snapshot.disk_size != size for snapshot in image.snapshots):
        raise UsageError("Internal snapshots prevent downgrade of image")
    features = header.incompatible_features & ~DIRTY
    if header.compression_type == ZSTD:
        if _has_compressed(image):
            raise UsageError(
                "Cannot downgrade an image with zstd compression type and existing compressed clusters"
            )
        features &= ~COMPRESSION_TYPE
    if features:
        raise UsageError(f"Cannot downgrade an image with incompatible features {features:#x} set")
    try:
        for snapshot in image.snapshots:
            image.at(snapshot)
    except SnapshotDamaged as error:
        failed = f"Failed to turn zero into data clusters: {os.strerror(error.errno)}"
        raise UsageError(error.problem, failed) from error


def _has_compressed(image: Qcow2Image) -> bool:
    views = [image.extents(0, image.size)]
    views += [image.at(each).extents(0, image.size) for each in image.snapshots]
    return any(extent.kind is Kind.COMPRESSED for view in views for extent in view)


def _upgrade(image: Image, planner: Planner) -> Iterator[Changes]:
    """Version 3, fenced from then on. Bitmaps that a program without them may have changed go, as in QEMU."""
    own = own_planner(planner)
    header = current_header(own)
    if header.version < 3:
        header = header._replace(version=3, header_length=HEADER_LENGTH, incompatible_features=CORRUPT)
        yield from rewrite_header(own, header.with_extension(None, EXT_BITMAPS))


class _RefcountBits:
    """Refcounts of another width."""

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def __call__(self, image: Image, planner: Planner) -> Iterable[Changes]:
        own = own_planner(planner)
        if own.header.refcount_bits != self._bits:
            yield from change_refcount_width(own, self._bits.bit_length() - 1)


class _LazyRefcounts:
    """Whether the refcounts of a running guest's image may lag behind."""

    def __init__(self, lazy: bool) -> None:
        self._lazy = lazy

    def __call__(self, image: Image, planner: Planner) -> Iterable[Changes]:
        own = own_planner(planner)
        header = current_header(own)
        if header.version > 2 and header.lazy_refcounts != self._lazy:
            own.switch(compatible_features=header.compatible_features ^ LAZY_REFCOUNTS)
            yield own.take()


class _DataFile:
    """Another name of the external data file, which is not looked at."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, image: Image, planner: Planner) -> Iterable[Changes]:
        own = own_planner(planner)
        header = current_header(own)
        extension = Extension(EXT_DATA_FILE, os.fsencode(self._name)) if self._name else None
        if header.data_file != (self._name or None):
            yield from rewrite_header(own, header.with_extension(extension, EXT_DATA_FILE))


def _not_raw(image: Image, planner: Planner) -> Iterable[Changes]:
    """The external data file need no longer be what the guest sees."""
    own = own_planner(planner)
    header = current_header(own)
    if header.data_file_is_raw:
        own.switch(autoclear_features=header.autoclear_features & ~RAW_EXTERNAL_DATA)
        yield own.take()


def _expand(image: Image, planner: Planner) -> Iterable[Changes]:
    """Clusters that are marked as zeroes: version 2 has no such mark."""
    own = own_planner(planner)
    return expand_zero_clusters(own, image.cipher) if own.header.version > 2 else ()


def _downgrade(image: Image, planner: Planner) -> Iterable[Changes]:
    """Version 2; the fence goes with it."""
    own = own_planner(planner)
    header = current_header(own)
    if header.version > 2:
        yield from rewrite_header(
            own,
            header._replace(
                version=2, incompatible_features=0, compatible_features=0, autoclear_features=0,
                compression_type=ZLIB, unknown_fields=b"",
            ),
        )
