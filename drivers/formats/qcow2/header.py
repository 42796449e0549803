"""The header cluster of a qcow2 image: parsing, validation, serialising (spec: QEMU's qcow2, "Header").

Field names are the specification's; integers are big-endian on disk. Offsets and lengths are bytes. Limits
are those QEMU enforces, and so are the messages of `FormatError.problem` and `UnsupportedError` where QEMU
has one.
"""

from __future__ import annotations

import os
import struct

from safeimg.drivers.errors import FormatError, UnsupportedError
from safeimg.drivers.formats.qcow2.extensions import (
    END,
    EXT_BACKING_FORMAT,
    EXT_BITMAPS,
    EXT_DATA_FILE,
    EXT_ENCRYPTION,
    EXT_FEATURE_NAMES,
    BitmapsExtension,
    EncryptionHeader,
    Extension,
    FeatureName,
    parse_extensions,
    parse_feature_names,
    serialise_extension,
    text,
    unsupported_features,
)
from safeimg.drivers.formats.qcow2.l2 import EXTENDED_MIN_CLUSTER_BITS, L2Layout, l2_layout
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import File

MAGIC = b"QFI\xfb"

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_BACKING_NAME = 1023
MAX_BITMAPS = 65535
V2_HEADER_LENGTH = 72
V3_MIN_HEADER_LENGTH = 104
# QEMU leaves the table of feature names out where it would take too much of the header cluster.
FEATURE_TABLE_MIN_CLUSTER = 8192
HEADER_LENGTH = 112  # what is written: with compression_type and its padding

# incompatible_features
DIRTY = 1 << 0
CORRUPT = 1 << 1
EXTERNAL_DATA_FILE = 1 << 2
COMPRESSION_TYPE = 1 << 3
EXTENDED_L2 = 1 << 4
UNFINISHED_BIT = 56  # safeimg: the image is still being made; every other program must refuse it
UNFINISHED = 1 << UNFINISHED_BIT
UNFINISHED_V2 = 0x5AFE0002  # version number of an unfinished image of version 2, which has no feature bits
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | EXTERNAL_DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2
# compatible_features
LAZY_REFCOUNTS = 1 << 0
# autoclear_features
BITMAPS = 1 << 0
RAW_EXTERNAL_DATA = 1 << 1
KNOWN_AUTOCLEAR = BITMAPS | RAW_EXTERNAL_DATA

# compression_type
ZLIB = 0
ZSTD = 1
COMPRESSION_NAMES = {ZLIB: "zlib", ZSTD: "zstd"}

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")

# crypt_method
AES = 1
LUKS = 2


