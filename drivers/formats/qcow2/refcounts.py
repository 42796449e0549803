"""Reference counts of host clusters (spec: docs/interop/qcow2, "Host cluster management").

`RefcountLayout` is the arithmetic of tables, blocks and entries of every width; `Refcounts` reads and changes
the counts of one image through its `MetadataView`. Clusters are given by number (host offset / cluster size).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.metadata import MetadataView, Phase
from safeimg.drivers.formats.qcow2.entries import REFCOUNT_BLOCK_MASK
from safeimg.drivers.records import NamedTuple

_BATCH = 64 << 10  # bytes of the table that are read at a time
_CODES = {3: "B", 4: "H", 5: "I", 6: "Q"}


class RefcountLayout(NamedTuple):
    """Sizes and positions that follow from the widths of a cluster and of a count."""

    cluster_bits: int
    refcount_order: int  # a count has 1 << refcount_order bits

    @property
    def block_entries(self) -> int:
        """Clusters that one refcount block stands for."""
        return 1 << (self.cluster_bits + 3 - self.refcount_order)

    @property
    def maximum(self) -> int:
        return (1 << (1 << self.refcount_order)) - 1

    def span(self, entry: int, count: int) -> tuple[int, int]:
        """Bytes (offset, length) of a refcount block that hold `count` entries from `entry` on."""
        first = (entry << self.refcount_order) >> 3
        end = (((entry + count) << self.refcount_order) + 7) >> 3
        return first, end - first

    def decode(self, data: bytes, entry: int, count: int) -> Sequence[int]:
        """Counts from `span(entry, count)`'s bytes."""
        if self.refcount_order >= 3:
            return struct.unpack(f">{count}{_CODES[self.refcount_order]}", data)
        # Below a byte, bit 0 of the first entry is the least significant bit.
        bits, per_byte, mask = 1 << self.refcount_order, 8 >> self.refcount_order, self.maximum
        values = [byte >> shift & mask for byte in data for shift in range(0, 8, bits)]
        skip = entry % per_byte
        return values[skip:skip + count]

    def encode(self, values: Sequence[int], data: bytes, entry: int) -> bytes:
        """`span(entry, len(values))`'s bytes with the counts replaced; `data` is what they were."""
        if self.refcount_order >= 3:
            return struct.pack(f">{len(values)}{_CODES[self.refcount_order]}", *values)
        bits, per_byte, mask = 1 << self.refcount_order, 8 >> self.refcount_order, self.maximum
        changed = bytearray(data)
        for index, value in enumerate(values, entry % per_byte):
            byte, shift = index // per_byte, index % per_byte * bits
            changed[byte] = changed[byte] & ~(mask << shift) | value << shift
        return bytes(changed)


class Refcounts:
    """The counts of one image. `table_offset` and `table_entries` follow the header as planned so far."""

    def __init__(
        self, view: MetadataView, layout: RefcountLayout, table_offset: int, table_clusters: int
    ) -> None:
        self._view = view
        self.layout = layout
        self.table_offset = table_offset
        self.table_clusters = table_clusters

    @property
    def table_entries(self) -> int:
        return self.table_clusters << (self.layout.cluster_bits - 3)

    def block(self, index: int) -> int:
        """Host offset of a refcount block, 0 if there is none. `FormatError` if the entry cannot be one."""
        if index >= self.table_entries:
            return 0
        at = self.table_offset + 8 * index
        return self._checked(int.from_bytes(self._view.read(at, 8), "big"), at)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Index and host offset of each refcount block, in the order of the table. `FormatError` as `block`."""
        end = self.table_offset + 8 * self.table_entries
        for start in range(self.table_offset, end, _BATCH):
            data = self._view.read(start, min(_BATCH, end - start))
            if data.count(0) == len(data):
                continue
            for at, (entry,) in zip(range(start, end, 8), struct.iter_unpack(">Q", data), strict=False):
                if entry:
                    yield (at - self.table_offset) // 8, self._checked(entry, at)

    def _checked(self, entry: int, at: int) -> int:
        offset = entry & REFCOUNT_BLOCK_MASK
        if offset % (1 << self.layout.cluster_bits) or entry != offset:
            raise FormatError(self._view.path, f"refcount table entry {entry:#x} is invalid", offset=at)
        if offset >= self._view.length:
            raise FormatError(self._view.path, "refcount block lies past the end of the file", offset=offset)
        return offset

    def get(self, cluster: int) -> int:
        return self.get_run(cluster, 1)[0]

    def get_run(self, cluster: int, count: int) -> Sequence[int]:
        """Counts of consecutive clusters."""
        entries = self.layout.block_entries
        parts: list[Sequence[int]] = []
        while count:
            index, entry = divmod(cluster, entries)
            here = min(count, entries - entry)
            block = self.block(index)
            if block:
                start, length = self.layout.span(entry, here)
                parts.append(self.layout.decode(self._view.read(block + start, length), entry, here))
            else:
                parts.append((0,) * here)
            cluster, count = cluster + here, count - here
        return parts[0] if len(parts) == 1 else [value for part in parts for value in part]

    def set_run(self, cluster: int, values: Sequence[int], phase: Phase) -> None:
        """Replaces the counts of consecutive clusters. Their refcount blocks must exist."""
        entries = self.layout.block_entries
        done = 0
        while done < len(values):
            index, entry = divmod(cluster + done, entries)
            here = min(len(values) - done, entries - entry)
            block = self.block(index)
            if not block:
                raise RuntimeError(f"{self._view.path}: cluster {cluster + done:#x} has no refcount block")
            start, length = self.layout.span(entry, here)
            old = self._view.read(block + start, length)
            self._view.write(block + start, self.layout.encode(values[done:done + here], old, entry), phase)
            done += here

    def lower_run(self, cluster: int, count: int, phase: Phase) -> list[tuple[int, int]]:
        """Takes one reference from each of consecutive clusters; zero stays zero.

        Returns runs (cluster, count) that reach zero."""
        freed: list[tuple[int, int]] = []
        while count:
            here = min(count, self.layout.block_entries - cluster % self.layout.block_entries, 4096)
            old = self.get_run(cluster, here)
            if any(old):
                self.set_run(cluster, [value - 1 if value else 0 for value in old], phase)
            for position, value in enumerate(old, cluster):
                if value == 1:
                    add_run(freed, position, 1)
            cluster, count = cluster + here, count - here
        return freed


def add_run(runs: list[tuple[int, int]], first: int, count: int) -> None:
    """Appends a run (first, count), joined to the last one if it continues it."""
    if runs and runs[-1][0] + runs[-1][1] == first:
        runs[-1] = (runs[-1][0], runs[-1][1] + count)
    else:
        runs.append((first, count))
