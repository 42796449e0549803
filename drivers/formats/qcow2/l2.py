"""L2 tables: how wide their entries are, and what an entry says of its cluster.

Spec: docs/interop/qcow2, "L2 table entry" and "Extended L2 Entries". Whoever reads or writes L2 tables goes through
`L2Layout` (`Header.l2`), and need not know which kind of entries an image has:

- an entry is one integer: the descriptor in its low 64 bits, where the flags and masks of `entries` are; in images
  with extended entries the subcluster bitmap lies above it, in the others there is nothing;
- a standard cluster has `subclusters` parts that are allocated or zero independently: 32 of them with extended
  entries, else one, the cluster itself. Parts are given as bit masks, bit 0 for the first.

An extended entry has 16 bytes at a multiple of 16, so every entry lies in one sector: a change of it is atomic.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

from safeimg.drivers.formats.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from safeimg.drivers.records import NamedTuple

SUBCLUSTERS = 32  # of a cluster with an extended entry
EXTENDED_MIN_CLUSTER_BITS = 14
EVERY = (1 << SUBCLUSTERS) - 1  # all subclusters of a cluster
DESCRIPTOR = (1 << 64) - 1  # the part of an entry that every image has


class L2Layout(NamedTuple):
    """What follows from the size of a cluster and the kind of L2 entries."""

    cluster_bits: int
    extended: bool
    outside: bool = False  # clusters lie in an external data file

    @property
    def place(self) -> int:
        """The bits of a standard cluster's descriptor that say that it has a place: in a data file, that may be at
        offset 0."""
        return OFFSET_MASK | COPIED if self.outside else OFFSET_MASK

    @property
    def entry_size(self) -> int:
        """Bytes of an entry."""
        return 16 if self.extended else 8

    @property
    def entries(self) -> int:
        """Entries of one L2 table."""
        return 1 << (self.cluster_bits - (4 if self.extended else 3))

    @property
    def subclusters(self) -> int:
        return SUBCLUSTERS if self.extended else 1

    @property
    def subcluster_size(self) -> int:
        """Bytes of a subcluster: what is allocated, or zero, on its own."""
        return 1 << (self.cluster_bits - (5 if self.extended else 0))

    @property
    def every(self) -> int:
        """The mask of all subclusters."""
        return EVERY if self.extended else 1

    # Entries as stored

    def decode(self, data: bytes) -> Sequence[int]:
        """The entries in some bytes of a table, a multiple of `entry_size`."""
        return self.join(struct.unpack(f">{len(data) >> 3}Q", data))

    def join(self, words: Sequence[int]) -> Sequence[int]:
        """The entries that a table's 64-bit words make up."""
        if not self.extended:
            return words
        return [word | bitmap << 64 for word, bitmap in zip(words[::2], words[1::2], strict=True)]

    def encode(self, entries: Sequence[int]) -> bytes:
        """The inverse of `decode`."""
        if self.extended:
            entries = [word for entry in entries for word in (entry & DESCRIPTOR, entry >> 64)]
        return struct.pack(f">{len(entries)}Q", *entries)

    # What entries of standard clusters say

    @property
    def zero(self) -> int:
        """The entry of a cluster that reads as zeroes and has no place (not in version 2)."""
        return EVERY << 96 if self.extended else ZERO

    def data(self, host: int) -> int:
        """The entry of a cluster at `host` that is this entry's alone, all of it allocated."""
        return host | COPIED | (EVERY << 64 if self.extended else 0)

    def masks(self, entry: int) -> tuple[int, int]:
        """Subclusters that are allocated, and those that read as zeroes; the others are the backing image's."""
        if self.extended:
            return entry >> 64 & EVERY, entry >> 96
        if entry & ZERO:
            return 0, 1
        return int(entry & self.place != 0), 0

    def with_masks(self, entry: int, allocated: int, zeroes: int) -> int:
        """The entry with other subclusters allocated and zero. Without a place, nothing can be allocated; with one,
        a cluster without subclusters is either."""
        if self.extended:
            return entry & DESCRIPTOR & ~ZERO | allocated << 64 | zeroes << 96
        return entry | ZERO if zeroes else entry & ~ZERO

    def is_sound(self, entry: int) -> bool:
        """Whether descriptor and bitmap of an entry, of any kind, agree."""
        if not self.extended:
            return True
        if entry & COMPRESSED:
            return not entry >> 64
        allocated, zeroes = self.masks(entry)
        return not allocated & zeroes and (not allocated or bool(entry & self.place))


@lru_cache(maxsize=64)
def l2_layout(cluster_bits: int, extended: bool, outside: bool = False) -> L2Layout:
    return L2Layout(cluster_bits, extended, outside)


@lru_cache(maxsize=4096)
def runs(mask: int, count: int) -> tuple[tuple[int, int, bool], ...]:
    """The mask's bits below `count` as runs of equal ones: (first, length, set)."""
    found: list[tuple[int, int, bool]] = []
    at = 0
    while at < count:
        rest = mask >> at
        is_set = bool(rest & 1)
        other = ~rest if is_set else rest  # its lowest bit is where the run ends
        length = min((other & -other).bit_length() - 1 if other else count, count - at)
        found.append((at, length, is_set))
        at += length
    return tuple(found)


@lru_cache(maxsize=4096)
def subcluster_runs(allocated: int, zeroes: int, count: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """The subclusters below `count` as runs of equal ones: (first, length, allocated, zero)."""
    found: list[tuple[int, int, bool, bool]] = []
    for first, length, is_zero in runs(zeroes, count):
        found += ((first + at, part, is_set, is_zero) for at, part, is_set in runs(allocated >> first, length))
    return tuple(found)