class Header(NamedTuple):
    """A valid header. Version 2 has the values that the specification assumes for it."""

    version: int
    backing_file_offset: int
    backing_file_size: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_size: int
    l1_table_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    nb_snapshots: int
    snapshots_offset: int
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = 4
    header_length: int = HEADER_LENGTH
    compression_type: int = ZLIB
    unknown_fields: bytes = b""  # header bytes from 105 to `header_length`, kept as they are
    extensions: tuple[Extension, ...] = ()  # in file order, without the end marker
    backing_file: str | None = None  # bytes that are not UTF-8 as surrogates (os.fsdecode)

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible_features & EXTENDED_L2)

    @property
    def l2(self) -> L2Layout:
        """How the image's L2 tables are to be read."""
        return l2_layout(self.cluster_bits, self.extended_l2, self.has_data_file)

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table."""
        return self.l2.entries

    @property
    def l2_coverage(self) -> int:
        """Guest bytes that one L1 entry (one L2 table) stands for."""
        return self.l2.entries << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def refcount_block_entries(self) -> int:
        """Clusters that one refcount block stands for."""
        return 1 << (self.cluster_bits + 3 - self.refcount_order)

    @property
    def refcount_table_entries(self) -> int:
        return self.refcount_table_clusters << (self.cluster_bits - 3)

    @property
    def l1_needed(self) -> int:
        """L1 entries that `size` needs at least; `l1_size` may be more (VM state)."""
        return -(-self.size // self.l2_coverage)

    @property
    def max_refcount(self) -> int:
        return (1 << self.refcount_bits) - 1

    @property
    def is_dirty(self) -> bool:
        return bool(self.incompatible_features & DIRTY)

    @property
    def is_corrupt(self) -> bool:
        return bool(self.incompatible_features & CORRUPT)

    @property
    def lazy_refcounts(self) -> bool:
        return bool(self.compatible_features & LAZY_REFCOUNTS)

    @property
    def extensions_offset(self) -> int:
        """Where the header extensions begin in the file."""
        return self.header_length

    def extension(self, kind: int) -> bytes | None:
        """Data of the last extension of this type (as QEMU, should there be several), or None."""
        for extension in reversed(self.extensions):
            if extension.type == kind:
                return extension.data
        return None

    def with_extension(self, extension: Extension | None, kind: int) -> Header:
        """This header with the extension of type `kind` replaced where it is, or added, or removed (None)."""
        kept: list[Extension] = []
        for old in self.extensions:
            if old.type != kind:
                kept.append(old)
            elif extension is not None:
                kept.append(extension)
                extension = None
        if extension is not None:
            kept.append(extension)
        return self._replace(extensions=tuple(kept))

    @property
    def has_data_file(self) -> bool:
        """Guest data lies in another file, each cluster at its guest offset."""
        return bool(self.incompatible_features & EXTERNAL_DATA_FILE)

    @property
    def data_file_is_raw(self) -> bool:
        """What lies in that file is what the guest sees, everywhere."""
        return bool(self.autoclear_features & RAW_EXTERNAL_DATA)

    @property
    def data_file(self) -> str | None:
        """The external data file's name as written in the image."""
        data = self.extension(EXT_DATA_FILE)
        return None if data is None else text(data)

    @property
    def backing_format(self) -> str | None:
        data = self.extension(EXT_BACKING_FORMAT)
        return None if data is None else text(data)

    @property
    def bitmaps(self) -> BitmapsExtension | None:
        """The bitmaps extension if it is there and consistent (its autoclear bit is set)."""
        data = self.extension(EXT_BITMAPS)
        return BitmapsExtension.of(data) if data is not None and self.autoclear_features & BITMAPS else None

    @property
    def encryption(self) -> EncryptionHeader | None:
        """The place of the LUKS header, if there is one."""
        data = self.extension(EXT_ENCRYPTION)
        return None if data is None else EncryptionHeader.of(data)

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        return parse_feature_names(self.extension(EXT_FEATURE_NAMES) or b"")


def parse_header(file: File, *, unfinished: bool = False, snapshots: bool = True) -> Header:
    """Reads and validates the header of an image.

    Raises `FormatError` for what the specification or QEMU does not allow, and `UnsupportedError` for
    incompatible features that are unknown and for those that safeimg does not handle. The dirty and corrupt
    bits are no errors here, nor are tables past the end of the file (`check` reports them, reading fails).
    `unfinished` lets images through that safeimg itself has fenced while it makes them. Without `snapshots`, where the
    header says that the snapshot table lies is not looked at.
    """
    path = file.path
    head = file.pread(0, 512)
    if head[:4] != MAGIC:
        raise FormatError(path, "Image is not in qcow2 format")
    if len(head) >= 8:
        _version(int.from_bytes(head[4:8], "big"), unfinished)
    if len(head) < V2_HEADER_LENGTH:
        raise FormatError(path, "qcow2 header too short")
    cluster_bits = int.from_bytes(head[20:24], "big")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise FormatError(path, f"Unsupported cluster size: 2^{cluster_bits}")
    if len(head) == 512 and cluster_bits > 9:
        head += file.pread(512, (1 << cluster_bits) - 512)
    return parse_header_cluster(head, path, unfinished=unfinished, snapshots=snapshots)


