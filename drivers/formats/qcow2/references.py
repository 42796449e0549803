"""Counts what an image's metadata refers to: the refcounts as they ought to be.

Each structure is read once, however often it is referred to, so the time is bounded by the size of the file;
memory is four bytes a cluster where clusters are in use. Spec: docs/interop/qcow2, "Host cluster management".
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from safeimg.drivers.errors import FormatError, UnsupportedError
from safeimg.drivers.formats.qcow2.dirty_bitmaps import read_table
from safeimg.drivers.formats.qcow2.entries import (
    L1_RESERVED,
    OFFSET_MASK,
)
from safeimg.drivers.formats.qcow2.refcounts import RefcountLayout
from safeimg.drivers.formats.qcow2.snapshots import read_snapshots

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner

PAGE = 4096  # clusters whose counts are kept together
MAX_PAGES = 16384  # 256 MiB
L2_BATCH = 1 << 16  # entries decoded at once
MAX_COUNT = (1 << 32) - 1
Array = Any  # numpy is loaded only where there are L2 tables


class Counting(Protocol):
    """Where references are counted."""

    def is_readable(self, offset: int, length: int, cluster_bits: int) -> bool:
        """Whether the references that a table there makes count; reading it may raise `FormatError`."""
        ...

    def add_range(self, offset: int, length: int, cluster_bits: int, times: int = 1) -> None: ...
    def add_many(self, clusters: Array, cluster_bits: int, times: int) -> None: ...


class References:
    """A count for each host cluster; those never added have none. Raises `FormatError` for clusters that the file has
    not, unless `within`: then only those count that it has."""

    def __init__(self, path: str, clusters: int, *, within: bool = False) -> None:
        self._path = path
        self._limit = clusters  # the file has no more
        self._within = within
        self._pages: dict[int, array[int]] = {}

    def get(self, cluster: int) -> int:
        page = self._pages.get(cluster // PAGE)
        return 0 if page is None else page[cluster % PAGE]

    def set_run(self, first: int, counts: Array) -> None:
        """Counts of consecutive clusters, of which `first` is the first of a page, or all of them lie in one."""
        for start in range(0, len(counts), PAGE):
            part = counts[start:start + PAGE]
            if part.any():
                number, at = divmod(first + start, PAGE)
                self._vector(number)[at:at + len(part)] = part

    def is_readable(self, offset: int, length: int, cluster_bits: int) -> bool:
        return not self._within or offset + length <= self._limit << cluster_bits

    def add_range(self, offset: int, length: int, cluster_bits: int, times: int = 1) -> None:
        """All clusters that the host range touches."""
        if length:
            first, last = offset >> cluster_bits, (offset + length - 1) >> cluster_bits
            if self._within:
                last = min(last, self._limit - 1)
            self._check(last, cluster_bits)
            self.add_run(first, max(0, last - first + 1), times)

    def add_run(self, first: int, count: int, times: int = 1) -> None:
        while count:
            number, start = divmod(first, PAGE)
            here = min(count, PAGE - start)
            page = self._page(number)
            if times + max(page[start:start + here]) > MAX_COUNT:
                raise UnsupportedError(f"{self._path}: a cluster is used too often to count it")
            for at in range(start, start + here):
                page[at] += times
            first, count = first + here, count - here

    def add_many(self, clusters: Array, cluster_bits: int, times: int) -> None:
        """Single clusters, in any order and repeated or not."""
        import numpy

        if not len(clusters):
            return
        clusters = numpy.sort(clusters)
        if self._within:
            clusters = clusters[clusters < self._limit]
            if not len(clusters):
                return
        self._check(int(clusters[-1]), cluster_bits)
        numbers = clusters // PAGE
        starts = numpy.flatnonzero(numpy.diff(numbers)) + 1
        for part in numpy.split(clusters, starts):
            numpy.add.at(self._vector(int(part[0]) // PAGE), (part % PAGE).astype(numpy.intp), times)

    def end(self) -> int:
        """One more than the highest cluster in use."""
        for number in sorted(self._pages, reverse=True):
            used = _used(self._pages[number]).rfind(1)
            if used >= 0:
                return number * PAGE + used + 1
        return 0

    def block_indexes(self, entries: int) -> set[int]:
        """Refcount blocks (of `entries` clusters each) that count anything."""
        step = min(entries, PAGE)
        return {
            (number * PAGE + start) // entries
            for number, page in self._pages.items() for start in range(0, PAGE, step) if any(page[start:start + step])
        }

    def free_runs(self, end: int) -> Iterator[tuple[int, int]]:
        """Clusters below `end` without references as (first, count), in order."""
        position = 0
        for number in sorted(self._pages):
            used, base = _used(self._pages[number]), number * PAGE
            at = used.find(1)
            while 0 <= at < end - base:
                if base + at > position:
                    yield position, base + at - position
                stop = used.find(0, at)
                if stop < 0:
                    stop = PAGE
                position = base + stop
                at = used.find(1, stop)
        if position < end:
            yield position, end - position

    def encode(self, first: int, layout: RefcountLayout) -> bytes:
        """The refcount block for the clusters from `first` on. `UnsupportedError` if a count is too wide."""
        count = layout.block_entries
        values = array("I", bytes(4 * count))
        for number in range(first // PAGE, (first + count - 1) // PAGE + 1):
            page = self._pages.get(number)
            if page is not None:
                start, end = max(first, number * PAGE), min(first + count, (number + 1) * PAGE)
                values[start - first:end - first] = page[start - number * PAGE:end - number * PAGE]
        highest = max(values)
        if highest > layout.maximum:
            raise UnsupportedError(
                f"{self._path}: a cluster is used {highest} times, which does not fit into "
                f"{1 << layout.refcount_order} bits"
            )
        return layout.encode(values, bytes(layout.span(0, count)[1]), 0)

    def _page(self, number: int) -> array[int]:
        page = self._pages.get(number)
        if page is None:
            if len(self._pages) >= MAX_PAGES:
                raise UnsupportedError(f"{self._path}: too many clusters to count them in bounded memory")
            page = self._pages[number] = array("I", bytes(4 * PAGE))
        return page

    def _vector(self, number: int) -> Array:
        """A page as numpy sees it."""
        import numpy

        return numpy.frombuffer(self._page(number), numpy.uint32)

    def _check(self, cluster: int, cluster_bits: int) -> None:
        if cluster >= self._limit:
            raise FormatError(self._path, "metadata refers to a cluster past the end of the file",
                              offset=cluster << cluster_bits)


def _used(page: array[int]) -> bytes:
    """1 for each cluster that is used, else 0."""
    return bytes(map(bool, page))


def encode_block(values: Array, order: int) -> bytes:
    """A refcount block (the inverse of `check.decode_block`); the counts fit."""
    import numpy

    bits = 1 << order
    if bits >= 8:
        block: bytes = values.astype(f">u{bits // 8}").tobytes()
        return block
    per_byte = 8 // bits
    packed = numpy.zeros(len(values) // per_byte, numpy.uint8)
    for position in range(per_byte):
        packed |= (values[position::per_byte] << (position * bits)).astype(numpy.uint8)
    return packed.tobytes()


def count_everything(planner: Qcow2Planner, *, within: bool = False) -> References:
    """Every reference in the state planned so far, the refcount structures included. `within`: see `References`."""
    references = count_kept(planner, within=within)
    bits = planner.header.cluster_bits
    count_l1(planner, references, {(planner.l1_table_offset, planner.l1_size): 1})
    refcounts = planner.refcounts
    references.add_range(refcounts.table_offset, refcounts.table_clusters << bits, bits)
    for _, block in refcounts.blocks():
        references.add_range(block, 1, bits)
    return references


def count_kept(planner: Qcow2Planner, *, within: bool = False) -> References:
    """What stays when the disk is emptied: the header, internal snapshots and bitmaps."""
    header, bits = planner.header, planner.header.cluster_bits
    references = References(planner.path, -(-planner.view.length // header.cluster_size), within=within)
    references.add_range(0, 1, bits)
    count_l1(planner, references, _snapshot_tables(planner, references))
    if header.encryption is not None:
        references.add_range(header.encryption.offset, header.encryption.length, bits)
    extension = header.bitmaps
    if extension is not None:
        references.add_range(planner.bitmap_directory_offset, extension.bitmap_directory_size, bits)
        for bitmap in planner.bitmaps:
            references.add_range(bitmap.bitmap_table_offset, 8 * bitmap.bitmap_table_size, bits)
            for entry in read_table(planner, bitmap):
                references.add_range(entry & OFFSET_MASK, 1 if entry & OFFSET_MASK else 0, bits)
    return references


def count_l1(planner: Qcow2Planner, references: References, tables: Mapping[tuple[int, int], int]) -> None:
    """L1 tables (offset, entries) with the number of times each is referred to, and everything below them."""
    for (offset, size), times in tables.items():
        references.add_range(offset, 8 * size, planner.header.cluster_bits, times)
    count_below(planner, references, tables)


def count_below(planner: Qcow2Planner, references: Counting, tables: Mapping[tuple[int, int], int]) -> None:
    """What L1 tables lead to, without the tables themselves. What comes out even is not looked at."""
    bits, view = planner.header.cluster_bits, planner.view
    l2_tables: Counter[int] = Counter()
    for (offset, size), times in tables.items():
        if not references.is_readable(offset, 8 * size, bits):
            continue
        for position in range(0, size, L2_BATCH):
            count = min(L2_BATCH, size - position)
            data = view.read(offset + 8 * position, 8 * count)
            if data.count(0) == len(data):
                continue
            import numpy

            entries = numpy.frombuffer(data, ">u8").astype(numpy.uint64)
            entries = entries[entries != 0]
            if (entries & numpy.uint64(L1_RESERVED)).any():
                raise FormatError(planner.path, "L1 table has entries with reserved bits set", offset=offset)
            for table in (entries & numpy.uint64(OFFSET_MASK)).tolist():
                l2_tables[table] += times
    for table, times in sorted(l2_tables.items()):
        if not times or not references.is_readable(table, planner.cluster_size, bits):
            continue
        if table % planner.cluster_size:
            raise FormatError(planner.path, "L2 table is not aligned to a cluster", offset=table)
        references.add_range(table, 1, bits, times)
        _count_l2(planner, references, table, times)


def _count_l2(planner: Qcow2Planner, references: Counting, table: int, times: int) -> None:
    import numpy
    from safeimg.drivers.formats.qcow2.l2_arrays import compressed_clusters, referred, standard_hosts

    l2, bits = planner.header.l2, planner.header.cluster_bits
    words = numpy.frombuffer(planner.view.read(table, planner.cluster_size), ">u8").astype(numpy.uint64)
    found = referred(l2, words)
    if found is None:
        # QEMU overlooks most of that, and stops where such an entry leads to.
        host = int(standard_hosts(l2, words).max(initial=0))
        references.add_range(host, 1, bits, 0)
        raise FormatError(planner.path, "L2 table has invalid entries", offset=table)
    if not planner.header.has_data_file:
        references.add_many(found.hosts >> numpy.uint64(bits), bits, times)
    for clusters in compressed_clusters(l2, found.compressed):
        references.add_many(clusters, bits, times)


def _snapshot_tables(planner: Qcow2Planner, references: References) -> dict[tuple[int, int], int]:
    """The L1 tables of the internal snapshots; counts the snapshot table itself."""
    snapshots = read_snapshots(planner.file, planner.header)
    tables: Counter[tuple[int, int]] = Counter()
    total = 0
    for snapshot in snapshots:
        total += 8 * snapshot.l1_size
        # Tables do not overlap: together they cannot be larger than the file.
        if snapshot.l1_table_offset % planner.cluster_size or total > planner.view.length:
            raise FormatError(planner.path, "snapshot's L1 table is invalid", offset=snapshot.offset)
        if snapshot.l1_size:
            tables[snapshot.l1_table_offset, snapshot.l1_size] += 1
    if snapshots:
        start, last = planner.header.snapshots_offset, snapshots[-1]
        references.add_range(start, last.offset + last.length - start, planner.header.cluster_bits)
    return dict(tables)
