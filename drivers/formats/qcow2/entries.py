"""The bits of L1 and L2 table entries (spec: QEMU's qcow2, "Cluster mapping").

Tables are read as `array('Q')` in host byte order, so that reading an image needs no numpy.
"""

from __future__ import annotations

import sys
from array import array

from safeimg.drivers.records import NamedTuple

COPIED = 1 << 63  # refcount is exactly one; only accurate in active tables
COMPRESSED = 1 << 62  # L2 only
ZERO = 1 << 0  # L2, standard clusters, version 3 only
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00  # bits 9-55: L2 table in L1 entries, host cluster in L2 entries
L1_RESERVED = 0x7F00_0000_0000_01FF
L2_STANDARD_RESERVED = 0x3F00_0000_0000_01FE
REFCOUNT_BLOCK_MASK = 0xFFFF_FFFF_FFFF_FE00  # refcount table entries: bits 9-63
REFCOUNT_TABLE_RESERVED = 0x1FF
MAX_HOST_OFFSET = 1 << 56  # what a standard entry can point to lies below
SECTOR = 512


class CompressedCluster(NamedTuple):
    """Where a compressed cluster lies; the last sector may hold other clusters' data behind its own."""

    offset: int
    stored: int  # bytes up to the end of the last sector


def compressed_shift(cluster_bits: int) -> int:
    """The `x` of the specification: the number of bits of the host offset in a compressed descriptor."""
    return 62 - (cluster_bits - 8)


def decode_compressed(entry: int, cluster_bits: int) -> CompressedCluster:
    shift = 70 - cluster_bits
    offset = entry & ((1 << shift) - 1)
    sectors = ((entry & (COMPRESSED - 1)) >> shift) + 1
    return CompressedCluster(offset, sectors * SECTOR - offset % SECTOR)


def encode_compressed(offset: int, stored: int, cluster_bits: int) -> int:
    """The L2 entry for `stored` bytes at `offset` (below `1 << min(56, compressed_shift)`)."""
    additional = (offset + stored - 1) // SECTOR - offset // SECTOR
    return COMPRESSED | additional << compressed_shift(cluster_bits) | offset


def decode_table(data: bytes) -> array[int]:
    """Big-endian 64-bit entries as an array in host byte order. `data` is a multiple of 8 bytes."""
    table = array("Q")
    table.frombytes(data)
    if sys.byteorder == "little":
        table.byteswap()
    return table


def encode_table(table: array[int]) -> bytes:
    """The inverse of `decode_table`; `table` is not changed."""
    if sys.byteorder == "little":
        table = table[:]
        table.byteswap()
    return table.tobytes()


def hexadecimal(number: int) -> str:
    """As QEMU's messages show numbers: zero has no prefix."""
    return f"{number:#x}" if number else "0"