def parse_header_cluster(head: bytes, path: str, *, unfinished: bool = False, snapshots: bool = True) -> Header:
    """Parses the first cluster of an image (less if the file is shorter). Raises as `parse_header`."""
    if head[:4] != MAGIC:
        raise FormatError(path, "Image is not in qcow2 format")
    if len(head) < V2_HEADER_LENGTH:
        raise FormatError(path, "qcow2 header too short")
    fields = _V2.unpack_from(head)[1:]
    version, backing_offset, backing_size, cluster_bits, size, crypt_method, l1_size = fields[:7]
    l1_table_offset, reftable_offset, reftable_clusters, nb_snapshots, snapshots_offset = fields[7:]
    marked = version == UNFINISHED_V2
    version = _version(version, unfinished)
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise FormatError(path, f"Unsupported cluster size: 2^{cluster_bits}")
    cluster_size = 1 << cluster_bits
    incompatible = UNFINISHED if marked else 0
    compatible = autoclear = 0
    refcount_order, header_length, compression_type, unknown = 4, V2_HEADER_LENGTH, ZLIB, b""
    if version == 3:
        if len(head) < V3_MIN_HEADER_LENGTH:
            raise FormatError(path, "qcow2 header too short")
        v3_fields = _V3.unpack_from(head, V2_HEADER_LENGTH)
        incompatible, compatible, autoclear, refcount_order, header_length = v3_fields
        if header_length < V3_MIN_HEADER_LENGTH:
            raise FormatError(path, "qcow2 header too short")
        if header_length > cluster_size:
            raise FormatError(path, "qcow2 header exceeds cluster size")
        beyond = head[V3_MIN_HEADER_LENGTH:header_length].ljust(header_length - V3_MIN_HEADER_LENGTH, b"\0")
        compression_type = beyond[0] if beyond else ZLIB
        unknown = beyond[1:]
    if backing_offset > cluster_size:
        raise FormatError(path, "Invalid backing file offset")
    extensions_end = min(len(head), backing_offset or cluster_size)
    unknown_bits = incompatible & ~(KNOWN_INCOMPATIBLE | (UNFINISHED if unfinished else 0))
    if unknown_bits:
        raise UnsupportedError(unsupported_features(head[:extensions_end], header_length, unknown_bits))
    _check_compression(path, compression_type, bool(incompatible & COMPRESSION_TYPE))
    if incompatible & EXTENDED_L2 and cluster_bits < EXTENDED_MIN_CLUSTER_BITS:
        raise UnsupportedError(f"Unsupported subcluster size: {l2_layout(cluster_bits, True).subcluster_size}")
    if refcount_order > 6:
        raise FormatError(path, "Reference count entry width too large; may not exceed 64 bits")
    header = Header(
        version, backing_offset, backing_size, cluster_bits, size, crypt_method, l1_size, l1_table_offset,
        reftable_offset, reftable_clusters, nb_snapshots, snapshots_offset, incompatible, compatible,
        autoclear, refcount_order, header_length, compression_type, unknown,
    )
    _check_tables(path, header, snapshots)
    if crypt_method > 2:
        raise FormatError(path, f"Unsupported encryption method {crypt_method}")
    # A backing name in front of the extensions leaves no room for any.
    limit = max(header_length, backing_offset or cluster_size)
    extensions = parse_extensions(path, head, header_length, limit, crypt_method == LUKS, cluster_size)
    if crypt_method == LUKS and not any(extension.type == EXT_ENCRYPTION for extension in extensions):
        raise FormatError(path, "Missing CRYPTO header for crypt method 2")
    backing_file = None
    if backing_offset:
        if backing_size > min(MAX_BACKING_NAME, cluster_size - backing_offset):
            raise FormatError(path, "Backing file name too long")
        name = head[backing_offset:backing_offset + backing_size]
        backing_file = os.fsdecode(name.split(b"\0", 1)[0]) or None
    return header._replace(extensions=extensions, backing_file=backing_file)


