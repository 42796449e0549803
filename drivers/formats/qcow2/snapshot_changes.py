"""Taking, applying and deleting internal snapshots (spec: QEMU's qcow2, "Snapshots").

Each is one switch of the header, to a snapshot table, refcounts and, where flags or the disk itself change, active
tables that were made beside the old ones (`shadow`).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safeimg.drivers.errors import FormatError, RefusedError
from safeimg.drivers.formats.api import Changes
from safeimg.drivers.formats.qcow2.entries import COMPRESSED, COPIED, L1_RESERVED, OFFSET_MASK
from safeimg.drivers.formats.qcow2.header import MAX_L1_BYTES
from safeimg.drivers.formats.qcow2.l2_arrays import descriptors
from safeimg.drivers.formats.qcow2.shadow import Shadow
from safeimg.drivers.formats.qcow2.snapshots import (
    MAX_NAME,
    MAX_TABLE_BYTES,
    Snapshot,
    encode_snapshots,
    read_snapshots,
)

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner

Words = NDArray[np.uint64]

_OFFSET, _COPIED = np.uint64(OFFSET_MASK), np.uint64(COPIED)


def create(planner: Qcow2Planner, name: str, seconds: int, nanoseconds: int) -> Iterator[Changes]:
    """See `features.Snapshotting`. QEMU cuts names after 255 bytes, and so it is done here. What only the snapshot has
    comes first in the file, as with QEMU."""
    header = planner.header
    snapshots = read_snapshots(planner.file, header)
    shadow = Shadow(planner)
    active = planner.l1_table_offset, planner.l1_size
    shadow.count({active: 1})
    shadow.check()
    copy = _place_table(planner, shadow, planner.l1_size)
    new = Snapshot(
        copy, planner.l1_size, _next_id(snapshots), os.fsdecode(os.fsencode(name)[:MAX_NAME]), seconds, nanoseconds,
        0, 0, planner.current_size, 0, b"", 0, 0, 0,
    )
    table = yield from _snapshot_table(planner, shadow, snapshots, [*snapshots, new])
    entries = yield from _tables(planner, shadow, _l1(planner, *active), 2)
    yield from shadow.write(copy, _encode(entries & ~_COPIED))
    l1 = _place_table(planner, shadow, len(entries))
    yield from shadow.write(l1, _encode(entries))
    shadow.drop(active[0], 8 * active[1])
    yield from shadow.switch(l1_table_offset=l1, **table)


def apply(planner: Qcow2Planner, snapshot: Snapshot) -> Iterator[Changes]:
    """See `features.Snapshotting`."""
    header = planner.header
    size = planner.current_size if snapshot.disk_size == planner.current_size else snapshot.disk_size
    if size != planner.current_size and header.version == 2:
        problem = "Can't resize a v2 image which has snapshots"
        raise RefusedError(planner.path, problem, errno=errno.ENOTSUP, explain=True)
    shadow = Shadow(planner)
    active = planner.l1_table_offset, planner.l1_size
    entries = np.zeros(max(active[1], snapshot.l1_size), np.uint64)
    if size % 512 or 8 * len(entries) > MAX_L1_BYTES or -(-size // header.l2_coverage) > len(entries):
        raise RefusedError(planner.path, "the snapshot's L1 table is too small", errno=errno.EINVAL)
    saved = snapshot.l1_table_offset, snapshot.l1_size
    entries[:saved[1]] = _l1(planner, *saved)
    if saved != active:
        shadow.count({saved: 1, active: -1})
    shadow.check()
    entries = yield from _tables(planner, shadow, entries, 1)
    l1 = _place_table(planner, shadow, len(entries))
    yield from shadow.write(l1, _encode(entries))
    shadow.drop(active[0], 8 * active[1])
    fields = {} if size == planner.current_size else {"size": size}
    yield from shadow.switch(l1_table_offset=l1, l1_size=len(entries), **fields)
    planner.current_size = planner.size = size


def delete(planner: Qcow2Planner, snapshot: Snapshot) -> Iterator[Changes]:
    """See `features.Snapshotting`."""
    snapshots = read_snapshots(planner.file, planner.header)
    kept = [entry for entry in snapshots if entry != snapshot]
    shadow = Shadow(planner)
    saved = snapshot.l1_table_offset, snapshot.l1_size
    shadow.count({saved: -1})
    shadow.drop(saved[0], 8 * saved[1])
    shadow.check()
    active = planner.l1_table_offset, planner.l1_size
    old = _l1(planner, *active)
    entries = yield from _tables(planner, shadow, old, 1)
    fields = {}
    if (entries != old).any():
        fields["l1_table_offset"] = _place_table(planner, shadow, len(entries))
        yield from shadow.write(fields["l1_table_offset"], _encode(entries))
        shadow.drop(active[0], 8 * active[1])
    table = yield from _snapshot_table(planner, shadow, snapshots, kept)
    yield from shadow.switch(**fields, **table)


def _l1(planner: Qcow2Planner, offset: int, size: int) -> Words:
    """An L1 table's entries without their flags."""
    words = np.frombuffer(planner.view.read(offset, 8 * size), ">u8").astype(np.uint64)
    offsets: Words = words & _OFFSET
    if (words & np.uint64(L1_RESERVED)).any() or (offsets & np.uint64(planner.cluster_size - 1)).any():
        raise FormatError(planner.path, "L1 table has invalid entries", offset=offset)
    return offsets


