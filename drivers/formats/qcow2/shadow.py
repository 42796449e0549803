"""A live image's metadata made anew beside the old, and switched to at once (DESIGN, hazard 15).

The COPIED flags of the active tables say which refcounts are one. Neither can change before the other: so a snapshot
command writes new tables, and new refcount blocks wherever a count changes, into space that the old refcounts have as
free; one sector of the header makes all of it live, or none. Nothing of the old is written to. What the new refcounts
have as free the old state may still use, until the operation is settled.

Counts are one array over all clusters of the file (four bytes each): time and memory are linear in its size.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from safeimg.drivers.errors import FormatError, RefusedError, UnsupportedError
from safeimg.drivers.formats.api import Changes
from safeimg.drivers.formats.qcow2.check import decode_block
from safeimg.drivers.formats.qcow2.entries import MAX_HOST_OFFSET
from safeimg.drivers.formats.qcow2.header import MAX_REFCOUNT_TABLE_BYTES
from safeimg.drivers.formats.qcow2.pieces import Pieces
from safeimg.drivers.formats.qcow2.references import count_below, encode_block
from safeimg.drivers.formats.qcow2.rewrite import current_header
from safeimg.drivers.formats.qcow2.scan import MAX_CLUSTERS
from safeimg.drivers.formats.qcow2.tables import REPAIR

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner

Counts = NDArray[np.int32]
Clusters = NDArray[np.int64]

MAX_COUNT = 1 << 30  # more references than any image has; sums stay far below the array's limit
MANY_RUNS = 1 << 18  # of freed clusters remembered: what is not stays allocated in the file system
SCAN = 1 << 20  # clusters looked at in one go


class Shadow:
    """The refcounts as they will be, and the new structures. Implements `references.Counting`.

    Order of use: `count`, `check`, then `place`, `drop` and `write`, at last `switch`. Clusters are given by number
    unless it says offset."""

    def __init__(self, planner: Qcow2Planner) -> None:
        planner.ready()
        self._planner = planner
        self._bits = planner.header.cluster_bits
        self._layout = planner.layout
        self._blocks = self._find_blocks()  # index in the table → the block's cluster
        self._counts: Counts = np.zeros(0, np.int32)
        clusters = -(-planner.view.length >> self._bits)
        self._reach(max(clusters, (max(self._blocks, default=0) + 1) * self._layout.block_entries))
        for index in self._blocks:
            self._slice(index)[:] = self._old(index)
        self._free = self._find_free()  # [first, end) of clusters that the old state does not use, in order
        self._pieces = Pieces()

    # References

    def count(self, tables: Mapping[tuple[int, int], int]) -> None:
        """Everything below L1 tables, given as (offset, entries), gets so many references more (or less)."""
        count_below(self._planner, self, tables)

    def is_readable(self, offset: int, length: int, cluster_bits: int) -> bool:
        return True

    def add_range(self, offset: int, length: int, cluster_bits: int, times: int = 1) -> None:
        if length:
            first, last = offset >> cluster_bits, (offset + length - 1) >> cluster_bits
            self._check_end(last)
            self._counts[first:last + 1] += np.int32(times)

    def add_many(self, clusters: NDArray[np.uint64] | Clusters, cluster_bits: int, times: int) -> None:
        if not len(clusters):
            return
        numbers: Clusters = clusters.astype(np.int64)
        self._check_end(int(numbers.max()))
        steps = np.diff(numbers)
        if (steps == 1).all():
            self._counts[int(numbers[0]):int(numbers[-1]) + 1] += np.int32(times)
        elif (steps > 0).all():
            self._counts[numbers] += np.int32(times)
        else:
            np.add.at(self._counts, numbers, np.int32(times))

    def drop(self, offset: int, length: int, times: int = 1) -> None:
        """References to the clusters of an old structure go."""
        self.add_range(offset, length, self._bits, -times)

    def exclusive(self, clusters: Clusters) -> NDArray[np.bool_]:
        """Which of these clusters have one reference only."""
        if len(clusters):
            self._check_end(int(clusters.max()))
        only: NDArray[np.bool_] = self._counts[clusters] == 1
        return only

    def check(self) -> None:
        """Raises `FormatError` if the image's refcounts cannot be right, and `RefusedError` if the new ones do not
        fit. Before anything is placed."""
        for index in range(-(-len(self._counts) // self._layout.block_entries)):
            new = self._slice(index)
            old = self._old(index) if index in self._blocks else np.zeros(1, np.int32)
            if ((new < 0) | (old == 0) & (new > 0)).any():
                raise FormatError(self._planner.path, f"refcounts are too low: {REPAIR}")
            if len(new) and int(new.max()) > self._layout.maximum:
                problem = f"a refcount does not fit into {1 << self._layout.refcount_order} bits"
                raise RefusedError(self._planner.path, problem, errno=errno.EINVAL)

    # New structures

    def place(self, clusters: int, times: int = 1) -> int:
        """The offset of consecutive clusters for a new structure that has so many references."""
        for number, (first, end) in enumerate(self._free):
            if end - first >= clusters:
                if end - first == clusters:
                    del self._free[number]
                else:
                    self._free[number] = (first + clusters, end)
                break
        else:
            raise AssertionError("the last run has no end")
        if first + clusters << self._bits > MAX_HOST_OFFSET:
            raise UnsupportedError(f"{self._planner.path}: the image file grows past 64 PiB")
        self._reach(first + clusters)
        self._counts[first:first + clusters] = times
        self._planner.view.extend(first + clusters << self._bits)
        return first << self._bits

    def write(self, offset: int, content: bytes) -> Iterator[Changes]:
        """Puts a new structure into its place, up to the end of its last cluster; a step, if enough has come
        together for one."""
        content = content.ljust(-(-len(content) >> self._bits) << self._bits, b"\0")
        if self._pieces.add(offset, content):
            yield self._take()

    def switch(self, **fields: int) -> Iterator[Changes]:
        """New refcount blocks and a table for them; the last of the changes makes everything new live, and changes
        the header's `fields` with it."""
        planner = self._planner
        old = planner.refcounts
        self.drop(old.table_offset, old.table_clusters << self._bits)
        changed = self._place_blocks()
        table = np.zeros(self._table_clusters << (self._bits - 3), ">u8")
        for index, cluster in {**self._blocks, **changed}.items():
            table[index] = cluster << self._bits
        for index, cluster in sorted(changed.items(), key=lambda item: item[1]):
            yield from self.write(cluster << self._bits, self._encode(index))
        yield from self.write(self._table, table.tobytes())
        planner.note_freed(self._freed(changed))
        fields |= {"refcount_table_offset": self._table, "refcount_table_clusters": self._table_clusters}
        planner.switch(**fields)
        planner.header = current_header(planner)
        planner.restart(self._table, self._table_clusters)
        planner.restart_tables(planner.header.l1_table_offset, planner.header.l1_size)
        yield self._take()

    def _take(self) -> Changes:
        return self._planner.take()._replace(fresh=self._pieces.take())

    # Refcount blocks

    def _find_blocks(self) -> dict[int, int]:
        found = {index: block >> self._bits for index, block in self._planner.refcounts.blocks()}
        if len(set(found.values())) < len(found):
            raise FormatError(self._planner.path, f"a refcount block is in use twice: {REPAIR}")
        return found

    def _old(self, index: int) -> Counts:
        data = self._planner.view.read(self._blocks[index] << self._bits, 1 << self._bits)
        counts = decode_block(data, self._layout.refcount_order)
        if int(counts.max()) > MAX_COUNT:
            raise FormatError(self._planner.path, f"a refcount is too large: {REPAIR}", errno=errno.EINVAL)
        narrowed: Counts = counts.astype(np.int32)
        return narrowed

    def _slice(self, index: int) -> Counts:
        entries = self._layout.block_entries
        return self._counts[index * entries:(index + 1) * entries]

    def _reach(self, clusters: int) -> None:
        """The array covers so many clusters, rounded up to whole refcount blocks."""
        entries = self._layout.block_entries
        if clusters <= len(self._counts):
            return
        wanted = -(-max(clusters, len(self._counts) * 9 // 8) // entries) * entries
        if wanted - entries > MAX_CLUSTERS:
            raise UnsupportedError(f"{self._planner.path}: too many clusters to count in bounded memory")
        grown = np.zeros(wanted, np.int32)
        grown[:len(self._counts)] = self._counts
        self._counts = grown

    def _check_end(self, cluster: int) -> None:
        if cluster >= len(self._counts):
            # QEMU makes refcount blocks for it, and gives up after that, or because no table would have room for them.
            most = MAX_REFCOUNT_TABLE_BYTES // 8 * self._layout.block_entries
            raise FormatError(
                self._planner.path, "metadata refers to a cluster past the end of the file",
                offset=cluster << self._bits, errno=errno.EFBIG if cluster >= most else errno.EAGAIN,
            )

    def _find_free(self) -> deque[tuple[int, int]]:
        runs: list[tuple[int, int]] = []
        for start in range(0, len(self._counts), SCAN):
            used = (self._counts[start:start + SCAN] != 0).astype(np.int8)
            edges = np.flatnonzero(np.diff(used, prepend=1, append=1)) + start
            for first, end in edges.reshape(-1, 2).tolist():
                if runs and runs[-1][1] == first:
                    runs[-1] = (runs[-1][0], end)
                elif len(runs) < MANY_RUNS:
                    runs.append((first, end))
        end = len(self._counts)
        runs.append((runs.pop()[0] if runs and runs[-1][1] == end else end, 1 << 62))
        return deque(runs)

    def _place_blocks(self) -> dict[int, int]:
        """Places for the table and for every block whose counts change; that changes counts, too."""
        entries = self._layout.block_entries
        waiting = deque(
            index for index in range(-(-len(self._counts) // entries)) if not self._unchanged(index)
        )
        placed: dict[int, int] = {}
        # No more blocks than that, even if each is new and lies behind everything else.
        most, clusters = 0, self._planner.refcounts.table_clusters
        while (blocks := -(-(self._free[-1][0] + most + clusters) // entries)) > most:
            most = blocks
            clusters = max(clusters, -(-most >> (self._bits - 3)))
        if clusters << self._bits > MAX_REFCOUNT_TABLE_BYTES:
            raise UnsupportedError(f"{self._planner.path}: the image file outgrows QEMU's refcount tables")
        self._table_clusters = clusters
        self._table = self.place(clusters)
        first = self._table >> self._bits
        waiting.extend(range(first // entries, (first + clusters - 1) // entries + 1))
        while waiting:
            index = waiting.popleft()
            if index in placed:
                continue
            placed[index] = self.place(1) >> self._bits
            waiting.append(placed[index] // entries)
            if index in self._blocks:
                self.drop(self._blocks[index] << self._bits, 1)
                waiting.append(self._blocks[index] // entries)
        return placed

    def _unchanged(self, index: int) -> bool:
        new = self._slice(index)
        if index not in self._blocks:
            return not new.any()
        return bool((new == self._old(index)).all())

    def _encode(self, index: int) -> bytes:
        new = self._slice(index)
        if int(new.min()) < 0 or int(new.max()) > self._layout.maximum:
            raise FormatError(self._planner.path, f"refcounts are too low: {REPAIR}")
        return encode_block(new, self._layout.refcount_order)

    def _freed(self, changed: Mapping[int, int]) -> list[tuple[int, int]]:
        """Clusters (first, count) that lose their last reference."""
        runs: list[tuple[int, int]] = []
        for index in sorted(changed.keys() & self._blocks.keys()):
            gone = ((self._slice(index) == 0) & (self._old(index) != 0)).astype(np.int8)
            edges = np.flatnonzero(np.diff(gone, prepend=0, append=0)) + index * self._layout.block_entries
            for first, end in edges.reshape(-1, 2).tolist():
                if len(runs) < MANY_RUNS:
                    runs.append((first, end - first))
        return runs