def serialise(header: Header) -> bytes:
    """The whole header cluster (`cluster_size` bytes) for `header`.

    The backing file name stays at `backing_file_offset` if that lies behind the extensions and leaves room,
    else it goes right behind them. Raises `FormatError` if it does not all fit into a cluster.
    """
    header_length = _written_length(header)
    extensions = _serialise_extensions(header)
    name = os.fsencode(header.backing_file) if header.backing_file is not None else b""
    backing_offset = 0
    if name:
        backing_offset = header_length + len(extensions)
        if backing_offset < header.backing_file_offset <= header.cluster_size - len(name):
            backing_offset = header.backing_file_offset
    version = header.version
    if version == 2 and header.incompatible_features & UNFINISHED:
        version = UNFINISHED_V2
    out = bytearray(
        _V2.pack(
            MAGIC, version, backing_offset, len(name), header.cluster_bits, header.size,
            header.crypt_method, header.l1_size, header.l1_table_offset, header.refcount_table_offset,
            header.refcount_table_clusters, header.nb_snapshots, header.snapshots_offset,
        )
    )
    if header.version == 3:
        out += _V3.pack(
            header.incompatible_features, header.compatible_features, header.autoclear_features,
            header.refcount_order, header_length,
        )
        beyond = bytes([header.compression_type]) + header.unknown_fields
        out += beyond.ljust(header_length - len(out), b"\0")[:header_length - len(out)]
    out += extensions
    if name:
        out = out.ljust(backing_offset, b"\0") + name
    if len(out) > header.cluster_size or len(name) > MAX_BACKING_NAME:
        raise FormatError(
            "qcow2 header", f"{len(out)} bytes of header and extensions do not fit into {header.cluster_size}"
        )
    return bytes(out.ljust(header.cluster_size, b"\0"))


def backing_name_offset(header: Header) -> int:
    """Where the backing file's name goes if it follows the extensions."""
    return _written_length(header) + len(_serialise_extensions(header))


def _serialise_extensions(header: Header) -> bytes:
    return b"".join(map(serialise_extension, (*header.extensions, END)))


def _written_length(header: Header) -> int:
    """The header's length once it is written: with room for the compression type where that matters."""
    if header.version == 2:
        return V2_HEADER_LENGTH
    return max(header.header_length, HEADER_LENGTH) if header.compression_type else header.header_length


def _version(number: int, unfinished: bool) -> int:
    if number == UNFINISHED_V2:
        if not unfinished:
            raise UnsupportedError("Unsupported qcow2 feature(s): unfinished safeimg image of version 2")
        return 2
    if number not in (2, 3):
        raise UnsupportedError(f"Unsupported qcow2 version {number}")
    return number


def _check_compression(path: str, compression_type: int, flagged: bool) -> None:
    if compression_type not in COMPRESSION_NAMES:
        raise UnsupportedError(f"qcow2: unknown compression type: {compression_type}")
    if compression_type != ZLIB and not flagged:
        raise FormatError(path, "qcow2: Compression type incompatible feature bit must be set")
    if compression_type == ZLIB and flagged:
        raise FormatError(path, "qcow2: Compression type incompatible feature bit must not be set")


def _check_tables(path: str, header: Header, snapshots: bool) -> None:
    if header.refcount_table_clusters == 0:
        raise FormatError(path, "Image does not contain a reference count table")
    refcount_table_bytes = header.refcount_table_clusters << header.cluster_bits
    _check_table(path, header, "Reference count table", header.refcount_table_offset, refcount_table_bytes,
                 MAX_REFCOUNT_TABLE_BYTES)
    # A snapshot table entry has at least 40 bytes.
    if snapshots and header.nb_snapshots > MAX_SNAPSHOTS:
        raise FormatError(path, "Snapshot table too large")
    if snapshots:
        _check_table(path, header, "Snapshot table", header.snapshots_offset, 40 * header.nb_snapshots, 1 << 62)
    _check_table(path, header, "Active L1 table", header.l1_table_offset, 8 * header.l1_size, MAX_L1_BYTES)
    if header.size >= 1 << 63 or header.l1_needed > 0x7FFFFFFF:
        raise FormatError(path, "Image is too big")
    if header.l1_size < header.l1_needed:
        raise FormatError(path, "L1 table is too small")


def _check_table(path: str, header: Header, name: str, offset: int, length: int, limit: int) -> None:
    if length > limit:
        raise FormatError(path, f"{name} too large")
    if offset % header.cluster_size or offset + length >= 1 << 63:
        raise FormatError(path, f"{name} offset invalid")