def _encode(words: Words) -> bytes:
    return words.astype(">u8").tobytes()


def _place_table(planner: Qcow2Planner, shadow: Shadow, entries: int) -> int:
    """A table of no entries has its place where the active one is: it takes none."""
    return shadow.place(-(-8 * entries // planner.cluster_size)) if entries else planner.l1_table_offset


def _tables(
    planner: Qcow2Planner, shadow: Shadow, l1: Words, times: int
) -> Generator[Changes, None, Words]:
    """The entries of the active L1 table that leads to what `l1` (without flags) does, every COPIED flag below it
    right. L2 tables in which a flag is not are made anew. `times`: so many L1 tables with these entries there will
    be."""
    entries = l1.copy()
    for offset, found in zip(*(part.tolist() for part in np.unique(l1[l1 != 0], return_counts=True)), strict=True):
        table = _flagged(planner, shadow, offset)
        if table is None:
            continue
        new = shadow.place(1, found * times)
        shadow.drop(offset, 1, found * times)
        yield from shadow.write(new, _encode(table))
        entries[l1 == np.uint64(offset)] = new
    used = entries != 0
    only = shadow.exclusive((entries[used] >> np.uint64(planner.header.cluster_bits)).astype(np.int64))
    entries[used] |= np.where(only, _COPIED, np.uint64(0))
    return entries


def _flagged(planner: Qcow2Planner, shadow: Shadow, offset: int) -> Words | None:
    """An L2 table with the right COPIED flags; None if it has those already."""
    words = np.frombuffer(planner.view.read(offset, planner.cluster_size), ">u8").astype(np.uint64)
    found = descriptors(planner.header.l2, words)
    standard = ((found & np.uint64(COMPRESSED)) == 0) & ((found & _OFFSET) != 0)
    old = found[standard]
    hosts = ((old & _OFFSET) >> np.uint64(planner.header.cluster_bits)).astype(np.int64)
    new = old & ~_COPIED | np.where(shadow.exclusive(hosts), _COPIED, np.uint64(0))
    if (new == old).all():
        return None
    found[standard] = new  # `found` is a part of `words`
    return words


def _snapshot_table(
    planner: Qcow2Planner, shadow: Shadow, old: Sequence[Snapshot], new: Sequence[Snapshot]
) -> Generator[Changes, None, dict[str, int]]:
    """The new snapshot table instead of the old; the header's fields for it."""
    if old:
        start = planner.header.snapshots_offset
        shadow.drop(start, old[-1].offset + old[-1].length - start)
    if not new:
        return {"nb_snapshots": 0, "snapshots_offset": 0}
    table = encode_snapshots(new)
    if len(table) > MAX_TABLE_BYTES:
        raise RefusedError(planner.path, "the snapshot table is too large", errno=errno.EFBIG)
    offset = shadow.place(-(-len(table) // planner.cluster_size))
    yield from shadow.write(offset, table)
    return {"nb_snapshots": len(new), "snapshots_offset": offset}


def _next_id(snapshots: Sequence[Snapshot]) -> str:
    """One more than the highest: QEMU's ids are numbers, and of any others it takes the digits in front."""
    numbers = [re.match(r"\s*\+?(\d*)", entry.id) for entry in snapshots]
    return str(max((int(found[1] or 0) for found in numbers if found), default=0) + 1)
