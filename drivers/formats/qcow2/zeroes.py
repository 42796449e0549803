"""Clusters that are marked to read as zeroes become ordinary ones: version 2 has no such mark (spec: "Standard
Cluster Descriptor", bit 0).

Without a backing image an unallocated cluster reads as zeroes too. With one, and where space is allocated behind the
mark, the cluster gets a place at the end of the file, which reads as zeroes without being written. Entries are
changed where they are, in tables that snapshots share too: each one shows the same before and after.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Changes
from safeimg.drivers.formats.metadata import Phase
from safeimg.drivers.formats.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from safeimg.drivers.formats.qcow2.snapshots import read_snapshots

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner

STEP_BYTES = 1 << 20  # of metadata that one step changes, roughly
L1_ENTRIES = 8192  # read at once


def expand_zero_clusters(planner: Qcow2Planner) -> Iterator[Changes]:
    """Changes, each a step of its own, after which no L2 table marks a cluster as zeroes."""
    planner.ready()
    planner.allocator.begin_behind(-(-planner.original_length // planner.cluster_size))
    for table in sorted(_l2_tables(planner)):
        entries = planner.header.l2.decode(planner.view.read(table, planner.cluster_size))
        marked = [index for index, entry in enumerate(entries) if entry & ZERO and not entry & COMPRESSED]
        if not marked:
            continue
        placed = sum(_needs_place(planner, entries[index]) for index in marked)
        if placed:
            yield from _flush(planner)
            changes = planner.reserve(placed)
            if changes:
                yield changes
        _expand(planner, table, {index: entries[index] for index in marked})
        if planner.pending > STEP_BYTES:
            yield from _flush(planner)
    yield from _flush(planner)


def _flush(planner: Qcow2Planner) -> Iterator[Changes]:
    changes = planner.take()
    if changes:
        yield changes


def _needs_place(planner: Qcow2Planner, entry: int) -> bool:
    return planner.header.backing_file is not None or bool(entry & OFFSET_MASK)


def _expand(planner: Qcow2Planner, table: int, marked: dict[int, int]) -> None:
    """Replaces entries, given by index, of the L2 table at `table`."""
    bits, view = planner.header.cluster_bits, planner.view
    users = planner.refcounts.get(table >> bits)
    for index, old_entry in marked.items():
        old, entry = old_entry & OFFSET_MASK, 0
        if _needs_place(planner, old_entry):
            cluster, _ = planner.allocator.allocate(1)
            if users != 1:
                planner.refcounts.set_run(cluster, (users,), Phase.ALLOCATE)
            if planner.on_device:  # what lies behind the end in use is anybody's
                view.fresh(cluster << bits, bytes(planner.cluster_size))
            entry = cluster << bits | (COPIED if users == 1 else 0)
        for _ in range(users if old else 0):
            planner.unlink_clusters(old >> bits, 1)
        view.write(table + 8 * index, entry.to_bytes(8, "big"), Phase.LINK)


def _l2_tables(planner: Qcow2Planner) -> set[int]:
    """Offsets of the L2 tables of the disk and of its snapshots."""
    tables = [(planner.l1_table_offset, planner.l1_size)]
    tables += [
        (snapshot.l1_table_offset, snapshot.l1_size) for snapshot in read_snapshots(planner.file, planner.header)
    ]
    found: set[int] = set()
    for offset, size in tables:
        for start in range(0, size, L1_ENTRIES):
            count = min(L1_ENTRIES, size - start)
            data = planner.view.read(offset + 8 * start, 8 * count)
            found.update(entry & OFFSET_MASK for entry in struct.unpack(f">{count}Q", data))
    found.discard(0)
    for table in found:
        if table % planner.cluster_size or table >= planner.view.length:
            raise FormatError(planner.path, "L2 table is not where a table can be", offset=table)
    return found
