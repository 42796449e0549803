"""The directory and the tables of persistent bitmaps (spec: QEMU's qcow2, "Bitmaps"). Parsing only."""

from __future__ import annotations

import os
import struct
from array import array

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.qcow2.entries import decode_table
from safeimg.drivers.formats.qcow2.header import MAX_BITMAPS, Header
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import File

IN_USE = 1 << 0
AUTO = 1 << 1
EXTRA_DATA_COMPATIBLE = 1 << 2
DIRTY_TRACKING = 1  # type

TABLE_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
TABLE_RESERVED = 0xFF00_0000_0000_01FE
TABLE_ALL_ONES = 1  # only where the offset is 0

MAX_NAME = 1023
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
MAX_DIRECTORY_ENTRY = 24 + MAX_NAME + 1  # as QEMU counts: padded to a multiple of 8
MAX_DIRECTORY_BYTES = 1024 * MAX_BITMAPS
MAX_TABLE_ENTRIES = 0x8000000
MAX_BITMAP_BYTES = 512 << 20  # of bits, in whole clusters

_ENTRY = struct.Struct(">QIIBBHI")


class Bitmap(NamedTuple):
    """An entry of the bitmap directory."""

    bitmap_table_offset: int
    bitmap_table_size: int  # entries
    flags: int
    granularity_bits: int
    name: str
    offset: int  # of the entry, in the file
    length: int  # of the entry, with padding

    @property
    def granularity(self) -> int:
        """Guest bytes that one bit stands for."""
        return 1 << self.granularity_bits

    @property
    def in_use(self) -> bool:
        """It was not saved properly: its contents mean nothing."""
        return bool(self.flags & IN_USE)

    @property
    def enabled(self) -> bool:
        """Every write to the virtual disk has to be recorded in it."""
        return bool(self.flags & AUTO)


def directory_entry(bitmap: Bitmap) -> bytes:
    """An entry of the bitmap directory as stored."""
    name = os.fsencode(bitmap.name)
    entry = _ENTRY.pack(
        bitmap.bitmap_table_offset, bitmap.bitmap_table_size, bitmap.flags, DIRTY_TRACKING,
        bitmap.granularity_bits, len(name), 0,
    ) + name
    return entry + bytes(-len(entry) % 8)


def table_entries(size: int, granularity_bits: int, cluster_bits: int) -> int:
    """Entries that the table of a bitmap for a virtual disk of `size` bytes has."""
    bits = -(-size >> granularity_bits)
    return -(-bits >> (cluster_bits + 3))


def read_bitmaps(file: File, header: Header) -> tuple[Bitmap, ...]:
    """The bitmap directory; empty where the extension is missing or its autoclear bit is clear.

    Raises `FormatError` in QEMU's words for what QEMU does not take, and if the directory is not in the file.
    """
    extension = header.bitmaps
    if extension is None:
        return ()
    path = file.path
    count, start = extension.nb_bitmaps, extension.bitmap_directory_offset
    size = extension.bitmap_directory_size
    if count == 0:
        raise FormatError(path, "found bitmaps extension with zero bitmaps")
    if count > MAX_BITMAPS:
        raise FormatError(
            path,
            f"bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}",
        )
    if start % header.cluster_size:
        raise FormatError(path, "bitmaps_ext: invalid bitmap directory offset")
    if size > MAX_DIRECTORY_BYTES:
        raise FormatError(
            path,
            f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size "
            f"({MAX_DIRECTORY_BYTES})",
        )
    if size == 0:
        raise FormatError(path, "Requested bitmap directory size is zero")
    data = file.pread(start, size) if start + size < 1 << 63 else b""
    if len(data) < size:
        raise FormatError(path, "bitmap directory lies past the end of the file", offset=start)
    bitmaps: dict[str, Bitmap] = {}
    position = 0
    while position < size:
        bitmap = _parse_entry(path, header, data, position, start)
        if bitmap.name in bitmaps:
            raise FormatError(path, f"Bitmap already exists: {bitmap.name}")
        if len(bitmaps) == count:
            raise FormatError(path, "More bitmaps found than specified in header extension")
        bitmaps[bitmap.name] = bitmap
        position += bitmap.length
    if len(bitmaps) < count:
        raise FormatError(path, "Less bitmaps found than specified in header extension")
    return tuple(bitmaps.values())


def _parse_entry(path: str, header: Header, data: bytes, position: int, start: int) -> Bitmap:
    if position + _ENTRY.size > len(data):
        raise FormatError(path, "Broken bitmap directory", offset=start + position)
    fields = _ENTRY.unpack_from(data, position)
    table_offset, table_size, flags, kind, granularity_bits, name_size, extra_size = fields
    if extra_size:
        raise FormatError(path, "Bitmap extra data is not supported", offset=start + position)
    length = -(-(_ENTRY.size + name_size) // 8) * 8
    if position + length > len(data):
        raise FormatError(path, "Broken bitmap directory", offset=start + position)
    name = os.fsdecode(data[position + _ENTRY.size:position + _ENTRY.size + name_size])
    if (
        not 0 < name_size <= MAX_NAME
        or not MIN_GRANULARITY_BITS <= granularity_bits <= MAX_GRANULARITY_BITS
        or flags & ~(IN_USE | AUTO)
        or kind != DIRTY_TRACKING
        or not 0 < table_size <= MAX_TABLE_ENTRIES
        or not table_offset
        or table_offset % header.cluster_size
        or table_offset + 8 * table_size >= 1 << 63
        or table_size << header.cluster_bits > MAX_BITMAP_BYTES
    ):
        raise FormatError(path, f"Bitmap '{name}' doesn't satisfy the constraints", offset=start + position)
    return Bitmap(table_offset, table_size, flags, granularity_bits, name, start + position, length)


def read_bitmap_table(file: File, header: Header, bitmap: Bitmap) -> array[int]:
    """The table's entries in host byte order, each valid: reserved bits clear, offset aligned to a cluster.

    `FormatError` if its size is not what the virtual disk's size asks for (unless the bitmap is in use: that
    may be from before a resize), or if it is not in the file.
    """
    expected = table_entries(header.size, bitmap.granularity_bits, header.cluster_bits)
    if bitmap.bitmap_table_size != expected and not bitmap.in_use:
        problem = f"bitmap '{bitmap.name}' has {bitmap.bitmap_table_size} table entries instead of {expected}"
        raise FormatError(file.path, problem, offset=bitmap.offset)
    length = 8 * bitmap.bitmap_table_size
    # The file has to hold it: do not reserve memory for what a hostile directory entry promises.
    if bitmap.bitmap_table_offset + length > file.length():
        problem = f"table of bitmap '{bitmap.name}' lies past the end of the file"
        raise FormatError(file.path, problem, offset=bitmap.bitmap_table_offset)
    table = decode_table(file.pread(bitmap.bitmap_table_offset, length))
    for index, entry in enumerate(table):
        offset = entry & TABLE_OFFSET_MASK
        if entry & TABLE_RESERVED or offset % header.cluster_size or (offset and entry & TABLE_ALL_ONES):
            problem = f"table of bitmap '{bitmap.name}' has the invalid entry {entry:#x}"
            raise FormatError(file.path, problem, offset=bitmap.bitmap_table_offset + 8 * index)
    return table
