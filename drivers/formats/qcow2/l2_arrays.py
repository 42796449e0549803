"""L2 tables as arrays: what all their entries refer to, at once. For counting references; needs numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from safeimg.drivers.formats.qcow2.entries import COMPRESSED, COPIED, L2_STANDARD_RESERVED, OFFSET_MASK, ZERO
from safeimg.drivers.formats.qcow2.l2 import EVERY, SUBCLUSTERS, L2Layout
from safeimg.drivers.records import NamedTuple

Words = NDArray[np.uint64]
Clusters = NDArray[np.int64]  # host clusters by number


class Referred(NamedTuple):
    """What some entries of an L2 table refer to, in their order."""

    hosts: Words  # offsets of standard clusters
    compressed: Words  # descriptors of compressed clusters


def descriptors(l2: L2Layout, words: Words) -> Words:
    """The descriptors of a table's entries."""
    return words[::2] if l2.extended else words


def referred(l2: L2Layout, words: Words) -> Referred | None:
    """What the entries in a part of a table refer to; None if one is such as the specification does not allow."""
    found = descriptors(l2, words)
    used = found != 0
    if l2.extended:
        used |= words[1::2] != 0
        if not _are_sound(l2, found[used], words[1::2][used]):
            return None
    found = found[used]
    is_compressed = (found & np.uint64(COMPRESSED)) != 0
    standard = found[~is_compressed]
    if (standard & np.uint64(L2_STANDARD_RESERVED)).any():
        return None
    hosts = standard & np.uint64(OFFSET_MASK)
    if (hosts & np.uint64((1 << l2.cluster_bits) - 1)).any():
        return None
    return Referred(hosts[hosts != 0], found[is_compressed])


def standard_hosts(l2: L2Layout, words: Words) -> Words:
    """Offsets of the standard clusters that entries refer to, whatever else the entries may be."""
    found = descriptors(l2, words)
    standard: Words = found[(found & np.uint64(COMPRESSED)) == 0]
    return standard & np.uint64(OFFSET_MASK)


def _are_sound(l2: L2Layout, found: Words, bitmaps: Words) -> bool:
    """`L2Layout.is_sound` of all entries."""
    allocated, zeroes = bitmaps & np.uint64(EVERY), bitmaps >> np.uint64(SUBCLUSTERS)
    is_compressed = (found & np.uint64(COMPRESSED)) != 0
    needs_place = (allocated != 0) & ((found & np.uint64(l2.place)) == 0)
    bad = ((allocated & zeroes) != 0) | np.where(is_compressed, bitmaps != 0, needs_place)
    return not bad.any()


def partly_used(l2: L2Layout, words: Words) -> tuple[Words, Words]:
    """Clusters of an L2 table that are its alone and not allocated as a whole: their offsets and, for each, the mask
    of the subclusters that are."""
    found = descriptors(l2, words)
    allocated = words[1::2] & np.uint64(EVERY) if l2.extended else np.uint64(1) - (found & np.uint64(ZERO))
    hosts = found & np.uint64(OFFSET_MASK)
    own = (found >> np.uint64(62)) == np.uint64(COPIED >> 62)
    wanted = own & (hosts != 0) & (allocated != np.uint64(l2.every))
    return hosts[wanted], allocated[wanted]


def compressed_clusters(l2: L2Layout, compressed: Words) -> list[Clusters]:
    """The host clusters that compressed clusters touch: all their first ones, all their second ones, …"""
    bits = l2.cluster_bits
    shift = np.uint64(70 - bits)
    offsets = compressed & ((np.uint64(1) << shift) - np.uint64(1))
    sectors = ((compressed & np.uint64(COMPRESSED - 1)) >> shift) + np.uint64(1)
    ends = ((offsets >> np.uint64(9)) + sectors) << np.uint64(9)
    first = (offsets >> np.uint64(bits)).astype(np.int64)
    last = ((ends - np.uint64(1)) >> np.uint64(bits)).astype(np.int64)
    parts = [first]
    while True:
        more = first + len(parts) <= last
        if not more.any():
            return parts
        parts.append(first[more] + len(parts))
