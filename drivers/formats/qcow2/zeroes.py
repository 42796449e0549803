"""Clusters that are marked to read as zeroes become ordinary ones: version 2 has no such mark (spec: "Standard
Cluster Descriptor", bit 0).

Without a backing image an unallocated cluster reads as zeroes too. With one, and where space is allocated behind the
mark, the cluster gets a place at the end of the file, which reads as zeroes without being written; in an encrypted
image, encrypted zeroes are written there. Entries are changed where they are, in tables that snapshots share too: each
one shows the same before and after.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Changes, Cipher
from safeimg.drivers.formats.metadata import Phase
from safeimg.drivers.formats.qcow2.entries import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from safeimg.drivers.formats.qcow2.snapshots import read_snapshots

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner

STEP_BYTES = 1 << 20  # of metadata that one step changes, roughly
FRESH_BYTES = 8 << 20  # of encrypted zeroes that one step writes
L1_ENTRIES = 8192  # read at once


def expand_zero_clusters(planner: Qcow2Planner, cipher: Cipher | None) -> Iterator[Changes]:
    """Changes, each a step of its own, after which no L2 table marks a cluster as zeroes.

    `cipher`: the image's. `FormatError` for tables that cannot be read."""
    planner.ready()
    planner.allocator.begin_behind(-(-planner.original_length // planner.cluster_size))
    for table, guest in sorted(_l2_tables(planner).items()):
        entries = planner.header.l2.decode(planner.view.read(table, planner.cluster_size))
        marked = [index for index, entry in enumerate(entries) if entry & ZERO and not entry & COMPRESSED]
        at_once = len(marked) if cipher is None else max(1, FRESH_BYTES // planner.cluster_size)
        for first in range(0, len(marked), at_once or 1):
            chosen = {index: entries[index] for index in marked[first : first + at_once]}
            placed = sum(_needs_place(planner, entry) for entry in chosen.values())
            if placed:
                yield from _flush(planner)
                changes = planner.reserve(placed)
                if changes:
                    yield changes
            places = _expand(planner, table, chosen)
            if cipher is not None and places:
                fresh = [(place, _zeroes(planner, cipher, place, guest, index)) for index, place in places.items()]
                yield planner.take()._replace(fresh=tuple(fresh))
            elif planner.pending > STEP_BYTES:
                yield from _flush(planner)
    yield from _flush(planner)


def _zeroes(planner: Qcow2Planner, cipher: Cipher, place: int, guest: int, index: int) -> bytes:
    """What a cluster holds that reads as zeroes."""
    content = bytearray(planner.cluster_size)
    cipher.encrypt(memoryview(content), place, guest + (index << planner.header.cluster_bits))
    return bytes(content)


def _flush(planner: Qcow2Planner) -> Iterator[Changes]:
    changes = planner.take()
    if changes:
        yield changes


def _needs_place(planner: Qcow2Planner, entry: int) -> bool:
    return planner.header.backing_file is not None or bool(entry & OFFSET_MASK)


def _expand(planner: Qcow2Planner, table: int, marked: dict[int, int]) -> dict[int, int]:
    """Replaces entries, given by index, of the L2 table at `table`. Host offsets of those that got a place."""
    bits, view = planner.header.cluster_bits, planner.view
    places: dict[int, int] = {}
    users = planner.refcounts.get(table >> bits)
    for index, old_entry in marked.items():
        old, entry = old_entry & OFFSET_MASK, 0
        if _needs_place(planner, old_entry):
            cluster, _ = planner.allocator.allocate(1)
            if users != 1:
                planner.refcounts.set_run(cluster, (users,), Phase.ALLOCATE)
            if planner.on_device:  # what lies behind the end in use is anybody's
                view.fresh(cluster << bits, bytes(planner.cluster_size))
            places[index] = cluster << bits
            entry = cluster << bits | (COPIED if users == 1 else 0)
        for _ in range(users if old else 0):
            planner.unlink_clusters(old >> bits, 1)
        view.write(table + 8 * index, entry.to_bytes(8, "big"), Phase.LINK)
    return places


def _l2_tables(planner: Qcow2Planner) -> dict[int, int]:
    """The L2 tables of the disk and of its snapshots: offset, and the guest offset of what each begins with. Tables
    behind the end of the file read as zeroes: nothing is marked there."""
    tables = [(planner.l1_table_offset, planner.l1_size)]
    tables += [
        (snapshot.l1_table_offset, snapshot.l1_size) for snapshot in read_snapshots(planner.file, planner.header)
    ]
    covered = planner.header.l2.entries * planner.cluster_size
    found: dict[int, int] = {}
    for offset, size in tables:
        within = min(size, -(-max(0, planner.view.length - offset) // 8))
        for start in range(0, within, L1_ENTRIES):
            count = min(L1_ENTRIES, within - start)
            data = planner.view.read(offset + 8 * start, 8 * count)
            for index, entry in enumerate(struct.unpack(f">{count}Q", data), start):
                table = entry & OFFSET_MASK
                if table and found.setdefault(table, index * covered) != index * covered:
                    raise FormatError(planner.path, "L2 table is in use at two places", offset=table)
    for table in found:
        if table % planner.cluster_size:
            raise FormatError(planner.path, "L2 table is not where a table can be", offset=table)
    return {table: guest for table, guest in found.items() if table < planner.view.length}
