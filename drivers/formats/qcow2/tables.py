"""The active L1 and L2 tables as a writer needs them: every entry is checked before it is relied on.

Spec: docs/interop/qcow2, "Cluster mapping". Changed entries are `link`; new L2 tables are `allocate`. Flags
and refcounts have to agree: what somebody else uses is never taken for exclusively ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.metadata import Phase
from safeimg.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_STANDARD_RESERVED,
    MAX_HOST_OFFSET,
    OFFSET_MASK,
    ZERO,
    decode_compressed,
)

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner

REPAIR = "run 'qemu-img check -r all'"


class ActiveTables:
    """The tables of one planner. Guest and host clusters are given by number."""

    def __init__(self, planner: Qcow2Planner) -> None:
        self._planner = planner
        self._bits = planner.header.cluster_bits
        self._size = planner.header.cluster_size
        self._l2 = planner.header.l2
        self._outside = planner.header.has_data_file
        self._own: dict[int, int] = {}  # L1 index → L2 table known to be exclusively ours

    def forget(self) -> None:
        """There is another L1 table now."""
        self._own.clear()

    def l2_table(self, l1_index: int) -> tuple[int, bool]:
        """An L2 table's host offset (0: none), and whether its entry says that it is exclusively ours."""
        view, at = self._planner.view, self._planner.l1_table_offset + 8 * l1_index
        entry = int.from_bytes(view.read(at, 8), "big")
        offset = entry & OFFSET_MASK
        if offset % self._size or entry & L1_RESERVED or offset >= max(view.length, 1):
            raise FormatError(view.path, f"L1 entry {entry:#x} is invalid", offset=at)
        return offset, bool(entry & COPIED)

    def entries(self, start: int, length: int) -> Sequence[tuple[int, Sequence[int]]]:
        """L2 entries (see `l2`) of a guest range's clusters: (first guest cluster, entries) for each L2 table."""
        per_table, width = self._l2.entries, self._l2.entry_size
        cluster, end = start // self._size, -(-(start + length) // self._size)
        found: list[tuple[int, Sequence[int]]] = []
        while cluster < end and length:
            l1_index, l2_index = divmod(cluster, per_table)
            count = min(end - cluster, per_table - l2_index)
            table, _ = self.l2_table(l1_index)
            entries: Sequence[int] = (0,) * count
            if table:
                entries = self._l2.decode(self._planner.view.read(table + width * l2_index, width * count))
            found.append((cluster, entries))
            cluster += count
        return found

    def prepare(self, cluster: int) -> None:
        """Makes the L2 table that a guest cluster's entry goes to. Before places for data are taken, so that these
        follow each other in the file, as QEMU's do."""
        l1_index = cluster // self._l2.entries
        if l1_index not in self._own:
            self._own_table(l1_index)

    def put(self, cluster: int, entries: Sequence[int]) -> None:
        """Replaces the L2 entries of guest clusters that lie in one L2 table."""
        l1_index, l2_index = divmod(cluster, self._l2.entries)
        table = self._own.get(l1_index) or self._own_table(l1_index)
        at = table + self._l2.entry_size * l2_index
        self._planner.view.write(at, self._l2.encode(entries), Phase.LINK)

    def _own_table(self, l1_index: int) -> int:
        """An L2 table to be changed: the one there, or a new one (a copy if snapshots use the one there)."""
        planner = self._planner
        table, copied = self.l2_table(l1_index)
        if not table or not self.exclusive(table >> self._bits, 1, copied, "L2 table"):
            content = bytes(self._size)
            if table:
                content = planner.view.read(table, self._size)
                planner.unlink_clusters(table >> self._bits, 1)
            table = planner.allocator.allocate(1)[0] << self._bits
            planner.view.fresh(table, content)
            entry = (table | COPIED).to_bytes(8, "big")
            planner.view.write(planner.l1_table_offset + 8 * l1_index, entry, Phase.LINK)
        self._own[l1_index] = table
        return table

    def drop(self, l1_index: int) -> None:
        """The L2 table is used no more; its entries' references are the caller's to unlink."""
        planner = self._planner
        table, copied = self.l2_table(l1_index)
        self.exclusive(table >> self._bits, 1, copied, "L2 table")
        planner.unlink_clusters(table >> self._bits, 1)
        planner.view.write(planner.l1_table_offset + 8 * l1_index, bytes(8), Phase.LINK)
        self._own.pop(l1_index, None)

    def exclusive(self, first: int, count: int, copied: bool, what: str) -> bool:
        """Whether host clusters are used by the active state alone; flag and refcounts have to agree."""
        for cluster, value in enumerate(self._planner.refcounts.get_run(first, count), first):
            if not value or (value == 1) != copied:
                flag = "" if copied else "not "
                problem = f"{what} with refcount {value} is {flag}flagged as copied: {REPAIR}"
                raise FormatError(self._planner.path, problem, offset=cluster << self._bits)
        return copied

    def standard(self, cluster: int, entry: int) -> int:
        """The host cluster (0: none) of a guest cluster's entry that is not compressed."""
        offset = entry & OFFSET_MASK
        bad = entry & L2_STANDARD_RESERVED or offset % self._size
        if self._outside:
            bad = bad or (bool(entry & COPIED or offset) and offset != cluster * self._size)
        else:
            bad = bad or (entry & COPIED and not offset)
        if bad or not self._l2.is_sound(entry) or (entry & ZERO and self._planner.header.version == 2):
            raise self._invalid(cluster, entry)
        return offset >> self._bits

    def reads_zero(self, cluster: int, entry: int) -> int:
        """The subclusters (a mask) of a guest cluster that read as zeroes."""
        if entry & COMPRESSED:
            return 0
        self.standard(cluster, entry)
        allocated, zeroes = self._l2.masks(entry)
        return zeroes if self._planner.header.backing_file is not None else self._l2.every & ~allocated

    def says_zero(self, entry: int) -> int:
        """The subclusters (a mask) that an entry itself calls zero, whatever lies below."""
        return 0 if entry & COMPRESSED else self._l2.masks(entry)[1]

    def unlink(self, cluster: int, entry: int) -> None:
        """Records the references that go with a guest cluster's entry when it is replaced."""
        planner = self._planner
        if self._outside:  # nothing is counted there
            return
        if entry & COMPRESSED:
            first, count = self._compressed(cluster, entry)
            if 0 in planner.refcounts.get_run(first, count):
                problem = f"compressed data with refcount 0: {REPAIR}"
                raise FormatError(planner.path, problem, offset=first << self._bits)
            planner.unlink_clusters(first, count)
        elif host := self.standard(cluster, entry):
            self.exclusive(host, 1, bool(entry & COPIED), "data")
            planner.unlink_clusters(host, 1)

    def _compressed(self, cluster: int, entry: int) -> tuple[int, int]:
        """Host clusters (first, count) that compressed data touches."""
        offset, stored = decode_compressed(entry, self._bits)
        if entry & COPIED or offset >= MAX_HOST_OFFSET or not self._l2.is_sound(entry):
            raise self._invalid(cluster, entry)
        first, last = offset >> self._bits, (offset + stored - 1) >> self._bits
        return first, last - first + 1

    def _invalid(self, cluster: int, entry: int) -> FormatError:
        guest = cluster * self._size
        return FormatError(self._planner.path, f"L2 entry {entry:#x} of guest offset {guest:#x} is invalid")
