"""The reporting check: references against refcounts, and the COPIED flags (counters and messages of `qemu-img
check`).

Loaded only when an image is checked: it needs numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from safeimg.drivers.errors import UnsupportedError
from safeimg.drivers.formats.api import CheckResult
from safeimg.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    REFCOUNT_BLOCK_MASK,
    hexadecimal,
)
from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.l2_arrays import Words, descriptors
from safeimg.drivers.formats.qcow2.scan import BUDGET, MAX_OFFSET, Findings, ReferenceScan

Refcounts = NDArray[np.unsignedinteger]


def check(image: Qcow2Image) -> CheckResult:
    """Looks at all metadata, and changes nothing.

    Raises `FormatError` where QEMU could not even open the image (snapshot table, bitmap directory), and
    where the image is too damaged to look at all of it in bounded time."""
    scan = ReferenceScan(image)
    scan.run()
    findings = scan.findings
    comparison = _Comparison(scan)
    comparison.compare()
    comparison.check_copied_flags()
    return CheckResult(
        corruptions=findings.corruptions,
        leaks=findings.leaks,
        check_errors=findings.check_errors,
        image_end_offset=(comparison.highest + 1) << image.header.cluster_bits,
        total_clusters=-(-image.size // image.header.cluster_size),
        allocated_clusters=findings.allocated_clusters,
        fragmented_clusters=findings.fragmented_clusters,
        compressed_clusters=findings.compressed_clusters,
        messages=tuple(findings.messages),
    )


def decode_block(data: bytes, order: int) -> Refcounts:
    """The entries of a refcount block; narrow ones lie in a byte from its lowest bits up."""
    if order >= 3:
        return np.frombuffer(data, f">u{1 << (order - 3)}")
    packed = np.frombuffer(data, np.uint8)
    width = 1 << order
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    entries: Refcounts = ((packed[:, None] >> shifts) & np.uint8((1 << width) - 1)).reshape(-1)
    return entries


class _Comparison:
    """What the refcounts say, against what the scan found."""

    def __init__(self, scan: ReferenceScan) -> None:
        self._scan = scan
        self._header = scan.header
        self._findings: Findings = scan.findings
        self.highest = 0  # the last cluster in use, by its refcount or by reference
        # Refcounts of the file's clusters, those above 254 as 255; unreadable ones are in `_unreadable`.
        try:
            self._small = np.zeros(scan.clusters, np.uint8)
        except MemoryError:
            problem = f"{scan.file.path}: too many clusters to count in bounded memory"
            raise UnsupportedError(problem) from None
        self._unreadable: set[int] = set()  # refcount blocks
        self._blocks: Words = np.zeros(self._header.refcount_table_entries, np.uint64)
        for index, table in scan.read_table(self._header.refcount_table_offset, len(self._blocks)):
            self._blocks[index:index + len(table)] = table & np.uint64(REFCOUNT_BLOCK_MASK)

    def compare(self) -> None:
        entries = self._header.refcount_block_entries
        counts = self._scan.counts
        for start in range(0, self._scan.clusters, entries):
            expected = counts[start:start + entries]
            refcounts = self._read_block(start // entries)
            if refcounts is None:
                self._report_unreadable(start, len(expected))
                continue
            refcounts = refcounts[:len(expected)]
            self._small[start:start + entries] = np.minimum(refcounts, 255)
            used = ((refcounts != 0) | (expected != 0)).nonzero()[0]
            if len(used):
                self.highest = start + int(used[-1])
            for index in (refcounts != expected).nonzero()[0].tolist():
                self._report(start + index, int(refcounts[index]), int(expected[index]))

    def check_copied_flags(self) -> None:
        """The active tables' COPIED flags must be set exactly where the refcount is one."""
        header, findings = self._header, self._findings
        seen: set[int] = set()
        budget = BUDGET
        for first, table in self._scan.read_table(header.l1_table_offset, header.l1_size):
            for index in (table & np.uint64(OFFSET_MASK)).nonzero()[0].tolist():
                entry = int(table[index])
                offset = entry & OFFSET_MASK
                if offset in seen:
                    budget -= header.l2_entries
                seen.add(offset)
                refcount = self._refcount(offset >> header.cluster_bits)
                if refcount is not None and (refcount == 1) != bool(entry & COPIED):
                    findings.corrupt(f"ERROR OFLAG_COPIED L2 cluster: l1_index={first + index} "
                                     f"l1_entry={entry:x} refcount={refcount}")
                if budget > 0:
                    self._check_l2(offset)

    def _check_l2(self, offset: int) -> None:
        header, findings = self._header, self._findings
        for _, words in self._scan.read_l2(offset):
            entries = descriptors(header.l2, words)
            entries = entries[(entries & np.uint64(COMPRESSED)) == 0]
            hosts = entries & np.uint64(OFFSET_MASK)
            entries, hosts = entries[hosts != 0], hosts[hosts != 0]
            clusters = (hosts >> np.uint64(header.cluster_bits)).astype(np.int64)
            inside = clusters < len(self._small)
            refcount_is_one = np.zeros(len(clusters), bool)
            refcount_is_one[inside] = self._small[clusters[inside]] == 1
            if header.has_data_file:
                for entry in entries[entries < np.uint64(COPIED)].tolist():
                    findings.corrupt(f"ERROR OFLAG_COPIED data cluster: l2_entry={entry:x} refcount=1")
                continue
            copied = entries >= np.uint64(COPIED)
            # Those outside the file have refcounts too, unlikely as they are.
            for index in ((refcount_is_one != copied) | ~inside).nonzero()[0].tolist():
                refcount = self._refcount(int(clusters[index]))
                if refcount is not None and (refcount == 1) != bool(copied[index]):
                    findings.corrupt(f"ERROR OFLAG_COPIED data cluster: l2_entry={int(entries[index]):x} "
                                     f"refcount={refcount}")

    def _read_block(self, index: int) -> Refcounts | None:
        """The refcounts in block `index`; None if the table entry is no offset of a block."""
        size = self._header.cluster_size
        offset = int(self._blocks[index]) if index < len(self._blocks) else 0
        if not offset:
            return np.zeros(self._header.refcount_block_entries, np.uint8)
        if offset % size or offset + size > MAX_OFFSET:
            return None
        data = self._scan.file.pread(offset, size) if offset < self._scan.length else b""
        return decode_block(data.ljust(size, b"\0"), self._header.refcount_order)

    def _refcount(self, cluster: int) -> int | None:
        """One refcount, or None if it cannot be read."""
        if cluster < len(self._small) and self._small[cluster] < 255:
            unreadable = cluster // self._header.refcount_block_entries in self._unreadable
            return None if unreadable else int(self._small[cluster])
        index, position = divmod(cluster, self._header.refcount_block_entries)
        block = self._read_block(index)
        return None if block is None else int(block[position])

    def _report(self, cluster: int, refcount: int, references: int) -> None:
        if refcount < references:
            self._findings.corrupt(f"ERROR cluster {cluster} refcount={refcount} reference={references}")
        else:
            self._findings.leaks += 1
            self._findings.say(f"Leaked cluster {cluster} refcount={refcount} reference={references}")

    def _report_unreadable(self, start: int, clusters: int) -> None:
        index = start // self._header.refcount_block_entries
        if not self._unreadable and int(self._blocks[index]) % self._header.cluster_size:
            self._findings.say(
                f"qcow2: Image is corrupt: Refblock offset {int(self._blocks[index]):#x} unaligned (reftable "
                f"index: {hexadecimal(index)}); further non-fatal corruption events will be suppressed"
            )
        self._unreadable.add(index)
        self._findings.check_errors += clusters
        for cluster in range(start, start + clusters):
            self._findings.say(f"Can't get refcount for cluster {cluster}: Input/output error")
