"""Header extensions of a qcow2 image: parsing, validation, serialising (spec: QEMU's qcow2, "Header extensions").

Integers are big-endian on disk. Messages are QEMU's where it has one.
"""

from __future__ import annotations

import os
import struct

from safeimg.drivers.errors import FormatError
from safeimg.drivers.records import NamedTuple

MAX_BACKING_FORMAT = 15

# Types of header extensions
EXT_END = 0x00000000
EXT_BACKING_FORMAT = 0xE2792ACA
EXT_FEATURE_NAMES = 0x6803F857
EXT_BITMAPS = 0x23852875
EXT_ENCRYPTION = 0x0537BE77
EXT_DATA_FILE = 0x44415441

_EXTENSION = struct.Struct(">II")
_FEATURE = struct.Struct(">BB46s")
_BITMAPS = struct.Struct(">IIQQ")
_ENCRYPTION = struct.Struct(">QQ")


class FeatureName(NamedTuple):
    """An entry of the feature name table."""

    kind: int  # 0 incompatible, 1 compatible, 2 autoclear
    bit: int
    name: str


FEATURE_NAMES = (
    FeatureName(0, 0, "dirty bit"),
    FeatureName(0, 1, "corrupt bit"),
    FeatureName(0, 2, "external data file"),
    FeatureName(0, 3, "compression type"),
    FeatureName(0, 4, "extended L2 entries"),
    FeatureName(1, 0, "lazy refcounts"),
    FeatureName(2, 0, "bitmaps"),
    FeatureName(2, 1, "raw external data"),
)


class Extension(NamedTuple):
    """A header extension. `data` is without padding."""

    type: int
    data: bytes


END = Extension(EXT_END, b"")


class BitmapsExtension(NamedTuple):
    """Where the bitmap directory lies (spec: "Bitmaps extension")."""

    nb_bitmaps: int
    bitmap_directory_size: int
    bitmap_directory_offset: int

    @classmethod
    def of(cls, data: bytes) -> BitmapsExtension:
        nb_bitmaps, _reserved, size, offset = _BITMAPS.unpack(data)
        return cls(nb_bitmaps, size, offset)

    def extension(self) -> Extension:
        data = _BITMAPS.pack(self.nb_bitmaps, 0, self.bitmap_directory_size, self.bitmap_directory_offset)
        return Extension(EXT_BITMAPS, data)


class EncryptionHeader(NamedTuple):
    """Where the LUKS header lies (spec: "Full disk encryption header pointer")."""

    offset: int
    length: int

    @classmethod
    def of(cls, data: bytes) -> EncryptionHeader:
        return cls(*_ENCRYPTION.unpack(data))

    def extension(self) -> Extension:
        return Extension(EXT_ENCRYPTION, _ENCRYPTION.pack(self.offset, self.length))


def parse_feature_names(data: bytes) -> tuple[FeatureName, ...]:
    """The entries of a feature name table; a last one that is cut short is completed with zeroes."""
    padded = data + bytes(-len(data) % _FEATURE.size)
    return tuple(FeatureName(kind, bit, text(name)) for kind, bit, name in _FEATURE.iter_unpack(padded))


def feature_name_table(names: tuple[FeatureName, ...] = FEATURE_NAMES) -> Extension:
    data = b"".join(_FEATURE.pack(kind, bit, name.encode()) for kind, bit, name in names)
    return Extension(EXT_FEATURE_NAMES, data)


def text(data: bytes) -> str:
    """A name, up to its first zero byte."""
    return os.fsdecode(data.split(b"\0", 1)[0])


def serialise_extension(extension: Extension) -> bytes:
    """An extension as stored: type, length, data, padding to a multiple of 8."""
    data = extension.data
    return _EXTENSION.pack(extension.type, len(data)) + data + bytes(-len(data) % 8)


def unsupported_features(head: bytes, offset: int, bits: int) -> str:
    """QEMU's message for incompatible features that are unknown; names come from the image's own table."""
    names = []
    table: tuple[FeatureName, ...] = ()
    while offset + _EXTENSION.size <= len(head):
        kind, length = _EXTENSION.unpack_from(head, offset)
        offset += _EXTENSION.size
        if kind == EXT_END or offset + length > len(head):
            break
        if kind == EXT_FEATURE_NAMES:
            table = parse_feature_names(head[offset:offset + length])
        offset += -(-length // 8) * 8
    for entry in table:
        if entry.kind == 0 and entry.bit < 64 and bits >> entry.bit & 1:
            names.append(entry.name)
            bits &= ~(1 << entry.bit)
    if bits:
        names.append(f"Unknown incompatible feature: {bits:x}")
    return f"Unsupported qcow2 feature(s): {', '.join(names)}"


def parse_extensions(
    path: str, head: bytes, offset: int, limit: int, luks: bool, cluster_size: int
) -> tuple[Extension, ...]:
    """Extensions between `offset` and `limit`; `head` may end earlier, what is missing reads as zeroes."""
    extensions: list[Extension] = []
    while offset < limit:
        if offset + _EXTENSION.size > len(head):
            break
        kind, length = _EXTENSION.unpack_from(head, offset)
        start = offset + _EXTENSION.size
        if start > limit or length > limit - start:
            raise FormatError(path, "Header extension too large")
        if kind == EXT_END:
            break
        data = head[start:start + length].ljust(length, b"\0")
        _check_extension(path, kind, data, luks, cluster_size)
        extensions.append(Extension(kind, data))
        offset = start + -(-length // 8) * 8
    return tuple(extensions)


def _check_extension(path: str, kind: int, data: bytes, luks: bool, cluster_size: int) -> None:
    length = len(data)
    if kind == EXT_BACKING_FORMAT and length > MAX_BACKING_FORMAT:
        limit = MAX_BACKING_FORMAT + 1
        raise FormatError(path, f"ERROR: ext_backing_format: len={length} too large (>={limit})")
    if kind == EXT_ENCRYPTION and not luks:
        raise FormatError(path, "CRYPTO header extension only expected with LUKS encryption method")
    if kind == EXT_ENCRYPTION and length != _ENCRYPTION.size:
        problem = f"CRYPTO header extension size {length}, but expected size {_ENCRYPTION.size}"
        raise FormatError(path, problem)
    if kind == EXT_ENCRYPTION and (offset := _ENCRYPTION.unpack(data)[0]) % cluster_size:
        problem = f"Encryption header offset '{offset}' is not a multiple of cluster size '{cluster_size}'"
        raise FormatError(path, problem)
    if kind == EXT_BITMAPS and length != _BITMAPS.size:
        raise FormatError(path, "bitmaps_ext: Invalid extension length")
