"""New refcount structures for an image whose old ones are broken, laid out as QEMU lays them out: each block in the
first free cluster from those on that it counts, the table in the first free run.

Works on the draft of a file: what references were counted decides, not what the old structures say. Needs numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from safeimg.drivers.errors import CheckFailed
from safeimg.drivers.formats.qcow2.header import MAX_REFCOUNT_TABLE_BYTES, Header
from safeimg.drivers.formats.qcow2.references import encode_block
from safeimg.drivers.formats.qcow2.scan import MAX_CLUSTERS
from safeimg.drivers.storage.draft import DraftFile

Counts = NDArray[np.uint32]


def new_refcounts(draft: DraftFile, header: Header, references: Counts) -> Header:
    """Writes blocks and table for the `references` (and themselves) into unreferenced space. The header as it has to
    become for them, which is not written. Raises `CheckFailed` if the image is too large."""
    return _Structures(draft, header, references).write()


class _Structures:
    def __init__(self, draft: DraftFile, header: Header, references: Counts) -> None:
        self._draft = draft
        self._header = header
        self._entries = header.refcount_block_entries
        self._counts = references.copy()
        self._blocks: dict[int, int] = {}  # index → cluster

    def write(self) -> Header:
        header, size = self._header, self._header.cluster_size
        self._place_blocks(0, len(self._counts))
        while True:
            clusters = -(-8 * (max(self._blocks) + 1) // size)
            if clusters * size > MAX_REFCOUNT_TABLE_BYTES:
                raise CheckFailed("File too large", problem="ERROR allocating reftable")
            table = self._allocate(clusters, 0)
            self._place_blocks(table, table + clusters)
            if 8 * (max(self._blocks) + 1) <= clusters * size:
                break
        content = bytearray(clusters * size)
        for index, cluster in sorted(self._blocks.items()):
            counts = self._counts[index * self._entries:(index + 1) * self._entries].astype(np.uint64)
            counts = np.append(counts, np.zeros(self._entries - len(counts), np.uint64))
            self._draft.pwrite(cluster * size, encode_block(counts, header.refcount_order))
            content[8 * index:8 * index + 8] = (cluster * size).to_bytes(8, "big")
        self._draft.pwrite(table * size, content)
        return header._replace(refcount_table_offset=table * size, refcount_table_clusters=clusters)

    def _place_blocks(self, first: int, end: int) -> None:
        """Blocks for whatever is in use in these clusters, and for the clusters of new blocks."""
        free, index = 0, first // self._entries
        while index * self._entries < end:
            start = max(index * self._entries, first)
            used = self._counts[start:min((index + 1) * self._entries, end)].any()
            if used and index not in self._blocks:
                free = max(free, index * self._entries)
                cluster = free = self._allocate(1, free)
                self._blocks[index] = cluster
                end = max(end, cluster + 1)
            index += 1

    def _allocate(self, clusters: int, start: int) -> int:
        """The first free run of clusters from `start` on; in use from now on."""
        found = self._find(clusters, start)
        end = found + clusters
        if end > MAX_CLUSTERS:
            raise CheckFailed("File too large", problem="ERROR allocating refblock")
        if end > len(self._counts):
            self._counts = np.append(self._counts, np.zeros(end - len(self._counts), np.uint32))
        self._counts[found:end] = 1
        return found

    def _find(self, clusters: int, start: int) -> int:
        if start >= len(self._counts):
            return start
        used = np.append(self._counts[start:].nonzero()[0], len(self._counts) - start)
        before = np.append(-1, used[:-1])
        gaps = (used - before - 1 >= clusters).nonzero()[0]
        if len(gaps):
            return start + int(before[gaps[0]]) + 1
        in_use = self._counts[start:].nonzero()[0]  # the last gap goes on behind the end
        return start + (int(in_use[-1]) + 1 if len(in_use) else 0)
