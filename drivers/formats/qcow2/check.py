"""The reporting check: references against refcounts, and the COPIED flags (counters and messages of `qemu-img
check`).

Loaded only when an image is checked: it needs numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from safeimg.drivers.errors import CheckFailed, UnsupportedError
from safeimg.drivers.formats.api import CheckResult
from safeimg.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    REFCOUNT_BLOCK_MASK,
    hexadecimal,
)
from safeimg.drivers.formats.qcow2.findings import Findings
from safeimg.drivers.formats.qcow2.header import parse_header
from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.l2_arrays import Words, descriptors
from safeimg.drivers.formats.qcow2.references import encode_block
from safeimg.drivers.formats.qcow2.scan import BUDGET, MAX_OFFSET, ReferenceScan
from safeimg.drivers.formats.qcow2.snapshot_repair import read_table

Refcounts = NDArray[np.unsignedinteger]


def check(image: Qcow2Image) -> CheckResult:
    """Looks at all metadata, and changes nothing.

    Raises `CheckFailed` where QEMU has no answer either, and `FormatError` where it could not even open the image
    (bitmap directory), and where the image is too damaged to look at all of it in bounded time."""
    parse_header(image.file, snapshots=False)  # not one that is still being made
    findings = Findings()
    table = read_table(image, findings, fix=False)
    scan = ReferenceScan(image, findings)
    scan.run(table.snapshots)
    comparison = Comparison(scan)
    comparison.compare()
    comparison.check_copied_flags()
    return result(image, findings, comparison.highest)


def result(image: Qcow2Image, findings: Findings, highest: int) -> CheckResult:
    """`highest`: the last cluster in use."""
    return CheckResult(
        corruptions=findings.corruptions,
        leaks=findings.leaks,
        check_errors=findings.check_errors,
        corruptions_fixed=findings.corruptions_fixed,
        leaks_fixed=findings.leaks_fixed,
        image_end_offset=(highest + 1) << image.header.cluster_bits,
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


class Comparison:
    """What the refcounts say, against what the scan found. Repairs are written to the scan's file."""

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

    def compare(self, *, fix_errors: bool = False, fix_leaks: bool = False) -> bool:
        """Reports, or repairs, every refcount that is wrong. False if a cluster that is in use has none: then new
        refcounts have to be made, and repairing them is of no use."""
        sound = True
        entries = self._header.refcount_block_entries
        counts = self._scan.counts
        for start in range(0, self._scan.clusters, entries):
            expected = counts[start:start + entries]
            refcounts = self._read_block(start // entries)
            if refcounts is None:
                self._report_unreadable(start, len(expected))
                continue
            refcounts = refcounts[:len(expected)]
            used = ((refcounts != 0) | (expected != 0)).nonzero()[0]
            if len(used):
                self.highest = start + int(used[-1])
            wrong = (refcounts != expected).nonzero()[0]
            if len(wrong):
                sound = sound and bool(refcounts[wrong].all() or not expected[wrong[refcounts[wrong] == 0]].any())
                for index in wrong.tolist():
                    self._report(start + index, int(refcounts[index]), int(expected[index]), fix_errors, fix_leaks)
                chosen = wrong[self._repaired(refcounts[wrong], expected[wrong], fix_errors, fix_leaks)]
                if len(chosen):
                    refcounts = self._write(start // entries, chosen, expected[chosen])[:len(expected)]
            self._small[start:start + entries] = np.minimum(refcounts, 255)
        return sound

    @staticmethod
    def _repaired(
        refcounts: Refcounts, expected: NDArray[np.uint32], fix_errors: bool, fix_leaks: bool
    ) -> NDArray[np.bool_]:
        """Which of these wrong refcounts a repair sets right."""
        too_low = (refcounts < expected) & (refcounts != 0)
        chosen: NDArray[np.bool_] = (too_low & fix_errors) | ((refcounts > expected) & fix_leaks)
        return chosen

    def _write(self, block: int, chosen: NDArray[np.intp], values: NDArray[np.uint32]) -> Refcounts:
        """Sets refcounts, given by their indexes in a block; all of the block's."""
        found = self._read_block(block)
        assert found is not None
        refcounts = found.astype(np.uint64)
        refcounts[chosen] = values
        self._scan.file.pwrite(int(self._blocks[block]), encode_block(refcounts, self._header.refcount_order))
        return refcounts

    def allocate(self, clusters: int) -> int:
        """The first of so many free clusters in a row; their refcounts become 1. Raises `CheckFailed` where that would
        take more refcount blocks."""
        used = np.append(self._small.nonzero()[0], len(self._small))
        before = np.append(-1, used[:-1])
        gaps = (used - before - 1 >= clusters).nonzero()[0]
        last = int(used[-2]) + 1 if len(used) > 1 else 0  # the last gap goes on behind the end
        first = int(before[gaps[0]]) + 1 if len(gaps) else last
        self._add(first, clusters, 1)
        return first

    def free(self, first: int, clusters: int) -> None:
        """Takes a reference from clusters, as far as they have any."""
        self._add(first, min(clusters, len(self._small) - first), -1)

    def _add(self, first: int, clusters: int, change: int) -> None:
        for cluster in range(first, first + clusters):
            refcount = self._refcount(cluster)
            index, position = divmod(cluster, self._header.refcount_block_entries)
            if refcount is None or index >= len(self._blocks) or not self._blocks[index]:
                raise CheckFailed("No space left on device")
            value = max(refcount + change, 0)
            self._write(index, np.array([position]), np.array([value], np.uint32))
            if cluster < len(self._small):
                self._small[cluster] = min(value, 255)

    def check_copied_flags(self, *, fix: bool = False) -> None:
        """The active tables' COPIED flags must be set exactly where the refcount is one."""
        header = self._header
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
                    self._flag(
                        f"OFLAG_COPIED L2 cluster: l1_index={first + index} l1_entry={entry:x} refcount={refcount}",
                        header.l1_table_offset + 8 * (first + index), entry, fix,
                    )
                if budget > 0:
                    self._check_l2(offset, fix)

    def _flag(self, problem: str, at: int, entry: int, fix: bool) -> None:
        """A COPIED flag that is wrong, in the table entry at `at`."""
        if not fix:
            self._findings.corrupt(f"ERROR {problem}")
            return
        self._findings.corrected(f"Repairing {problem}")
        self._scan.file.pwrite(at, (entry ^ COPIED).to_bytes(8, "big"))

    def _check_l2(self, offset: int, fix: bool) -> None:
        header = self._header
        for first, words in self._scan.read_l2(offset):
            entries = descriptors(header.l2, words)
            numbers = np.arange(first, first + len(entries))
            standard = ((entries & np.uint64(COMPRESSED)) == 0) & ((entries & np.uint64(OFFSET_MASK)) != 0)
            entries, numbers = entries[standard], numbers[standard]
            hosts = entries & np.uint64(OFFSET_MASK)
            clusters = (hosts >> np.uint64(header.cluster_bits)).astype(np.int64)
            inside = clusters < len(self._small)
            refcount_is_one = np.zeros(len(clusters), bool)
            refcount_is_one[inside] = self._small[clusters[inside]] == 1
            if header.has_data_file:  # whose clusters have no refcounts, and are nobody else's
                refcount_is_one[:] = inside[:] = True
            copied = entries >= np.uint64(COPIED)
            # Those outside the file have refcounts too, unlikely as they are.
            for index in ((refcount_is_one != copied) | ~inside).nonzero()[0].tolist():
                refcount = 1 if header.has_data_file else self._refcount(int(clusters[index]))
                if refcount is not None and (refcount == 1) != bool(copied[index]):
                    entry = int(entries[index])
                    self._flag(
                        f"OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={refcount}",
                        offset + int(numbers[index]) * header.l2.entry_size, entry, fix,
                    )

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

    def _report(self, cluster: int, refcount: int, references: int, fix_errors: bool, fix_leaks: bool) -> None:
        findings = self._findings
        problem = f"cluster {cluster} refcount={refcount} reference={references}"
        if refcount < references and not (fix_errors and refcount):
            findings.corrupt(f"ERROR {problem}")
        elif refcount < references:
            findings.corrected(f"Repairing {problem}")
        elif fix_leaks:
            findings.leaks_fixed += 1
            findings.say(f"Repairing {problem}")
        else:
            findings.leaks += 1
            findings.say(f"Leaked {problem}")

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
