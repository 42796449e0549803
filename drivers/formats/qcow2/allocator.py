"""Free clusters: found first-fit behind a cursor, or made by adding refcount blocks.

A cluster is free if its refcount is zero in the logical state when the cursor passes it. The cursor never
goes back, so nothing is handed out twice and nothing that the operation itself frees is used again. Only
clusters whose refcount block is linked count as free: raising a refcount must not need new metadata in the
same step. Making such blocks is `extend`, whose changes are a step of their own:

    allocate   new blocks, which count themselves or are counted by a linked block; a new table if needed
    link       table entries of the new blocks; or, atomic by itself, the header's switch to the new table

so in every crash state a linked block's own cluster is counted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from safeimg.drivers.errors import FormatError, UnsupportedError
from safeimg.drivers.formats.metadata import MetadataView, Phase
from safeimg.drivers.formats.qcow2.entries import MAX_HOST_OFFSET
from safeimg.drivers.formats.qcow2.header import MAX_REFCOUNT_TABLE_BYTES
from safeimg.drivers.formats.qcow2.refcounts import Refcounts

SCAN_ENTRIES = 4096  # refcounts looked at in one go
MANY_RUNS = 1 << 18  # of free clusters remembered; beyond that, short ones are left alone
SHORT_RUN = 64


class CapacityError(RuntimeError):
    """A plan needs more free clusters than `reserve` made ready: a mistake of the caller, never of the
    image."""


class Allocator:
    """Hands out clusters by number. `switch_table(offset, clusters)` makes the header point to a new refcount
    table (a `link` change) and records the old one as unlinked."""

    def __init__(
        self, view: MetadataView, refcounts: Refcounts, switch_table: Callable[[int, int], None]
    ) -> None:
        self._view = view
        self._refcounts = refcounts
        self._layout = refcounts.layout
        self._switch_table = switch_table
        self._runs: deque[tuple[int, int]] = deque()  # free (first, count), ascending
        self._next = 0  # the next cluster to look at
        self._fresh_from = 0  # free clusters below it are counted by blocks that are linked
        self.available = 0
        self._excluded: set[int] = set()

    def exclude(self, first: int, count: int) -> None:
        """Never hands these clusters out, free or not. Before anything is reserved."""
        counts = self._refcounts.get_run(first, count)
        self._excluded.update(cluster for cluster, value in enumerate(counts, first) if not value)

    def begin_behind(self, cluster: int) -> None:
        """Hands out no cluster below this one. Before anything is reserved."""
        self._next = max(self._next, cluster)

    def reserve(self, clusters: int) -> None:
        """Makes `clusters` available. What that changes in the view is a step of its own."""
        self._scan(lambda: self.available >= clusters)
        if self.available < clusters:
            self.extend(clusters - self.available)

    def reserve_run(self, clusters: int) -> bool:
        """One step towards a free run of `clusters`; False when there is one and nothing was changed."""
        self._scan(lambda: bool(self._runs) and self._runs[-1][1] >= clusters)
        if any(count >= clusters for _first, count in self._runs):
            return False
        # New blocks must not lie in the middle of the new run: first get room for them.
        blocks = -(-clusters // self._layout.block_entries) + 1
        if self.available < blocks:
            self.extend(blocks - self.available)
        else:
            self.extend(clusters)
        return True

    def allocate(self, wanted: int) -> tuple[int, int]:
        """Up to `wanted` consecutive clusters, at least one, as (first, count); their refcounts become 1."""
        if not self._runs:
            raise CapacityError(f"{self._view.path}: no free clusters were reserved")
        first, count = self._runs[0]
        return self._use(0, first, min(count, wanted))

    def allocate_run(self, clusters: int, *, whole: bool = True) -> int:
        """The first of exactly `clusters` consecutive ones, made ready by `reserve_run`; their refcounts
        become 1. The file reaches to their end, unless they need not be `whole`."""
        for index, (first, count) in enumerate(self._runs):
            if count >= clusters:
                return self._use(index, first, clusters, whole=whole)[0]
        raise CapacityError(f"{self._view.path}: no run of {clusters} free clusters was reserved")

    def extend(self, missing: int) -> None:
        """Adds refcount blocks for at least `missing` more free clusters, consecutive if there is room for
        the blocks elsewhere. Call when everything up to the next hole in the refcount table is scanned."""
        entries = self._layout.block_entries
        target = self.available + missing
        self._fresh_from = self._next
        while self.available < target:
            index = self._next // entries
            if index >= self._refcounts.table_entries:
                self._grow_table(target - self.available)
                return
            if self._refcounts.block(index):
                self._scan_block()
            else:
                self._add_block(index)

    def _use(self, index: int, first: int, count: int, *, whole: bool = True) -> tuple[int, int]:
        run_first, run_count = self._runs[index]
        if count == run_count:
            del self._runs[index]
        else:
            self._runs[index] = (run_first + count, run_count - count)
        self.available -= count
        self._check_reach(first + count)
        self._refcounts.set_run(first, (1,) * count, Phase.ALLOCATE)
        if whole:
            self._view.extend((first + count) << self._layout.cluster_bits)
        return first, count

    def _check_reach(self, end: int) -> None:
        if end << self._layout.cluster_bits > MAX_HOST_OFFSET:
            raise UnsupportedError(f"{self._view.path}: the image file grows past 64 PiB")

    # Looking for free clusters

    def _scan(self, enough: Callable[[], bool]) -> None:
        """Moves the cursor until there is enough, or up to the first missing refcount block."""
        while not enough() and self._refcounts.block(self._next // self._layout.block_entries):
            self._scan_block()

    def _scan_block(self) -> None:
        """Looks at the next few refcounts of a block that exists."""
        entries = self._layout.block_entries
        first = self._next
        if first % entries == 0:
            self._check_counted(self._refcounts.block(first // entries) >> self._layout.cluster_bits)
        count = min(SCAN_ENTRIES, entries - first % entries)
        values = self._refcounts.get_run(first, count)
        position = 0
        while position < count:
            if values[position]:
                try:
                    position = values.index(0, position)
                except ValueError:
                    break
            start = position
            while position < count and not values[position] and first + position not in self._excluded:
                position += 1
            if position > start:
                self._add_free(first + start, position - start)
            else:
                position += 1  # excluded
        self._next = first + count

    def _check_counted(self, block: int) -> None:
        if not self._refcounts.get(block):
            raise FormatError(
                self._view.path, "refcount block is not counted as used: run 'qemu-img check -r all'",
                offset=block << self._layout.cluster_bits,
            )

    def _add_free(self, first: int, count: int) -> None:
        if self._runs and sum(self._runs[-1]) == first:
            self._runs[-1] = (self._runs[-1][0], self._runs[-1][1] + count)
        elif len(self._runs) < MANY_RUNS or count >= SHORT_RUN:
            self._runs.append((first, count))
        else:
            return
        self.available += count

    # Making refcount blocks

    def _add_block(self, index: int) -> None:
        """A block for clusters that have none, linked through an entry of the table as it is."""
        entries, bits = self._layout.block_entries, self._layout.cluster_bits
        first = index * entries
        self._check_reach(first + entries)
        counted = bool(self._runs) and self._runs[0][0] < self._fresh_from
        if counted:
            cluster, _ = self.allocate(1)
        else:
            cluster = first
        self._view.fresh(cluster << bits, self._block(0 if counted else 1))
        entry = (cluster << bits).to_bytes(8, "big")
        self._view.write(self._refcounts.table_offset + 8 * index, entry, Phase.LINK)
        self._add_free(first + (0 if counted else 1), entries - (0 if counted else 1))
        self._next = first + entries

    def _grow_table(self, missing: int) -> None:
        """A larger table with new blocks behind it, in the clusters that these blocks count: one switch of
        the header makes all of them live at once, so they may count each other."""
        entries, bits = self._layout.block_entries, self._layout.cluster_bits
        old_entries = self._refcounts.table_entries
        first = old_entries * entries
        blocks = 1
        while True:
            wanted = max(old_entries + blocks, old_entries + old_entries // 2)
            table = -(-8 * wanted // (1 << bits))
            short = table + blocks + missing - blocks * entries
            if short <= 0:
                break
            blocks += -(-short // entries)
        if table << bits > MAX_REFCOUNT_TABLE_BYTES:
            raise UnsupportedError(f"{self._view.path}: the image file outgrows QEMU's refcount tables")
        self._check_reach(first + blocks * entries)
        used = blocks + table
        content = bytearray(self._view.read(self._refcounts.table_offset, 8 * old_entries))
        for number in range(blocks):
            self._view.fresh((first + number) << bits, self._block(min(used, entries)))
            content += ((first + number) << bits).to_bytes(8, "big")
            used = max(0, used - entries)
        self._view.fresh((first + blocks) << bits, bytes(content).ljust(table << bits, b"\0"))
        self._switch_table((first + blocks) << bits, table)
        self._next = first + blocks * entries
        self._add_free(first + blocks + table, blocks * entries - blocks - table)

    def _block(self, used: int) -> bytes:
        """A new refcount block whose first `used` clusters are counted once."""
        empty = bytes(1 << self._layout.cluster_bits)
        if not used:
            return empty
        _start, length = self._layout.span(0, used)
        return self._layout.encode((1,) * used, empty[:length], 0).ljust(len(empty), b"\0")
