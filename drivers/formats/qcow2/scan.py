"""Counts the references to every host cluster, as `check` needs them (spec: QEMU's qcow2, "Host cluster
management").

Damage is reported in qemu-img's words, in its order, and never stops the scan. Tables without any damage,
which is nearly all of them, are counted as arrays; one with damage is walked entry by entry. The numbers of
bytes read and of entries walked are bounded whatever the image says: by the file's size, and by a budget for
what is visited again.

Loaded only when an image is checked: it needs numpy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from safeimg.drivers.errors import FormatError, UnsupportedError
from safeimg.drivers.formats.qcow2.bitmaps import TABLE_OFFSET_MASK, Bitmap, table_entries
from safeimg.drivers.formats.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_STANDARD_RESERVED,
    OFFSET_MASK,
    REFCOUNT_BLOCK_MASK,
    REFCOUNT_TABLE_RESERVED,
    SECTOR,
    decode_compressed,
)
from safeimg.drivers.formats.qcow2.findings import Findings
from safeimg.drivers.formats.qcow2.header import MAX_L1_BYTES
from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.l2 import DESCRIPTOR
from safeimg.drivers.formats.qcow2.l2_arrays import Words, compressed_clusters, descriptors, referred
from safeimg.drivers.formats.qcow2.snapshots import Snapshot, read_snapshots

Counts = NDArray[np.uint32]

MAX_CLUSTERS = 1 << 28  # 1 GiB of counts: 16 TiB of file with 64 KiB clusters
MAX_OFFSET = 1 << 63
CHUNK_ENTRIES = 1 << 17  # of tables read at once
BUDGET = 1 << 26  # entries of tables that are damaged or referred to repeatedly


def count_references(image: Qcow2Image) -> Counts:
    """How often each host cluster is referred to, whatever the refcounts say; damaged references do not
    count.

    Raises `FormatError` and `UnsupportedError` if the image is too damaged or too large to tell."""
    scan = ReferenceScan(image)
    scan.run(read_snapshots(image.file, image.header))
    return scan.counts


class ReferenceScan:
    """Once `run` is through, `counts` has an entry for each of the file's `clusters`.

    References that reach past the end of the file by less than a cluster count: they make one cluster more.

    With `fix`, what `check -r all` mends on its way is written to the image's file (which is a draft then).
    """

    def __init__(self, image: Qcow2Image, findings: Findings | None = None, *, fix: bool = False) -> None:
        self.image = image
        self.header = image.header
        self._l2 = image.header.l2
        self.file = image.file
        self.length = image.file.length()
        self.findings = Findings() if findings is None else findings
        self.broken = False  # the refcount blocks are not where they can stay
        self._fix = fix
        self.clusters = -(-self.length // self.header.cluster_size)
        self._max_count = min(self.header.max_refcount, (1 << 32) - 1)
        self._budget = BUDGET
        self.counts: Counts = self._new_counts()

    def _new_counts(self) -> Counts:
        problem = f"{self.file.path}: too many clusters ({self.clusters}) to count in bounded memory"
        if self.clusters > MAX_CLUSTERS:
            raise UnsupportedError(problem)
        try:
            # A last reference may reach past the end of the file by less than a cluster.
            return np.zeros(self.clusters + 1, np.uint32)
        except MemoryError:
            raise UnsupportedError(problem) from None

    def run(self, snapshots: tuple[Snapshot, ...]) -> None:
        header = self.header
        self.add_region(0, header.cluster_size)
        self._scan_active()
        self._scan_snapshots(snapshots)
        if snapshots:
            self.add_region(header.snapshots_offset, snapshots[-1].end - header.snapshots_offset)
        if header.encryption is not None:
            self.add_region(header.encryption.offset, header.encryption.length)
        self.add_region(header.refcount_table_offset, 8 * header.refcount_table_entries)
        self._scan_bitmaps()
        self._scan_refcount_blocks()
        self.counts = self.counts[:self.clusters]

    # What tables say

    def read_table(self, offset: int, entries: int) -> Iterator[tuple[int, Words]]:
        """(index, entries from there on) of a table; nothing is yielded for what lies past the end of the
        file."""
        for index in range(0, entries, CHUNK_ENTRIES):
            start = offset + 8 * index
            if start >= min(self.length, MAX_OFFSET):
                return
            wanted = 8 * min(CHUNK_ENTRIES, entries - index)
            data = self.file.pread(start, wanted)
            table = np.frombuffer(data.ljust(-(-len(data) // 8) * 8, b"\0"), ">u8")
            yield index, table.astype(np.uint64)

    def read_l2(self, offset: int) -> Iterator[tuple[int, Words]]:
        """Like `read_table`, for an L2 table: (index of an entry, the words of the entries from there on)."""
        words_per_entry = self._l2.entry_size >> 3
        for index, words in self.read_table(offset, self._l2.entries * words_per_entry):
            if len(words) % words_per_entry:
                words = np.append(words, np.uint64(0))
            yield index // words_per_entry, words

    def _scan_active(self) -> None:
        """The active L1 table; a table that it refers to twice is damage, and costs from the budget."""
        header = self.header
        seen: set[int] = set()
        self.add_region(header.l1_table_offset, 8 * header.l1_size)
        for _, table in self.read_table(header.l1_table_offset, header.l1_size):
            for entry in table[table != 0].tolist():
                offset = self._visit_l1_entry(entry)
                if offset in seen:
                    self._spend(header.l2_entries)
                seen.add(offset)
                self._scan_l2(offset, 1, active=True)

    def _scan_snapshots(self, snapshots: tuple[Snapshot, ...]) -> None:
        """L1 tables of snapshots share most of their L2 tables: each is read once, and counted many times."""
        header = self.header
        l2_tables: Counter[int] = Counter()
        l1_bytes = 0
        for snapshot in snapshots:
            size = 8 * snapshot.l1_size
            identifier, title = (text.split("\0", 1)[0] for text in (snapshot.id, snapshot.name))
            name = f"ERROR snapshot {identifier} ({title})"
            if snapshot.l1_table_offset % header.cluster_size:
                problem = f"l1_offset={snapshot.l1_table_offset:#x}: L1 table is not cluster aligned"
                self.findings.corrupt(f"{name} {problem}; snapshot table entry corrupted")
                continue
            if size > MAX_L1_BYTES:
                problem = f"l1_size={snapshot.l1_size:#x}: L1 table is too large"
                self.findings.corrupt(f"{name} {problem}; snapshot table entry corrupted")
                continue
            l1_bytes += size
            if l1_bytes > self.length + MAX_L1_BYTES:
                raise FormatError(self.file.path, "the L1 tables of snapshots overlap: too much to check")
            self.add_region(snapshot.l1_table_offset, size)
            for _, table in self.read_table(snapshot.l1_table_offset, snapshot.l1_size):
                l2_tables.update(self._visit_l1_entry(entry) for entry in table[table != 0].tolist())
        for offset, times in l2_tables.items():
            self._scan_l2(offset, times, active=False)

    def _visit_l1_entry(self, entry: int) -> int:
        """Counts the reference to an L2 table; its offset."""
        if entry & L1_RESERVED:
            self.findings.corrupt(f"ERROR found L1 entry with reserved bits set: {entry:x}")
        offset = entry & OFFSET_MASK
        self.add_region(offset, self.header.cluster_size)
        if offset % self.header.cluster_size:
            problem = "Table is not cluster aligned; L1 entry corrupted"
            self.findings.corrupt(f"ERROR l2_offset={offset:x}: {problem}")
        return offset

    def _scan_l2(self, offset: int, times: int, *, active: bool) -> None:
        if offset % self.header.cluster_size:
            # Every sector of the file could be taken for one of these.
            self._spend(self.header.l2_entries)
        expected = [0]  # where the next cluster would be if it was not fragmented
        for index, words in self.read_l2(offset):
            if self.header.has_data_file:
                self._count_outside(index, words, expected, active)
            elif words.any() and not self._count_sound(words, times, expected, active):
                entries = {at: entry for at, entry in enumerate(self._l2.join(words.tolist()), index) if entry}
                self._spend(len(entries) * times)
                start = expected[0]
                for _ in range(times):
                    expected[0] = start
                    for at in self._count_damaged(entries, expected, active):
                        self._make_zero(offset, at)
                        del entries[at]

    def _count_sound(self, words: Words, times: int, expected: list[int], active: bool) -> bool:
        """Counts what a part of an L2 table refers to, all at once; False, with nothing done, if an entry is
        bad."""
        bits = self.header.cluster_bits
        found = referred(self._l2, words)
        if found is None or (found.compressed & np.uint64(COPIED)).any():
            return False
        hosts, compressed = found
        clusters = [(hosts >> np.uint64(bits)).astype(np.int64), *compressed_clusters(self._l2, compressed)]
        inside = self.length >> bits  # clusters that are in the file as a whole
        if any(len(part) and int(part.max()) >= inside for part in clusters):
            return False
        for number, part in enumerate(clusters):
            self._add_many(part, times)
            if len(part) and int(self.counts[part].max()) > self._max_count:
                for undo in clusters[:number + 1]:
                    np.subtract.at(self.counts, undo, times)
                return False
        if active:
            findings = self.findings
            findings.allocated_clusters += len(hosts) + len(compressed)
            findings.compressed_clusters += len(compressed)
            findings.fragmented_clusters += len(compressed)
            if len(hosts):
                first = int(hosts[0])
                findings.fragmented_clusters += int(expected[0] not in (0, first))
                findings.fragmented_clusters += int(
                    np.count_nonzero(hosts[1:] != hosts[:-1] + np.uint64(1 << bits))
                )
                expected[0] = int(hosts[-1]) + (1 << bits)
        return True

    def _count_outside(self, index: int, words: Words, expected: list[int], active: bool) -> None:
        """Counts what a part of an L2 table refers to in an external data file, which has no refcounts."""
        findings, size = self.findings, self.header.cluster_size
        found = descriptors(self._l2, words)
        is_compressed = (found & np.uint64(COMPRESSED)) != 0
        for at in is_compressed.nonzero()[0].tolist():
            findings.corrupt(f"ERROR compressed cluster {index + at} with data file, entry={int(found[at]):#x}")
        standard = found[~is_compressed & (found >= np.uint64(SECTOR))]  # at offset 0, one has the COPIED flag
        hosts = standard & np.uint64(OFFSET_MASK)
        for offset in hosts[(hosts & np.uint64(size - 1)) != 0].tolist():
            findings.corrupt(f"ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted.")
        if active and len(hosts):
            findings.allocated_clusters += len(hosts)
            findings.fragmented_clusters += int(expected[0] not in (0, int(hosts[0])))
            findings.fragmented_clusters += int(np.count_nonzero(hosts[1:] != hosts[:-1] + np.uint64(size)))
            expected[0] = int(hosts[-1]) + size

    def _add_many(self, clusters: NDArray[np.int64], times: int) -> None:
        if not len(clusters):
            return
        steps = np.diff(clusters)
        if (steps == 1).all():
            self.counts[int(clusters[0]):int(clusters[-1]) + 1] += np.uint32(times)
        elif (steps > 0).all():
            self.counts[clusters] += np.uint32(times)
        else:
            np.add.at(self.counts, clusters, np.uint32(times))

    def _count_damaged(self, entries: dict[int, int], expected: list[int], active: bool) -> list[int]:
        """Like `_count_sound`, entry by entry (by their indexes), with everything that is wrong reported. Indexes of
        those that are to become zero."""
        header, findings = self.header, self.findings
        mended: list[int] = []
        for index, entry in entries.items():
            is_sound, descriptor = self._l2.is_sound(entry), entry & DESCRIPTOR
            if entry & COMPRESSED:
                offset, stored = decode_compressed(descriptor, header.cluster_bits)
                if entry & COPIED:
                    problem = "copied flag must never be set for compressed clusters"
                    findings.corrupt(f"ERROR: coffset={offset:#x}: {problem}")
                if not is_sound:
                    problem = "with non-zero subcluster allocation bitmap"
                    findings.corrupt(f"ERROR compressed cluster {index} {problem}, entry={descriptor & ~COPIED:#x}")
                    continue
                if active:
                    findings.allocated_clusters += 1
                    findings.compressed_clusters += 1
                    findings.fragmented_clusters += 1
                self.add_region(offset, stored)
                continue
            if entry & L2_STANDARD_RESERVED:
                findings.corrupt(f"ERROR found l2 entry with reserved bits set: {descriptor:x}")
            offset = entry & OFFSET_MASK
            if not is_sound and offset:
                problem = "Allocated cluster has corrupted subcluster allocation bitmap"
                findings.corrupt(f"ERROR offset={offset:x}: {problem}")
            elif not is_sound:
                findings.corrupt("ERROR: Unallocated cluster has non-zero subcluster allocation map")
            if not offset:
                continue
            if offset % header.cluster_size:
                what = "Data" if self._l2.masks(entry)[0] else "Preallocated"
                problem = f"offset={offset:x}: {what} cluster is not properly aligned; L2 entry corrupted."
                if self._fix and what == "Preallocated":
                    findings.corrected(f"Repairing {problem}")
                    mended.append(index)
                    continue
                findings.corrupt(f"ERROR {problem}")
            if active:
                findings.allocated_clusters += 1
                findings.fragmented_clusters += int(expected[0] not in (0, offset))
                expected[0] = offset + header.cluster_size
            self.add_region(offset, header.cluster_size)
        return mended

    def _make_zero(self, table: int, index: int) -> None:
        """An L2 entry whose cluster reads as zeroes and has no place."""
        self.file.pwrite(table + index * self._l2.entry_size, self._l2.encode([self._l2.zero]))

    def _scan_bitmaps(self) -> None:
        extension = self.header.bitmaps
        if extension is None:
            return
        bitmaps = self.image.bitmaps
        self.add_region(extension.bitmap_directory_offset, extension.bitmap_directory_size)
        for bitmap in bitmaps:
            self._scan_bitmap(bitmap)

    def _scan_bitmap(self, bitmap: Bitmap) -> None:
        header = self.header
        expected = table_entries(header.size, bitmap.granularity_bits, header.cluster_bits)
        if not bitmap.in_use and bitmap.bitmap_table_size != expected:
            raise FormatError(
                self.file.path, f"Could not read bitmap '{bitmap.name}' from image: Invalid argument",
                offset=bitmap.offset,
            )
        self.add_region(bitmap.bitmap_table_offset, 8 * bitmap.bitmap_table_size)
        for index, table in self.read_table(bitmap.bitmap_table_offset, bitmap.bitmap_table_size):
            self._spend(int(np.count_nonzero(table)))
            for position in table.nonzero()[0].tolist():
                offset = int(table[position]) & TABLE_OFFSET_MASK
                if int(table[position]) & ~TABLE_OFFSET_MASK & (~1 if not offset else ~0) or (
                    offset % header.cluster_size
                ):
                    raise FormatError(
                        self.file.path,
                        f"Could not read bitmap_table table from image for bitmap '{bitmap.name}': "
                        "Invalid argument",
                        offset=bitmap.bitmap_table_offset + 8 * (index + position),
                    )
                self.add_region(offset, header.cluster_size if offset else 0)

    def _scan_refcount_blocks(self) -> None:
        header = self.header
        for index, table in self.read_table(header.refcount_table_offset, header.refcount_table_entries):
            for position in table.nonzero()[0].tolist():
                entry, number = int(table[position]), index + position
                offset = entry & REFCOUNT_BLOCK_MASK
                cluster = offset >> header.cluster_bits
                if entry & REFCOUNT_TABLE_RESERVED:
                    self._break(f"ERROR refcount table entry {number} has reserved bits set")
                elif offset % header.cluster_size:
                    problem = "is not cluster aligned; refcount table entry corrupted"
                    self._break(f"ERROR refcount block {number} {problem}")
                elif cluster >= self.clusters:
                    self._outside(number, offset)
                else:
                    self.add_region(offset, header.cluster_size)
                    count = int(self.counts[cluster])
                    if count != 1:
                        self._break(f"ERROR refcount block {number} refcount={count}")

    def _break(self, message: str) -> None:
        self.findings.corrupt(message)
        self.broken = True

    def _outside(self, number: int, offset: int) -> None:
        """A refcount block past the end of the file: a repair makes the file long enough."""
        problem = f"refcount block {number} is outside image"
        if not self._fix:
            self.findings.corrupt(f"ERROR {problem}")
            return
        self.findings.say(f"Repairing {problem}")
        length = offset + self.header.cluster_size
        if length > MAX_OFFSET or length >> self.header.cluster_bits > MAX_CLUSTERS:
            why = "Invalid argument" if length > MAX_OFFSET else "File too large"
            self._break(f"ERROR could not resize image: {why}")
            return
        self.file.truncate(length)
        self.length, self.clusters = length, length >> self.header.cluster_bits
        self.counts = np.append(self.counts, np.zeros(self.clusters + 1 - len(self.counts), np.uint32))
        self.findings.corruptions_fixed += 1
        self.add_region(offset, self.header.cluster_size)

    # Counting

    def add_region(self, offset: int, size: int) -> None:
        """One reference to every cluster that the range touches."""
        if not size:
            return
        bits = self.header.cluster_bits
        first, last = offset >> bits, (offset + size - 1) >> bits
        if offset + size - self.length >= self.header.cluster_size:
            problem = "counting reference for region exceeding the end of the file by one cluster or more"
            self.findings.corrupt(f"ERROR: {problem}: offset {offset:#x} size {size:#x}")
            return
        self.clusters = max(self.clusters, last + 1)
        counts = self.counts[first:last + 1]
        full = counts >= self._max_count
        if not full.any():
            counts += np.uint32(1)
            return
        counts[~full] += np.uint32(1)
        for cluster in full.nonzero()[0].tolist():
            self.findings.corrupt(
                f"ERROR: overflow cluster offset={(first + cluster) << bits:#x}\n"
                "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a "
                "clean copy if the image cannot be opened for writing"
            )

    def _spend(self, entries: int) -> None:
        self._budget -= entries
        if self._budget < 0:
            raise FormatError(self.file.path, "the image is too damaged to check all of it")
