"""The header of a VDI 1.1 image: parsing, with the checks and messages of qemu-img, and making one.

    | header, one sector | block map: 4 bytes a block | blocks of 1 MiB, in the order of their allocation |

Everything is little-endian. Source: the format's public descriptions (VirtualBox Disk Image, Kaitai Struct gallery),
and what qemu-img writes and refuses. Offsets and lengths are bytes.
"""

from __future__ import annotations

import struct

from safeimg.drivers.errors import FormatError, UnsupportedError
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import File

SECTOR = 512
BLOCK = 1 << 20  # the only block size that qemu-img takes
MAX_BLOCKS = 0x1FFFFF80
MAX_SIZE = MAX_BLOCKS * BLOCK

# Entries of the block map; smaller ones are numbers of blocks.
ENTRY = 4  # bytes
UNALLOCATED = 0xFFFFFFFF
DISCARDED = 0xFFFFFFFE  # reads as zeroes, like an unallocated block

SIGNATURE = 0xBEDA107F
SIGNATURE_OFFSET = 0x40
VERSION_OFFSET = 0x44
VERSION = 0x00010001  # major and minor
UNFINISHED = 0xFFFF0001  # a version that every program refuses, of an image that is being made
BLOCKS_ALLOCATED_OFFSET = 0x184
DYNAMIC, STATIC = 1, 2

_TEXT = b"<<< safeimg Virtual Disk Image >>>\n"
_HEADER_SIZE = 0x180
_FIELDS = struct.Struct("<64s5I256s7IQ4I16s16s16s16s")
_NO_UUID = bytes(16)


class Header(NamedTuple):
    """What an image's header says, as far as it matters."""

    version: int
    image_type: int  # anything but `STATIC` is taken for a dynamic image
    map_offset: int
    data_offset: int
    disk_size: int
    blocks: int  # in the map
    allocated: int  # blocks in use, and the number of the one that QEMU allocates next

    @property
    def size(self) -> int:
        """Virtual size: whole sectors, as in QEMU."""
        return -(-self.disk_size // SECTOR) * SECTOR

    @property
    def map_end(self) -> int:
        return self.map_offset + ENTRY * self.blocks


def version_words(version: int) -> bytes:
    """The version as it is on disk."""
    return struct.pack("<I", version)


def serialise(header: Header, uuid: bytes, snapshot_uuid: bytes) -> bytes:
    """The header's sector, for an image of its own (no parent)."""
    return _FIELDS.pack(
        _TEXT, SIGNATURE, header.version, _HEADER_SIZE, header.image_type, 0, b"", header.map_offset,
        header.data_offset, 0, 0, 0, SECTOR, 0, header.disk_size, BLOCK, 0, header.blocks, header.allocated, uuid,
        snapshot_uuid, _NO_UUID, _NO_UUID,
    ).ljust(SECTOR, b"\0")  # fmt: skip


def parse_header(file: File, *, unfinished: bool = False) -> Header:
    """The header, if it is one that QEMU opens, or with `unfinished` that of an image that is being made.

    Raises `FormatError` for a file that is no VDI image, `UnsupportedError` in QEMU's words for others."""
    fields = _FIELDS.unpack(file.pread(0, _FIELDS.size).ljust(_FIELDS.size, b"\0"))
    _text, signature, version, _header_size, image_type, _flags, _description = fields[:7]
    map_offset, data_offset, _cylinders, _heads, _sectors, sector_size, _unused = fields[7:14]
    disk_size, block_size, _extra, blocks, allocated, _uuid, _snapshot, link, parent = fields[14:]
    header = Header(version, image_type, map_offset, data_offset, disk_size, blocks, allocated)
    check_size(disk_size)
    if signature != SIGNATURE:
        raise FormatError(file.path, f"Image not in VDI format (bad signature {signature:08x})")
    if version != VERSION and not (unfinished and version == UNFINISHED):
        raise _unsupported(f"version {version >> 16}.{version & 0xFFFF}")
    if map_offset % SECTOR:
        raise _unsupported(f"unaligned block map offset {map_offset:#x}")
    if data_offset % SECTOR:
        raise _unsupported(f"unaligned data offset {data_offset:#x}")
    if sector_size != SECTOR:
        raise _unsupported(f"sector size {sector_size} is not {SECTOR}")
    if block_size != BLOCK:
        raise _unsupported(f"block size {block_size} is not {BLOCK}")
    if header.size > blocks * BLOCK:
        raise _unsupported(f"disk size {header.size}, image bitmap has room for {blocks * BLOCK}")
    if link != _NO_UUID:
        raise _unsupported("non-NULL link UUID")
    if parent != _NO_UUID:
        raise _unsupported("non-NULL parent UUID")
    if blocks > MAX_BLOCKS:
        raise _unsupported(f"too many blocks {blocks}, max is {MAX_BLOCKS}")
    return header


def check_size(size: int) -> None:
    """`UnsupportedError` if a disk is too large for the format."""
    if size > MAX_SIZE:
        raise UnsupportedError(f"Unsupported VDI image size (size is {size:#x}, max supported is {MAX_SIZE:#x})")


def _unsupported(what: str) -> UnsupportedError:
    return UnsupportedError(f"unsupported VDI image ({what})")
