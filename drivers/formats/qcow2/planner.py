"""Plans writes into a qcow2 image: places for data, and the metadata patches that make them part of the disk.

Implements `api.Planner`; spec: docs/interop/qcow2, "Cluster mapping". What keeps every crash state valid:

- fresh clusters, their refcounts and new L2 tables are `allocate`; L1 and L2 entries are `link`;
- an entry loses its cluster in `link`, the cluster loses its refcount only in `release`;
- refcount blocks are made by `reserve`, a step earlier than the clusters that they count.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

from safeimg.drivers.errors import FormatError, UnsupportedError
from safeimg.drivers.formats.api import Changes, Placement
from safeimg.drivers.formats.metadata import MetadataView, Phase
from safeimg.drivers.formats.qcow2 import dirty_bitmaps, empty, grow
from safeimg.drivers.formats.qcow2.allocator import Allocator
from safeimg.drivers.formats.qcow2.bitmaps import Bitmap, read_bitmaps
from safeimg.drivers.formats.qcow2.entries import (
    MAX_HOST_OFFSET,
    OFFSET_MASK,
    SECTOR,
    compressed_shift,
    encode_compressed,
)
from safeimg.drivers.formats.qcow2.header import Header
from safeimg.drivers.formats.qcow2.outside import OutsidePlacer
from safeimg.drivers.formats.qcow2.packing import Packer
from safeimg.drivers.formats.qcow2.placing import Placer
from safeimg.drivers.formats.qcow2.refcounts import RefcountLayout, Refcounts, add_run
from safeimg.drivers.formats.qcow2.references import References, count_everything
from safeimg.drivers.formats.qcow2.tables import REPAIR, ActiveTables
from safeimg.drivers.storage.api import File

# Fields that switches change: all in the first sector, so that one patch changes any set of them at once.
_FIELDS = {
    "size": (24, 8), "l1_size": (36, 4), "l1_table_offset": (40, 8), "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4), "nb_snapshots": (60, 4), "snapshots_offset": (64, 8),
    "incompatible_features": (72, 8), "compatible_features": (80, 8), "autoclear_features": (88, 8),
    "refcount_order": (96, 4),
}

MAX_HEADER_CLUSTERS = 1 << 16  # of a LUKS header: the rest of a hostile one is not looked at

class Qcow2Source(Protocol):
    """What the planner needs of an open image."""

    @property
    def file(self) -> File: ...
    @property
    def header(self) -> Header: ...


class Qcow2Planner:
    """Refuses dirty images (lazy refcounts: zero does not mean free): they have to be repaired first."""

    def __init__(self, image: Qcow2Source) -> None:
        header = image.header
        self.header = header
        self.file = image.file
        self.path = image.file.path
        self.original_length = image.file.length()
        self.on_device = image.file.stat().is_device  # its length says nothing about what is in use
        self.view = MetadataView(image.file, header.cluster_size)
        self.layout = RefcountLayout(header.cluster_bits, header.refcount_order)
        self.current_size = header.size & ~511  # as QEMU: whole sectors
        self.size = self.current_size  # guest bytes that may be planned for: more once growing is prepared
        self.l1_size = header.l1_size
        self.l1_table_offset = header.l1_table_offset
        self.bitmap_directory_offset = 0 if header.bitmaps is None else header.bitmaps.bitmap_directory_offset
        self.bitmaps: Sequence[Bitmap] = read_bitmaps(image.file, header)
        self.trusted = not header.is_dirty
        self.finished = False
        self._begin(header.refcount_table_offset, header.refcount_table_clusters)
        self._unlinked: list[tuple[int, int]] = []  # clusters (first, count) less a reference since `take`
        self._released: list[tuple[int, int]] = []  # the same, of all steps until `release`
        self._recalled = False
        self._freed: list[tuple[int, int]] = []
        self._verified = False
        self.tables = ActiveTables(self)
        self._packer = Packer(self)
        self._placer = OutsidePlacer(self) if header.has_data_file else Placer(self)

    def _begin(self, table_offset: int, table_clusters: int) -> None:
        self.refcounts = Refcounts(self.view, self.layout, table_offset, table_clusters)
        self.allocator = Allocator(self.view, self.refcounts, self._switch_refcount_table)

    # api.Planner

    @property
    def cluster_size(self) -> int:
        return self.header.cluster_size

    @property
    def granularity(self) -> int:
        return self.header.l2.subcluster_size

    @property
    def pending(self) -> int:
        """Bytes of metadata in the step under way, roughly: a step should not collect too many."""
        return self.view.pending

    def reserve(self, clusters: int) -> Changes:
        """See `api.Planner`. L2 tables come on top: the worst case of one for each cluster is reserved with
        them."""
        self.ready()
        self.allocator.reserve(clusters + min(clusters, self.l1_size))
        return self.take()

    def place(self, start: int, length: int) -> Sequence[Placement]:
        self.ready()
        self._check_range(start, length)
        return self._placer.place(start, start + length)

    def place_compressed(self, start: int, sizes: Sequence[int]) -> Sequence[int]:
        self.ready()
        size, bits = self.cluster_size, self.header.cluster_bits
        for stored in sizes:
            if start % size or not 0 < stored < size:
                raise ValueError(f"not a compressed cluster: {stored} bytes behind guest offset {start:#x}")
        self._check_range(start, size * (len(sizes) - 1) + 1)
        limit = min(1 << compressed_shift(bits), MAX_HOST_OFFSET)
        offsets: list[int] = []
        for first, entries in self.tables.entries(start, size * len(sizes)):
            self.tables.prepare(first)
            here = sizes[first - start // size :][: len(entries)]
            found = self._packer.place(here)
            if max(found) >= limit:
                raise UnsupportedError(f"{self.path}: {max(found):#x} is too far for compressed clusters this large")
            for cluster, entry in enumerate(entries, first):
                self.tables.unlink(cluster, entry)
            self.tables.put(first, [encode_compressed(*place, bits) for place in zip(found, here, strict=True)])
            offsets += found
        return offsets

    def zero(self, start: int, length: int) -> Sequence[Placement]:
        self.ready()
        self._check_range(start, length)
        return self._placer.zero(start, start + length)

    def prepare_resize(self, size: int) -> Sequence[Changes]:
        return grow.prepare_resize(self, size)

    def exposed(self, size: int, backing_size: int) -> Sequence[tuple[int, int]]:
        return grow.exposed(self, size, backing_size)

    def noise(self, size: int) -> Sequence[tuple[int, int]]:
        return ()

    def resize(self, size: int) -> Sequence[Changes]:
        return grow.resize(self, size)

    def shrink(self, size: int) -> Sequence[Changes]:
        return grow.shrink(self, size)

    def forget(self, start: int, most: int) -> int | None:
        return grow.forget(self, start, most)

    def take(self) -> Changes:
        patches, length = self.view.take()
        bits = self.header.cluster_bits
        changes = Changes(
            patches.allocate + self._placer.take_tails(), patches.link, length,
            tuple((first << bits, count << bits) for first, count in self._unlinked)
            + self._placer.take_vacated(),
        )
        self._released += self._unlinked
        self._unlinked = []
        self._packer.finish()
        return changes

    def recall(self, unlinked: Sequence[tuple[int, int]]) -> None:
        bits, size = self.header.cluster_bits, self.cluster_size
        file_end = -(-self.view.length // size) * size
        for offset, length in unlinked:
            if offset < 0 or not 0 < length <= file_end - offset or (offset | length) & (self.granularity - 1):
                raise FormatError(self.path, f"no clusters to free in {length} bytes", offset=offset)
            # Parts of clusters at either end were only taken out of use.
            end = offset + length
            while offset < end:
                behind = min(end, (offset // size + 1) * size)
                if behind - offset == size:
                    behind = end - end % size
                    add_run(self._released, offset >> bits, (behind - offset) >> bits)
                    self.allocator.exclude(offset >> bits, (behind - offset) >> bits)
                else:
                    self._placer.recall(offset, behind - offset)
                offset = behind
        self._recalled = self._recalled or bool(unlinked)

    def release(self) -> Changes:
        """See `api.Planner`. After `recall` the references are counted first, and no refcount goes below
        them: somebody may have repaired leaks in between. Nothing can be planned afterwards."""
        self.ready()
        references = count_everything(self) if self._recalled else None
        for first, count in self._released:
            self._lower(first, count, references)
        self._released = []
        self.finished = True
        return self.take()

    def freed(self) -> Sequence[tuple[int, int]]:
        bits = self.header.cluster_bits
        return [(first << bits, count << bits) for first, count in sorted(self._freed)]

    def empty(self) -> Changes:
        return empty.empty(self)

    def compact(self) -> tuple[Changes, int]:
        changes, length, self._freed = empty.compact(self)
        return changes, length

    # Beyond api.Planner

    def mark_dirty(self, ranges: Sequence[tuple[int, int]]) -> Changes:
        """Sets the bits of guest ranges (start, length) in every enabled persistent bitmap. A step of its
        own, before any data of the ranges; `reserve(marking_clusters(ranges))` first."""
        self.ready()
        dirty_bitmaps.mark(self, ranges)
        return self.take()

    def marking_clusters(self, ranges: Sequence[tuple[int, int]]) -> int:
        """How many fresh clusters `mark_dirty` takes."""
        return dirty_bitmaps.clusters_needed(self, ranges)

    # For grow, empty, dirty_bitmaps

    def ready(self) -> None:
        """Before any plan: refcounts can be trusted, and count what free space must not overlap."""
        if self.finished:
            raise RuntimeError(f"{self.path}: nothing can be planned any more")
        if not self.trusted:
            raise UnsupportedError(
                f"{self.path}: the image was not closed properly: repair it with 'qemu-img check -r all'"
            )
        if not self._verified:
            self._verify_counted()
            self._verified = True

    def switch(self, *values: tuple[int, int], **fields: int) -> None:
        """Changes header fields, and 8-byte values given as (offset, value): all of it is one patch of `link`
        in the first sector, so that no crash separates them."""
        places = [(*_FIELDS[name], value) for name, value in fields.items()]
        places += [(offset, 8, value) for offset, value in values]
        start, end = min(place[0] for place in places), max(place[0] + place[1] for place in places)
        if end > SECTOR:
            raise RuntimeError(f"{self.path}: a switch does not fit into one sector")
        head = bytearray(self.view.read(0, end))
        for offset, length, value in places:
            head[offset:offset + length] = value.to_bytes(length, "big")
        self.view.write(start, bytes(head[start:]), Phase.LINK)

    def unlink_clusters(self, first: int, count: int) -> None:
        """The step under way takes one reference from each of these clusters."""
        if count:
            add_run(self._unlinked, first, count)

    def restart(self, refcount_table_offset: int, refcount_table_clusters: int) -> None:
        """The header points to another refcount table, which counts everything."""
        self._begin(refcount_table_offset, refcount_table_clusters)
        self.trusted = True

    def note_freed(self, runs: Sequence[tuple[int, int]]) -> None:
        """Clusters (first, count) that a switch to other refcounts has freed."""
        self._freed += runs

    def restart_tables(self, l1_table_offset: int, l1_size: int) -> None:
        self.l1_table_offset, self.l1_size = l1_table_offset, l1_size
        self.tables.forget()

    # Places

    def _check_range(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > self.size:
            raise ValueError(f"{self.path}: guest range {start:#x}+{length:#x} is not within {self.size:#x}")

    # Refcounts

    def _lower(self, first: int, count: int, references: References | None) -> None:
        if references is None:
            for run in self.refcounts.lower_run(first, count, Phase.LINK):
                add_run(self._freed, *run)
            return
        for cluster in range(first, first + count):
            if self.refcounts.get(cluster) > references.get(cluster):
                for run in self.refcounts.lower_run(cluster, 1, Phase.LINK):
                    add_run(self._freed, *run)

    def _switch_refcount_table(self, offset: int, clusters: int) -> None:
        old = self.refcounts
        self.unlink_clusters(old.table_offset >> self.header.cluster_bits, old.table_clusters)
        self.switch(refcount_table_offset=offset, refcount_table_clusters=clusters)
        old.table_offset, old.table_clusters = offset, clusters

    def _verify_counted(self) -> None:
        """The structures that are in use must not look free, or data would be put over them."""
        header, bits = self.header, self.header.cluster_bits
        l1_clusters = -(-8 * self.l1_size // self.cluster_size)
        structures = [(0, 1), (self.refcounts.table_offset >> bits, self.refcounts.table_clusters)]
        structures.append((self.l1_table_offset >> bits, l1_clusters))
        if header.nb_snapshots:
            structures.append((header.snapshots_offset >> bits, 1))
        if header.encryption is not None:
            clusters = -(-header.encryption.length >> bits)
            structures.append((header.encryption.offset >> bits, min(clusters, MAX_HEADER_CLUSTERS)))
        if header.bitmaps is not None:
            structures.append((self.bitmap_directory_offset >> bits, 1))
        per_read = 8192
        for position in range(0, self.l1_size, per_read):
            count = min(per_read, self.l1_size - position)
            l1 = struct.unpack(f">{count}Q", self.view.read(self.l1_table_offset + 8 * position, 8 * count))
            structures += [((entry & OFFSET_MASK) >> bits, 1) for entry in l1 if entry & OFFSET_MASK]
            runs: list[tuple[int, int]] = []
            for first, length in sorted(structures):
                add_run(runs, first, length)
            for first, length in runs:
                values = self.refcounts.get_run(first, length)
                if 0 in values:
                    raise FormatError(self.path, f"metadata has refcount 0: {REPAIR}",
                                      offset=first + values.index(0) << bits)
            structures = []
