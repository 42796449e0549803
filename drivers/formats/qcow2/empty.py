"""Switches to new refcount structures: emptying a disk, making the emptied file small, refcounts of another width.

Refcounts are counted from what is referenced (those of another width are taken over as they are), complete with those
of the new structures themselves; everything new goes into space that neither the old nor the new state uses, and one
sector of the header makes it live."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from safeimg.drivers.errors import FormatError, UnsupportedError, UsageError
from safeimg.drivers.formats.api import Changes
from safeimg.drivers.formats.qcow2.header import DIRTY, MAX_REFCOUNT_TABLE_BYTES
from safeimg.drivers.formats.qcow2.pieces import Pieces
from safeimg.drivers.formats.qcow2.refcounts import RefcountLayout
from safeimg.drivers.formats.qcow2.references import References, count_everything, count_kept
from safeimg.drivers.formats.qcow2.tables import REPAIR
from safeimg.drivers.records import NamedTuple

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner


class _Layout(NamedTuple):
    """Where new structures go: cluster numbers."""

    table: int
    table_clusters: int
    blocks: Sequence[tuple[int, int]]  # (index in the table, cluster)
    l1: int | None  # None: the L1 table stays where it is


class _Space:
    """Free clusters, handed out first-fit: the holes between those in use, and everything behind them."""

    def __init__(self, used: References, start: int) -> None:
        end = max(used.end(), start)
        self._runs = [(max(first, start), first + count) for first, count in used.free_runs(end)
                      if first + count > start]
        self._runs.append((end, 1 << 62))
        self.taken: list[tuple[int, int]] = []  # (first, count)

    def take(self, clusters: int) -> int:
        for index, (first, end) in enumerate(self._runs):
            if end - first >= clusters:
                self._runs[index] = (first + clusters, end)
                self.taken.append((first, clusters))
                return first
        raise AssertionError("the last run has no end")

    def block_indexes(self, entries: int) -> set[int]:
        return {index for first, count in self.taken if count
                for index in range(first // entries, (first + count - 1) // entries + 1)}


def empty(planner: Qcow2Planner) -> Changes:
    """See `api.Planner.empty`. The dirty bit goes too: what the lazy refcounts missed is no longer there."""
    _begin(planner)
    references = count_kept(planner)
    layout = _lay_out(planner, references, references, _end(planner), l1=True)
    _write(planner, references, layout)
    return planner.take()


def compact(planner: Qcow2Planner) -> tuple[Changes, int, list[tuple[int, int]]]:
    """See `api.Planner.compact`. Also the clusters (first, count) below the new end that nothing uses any
    more."""
    planner.finished = False
    _begin(planner)
    references = count_kept(planner)
    layout = _lay_out(planner, references, count_everything(planner), 1, l1=True)
    _write(planner, references, layout)
    end = references.end()
    return planner.take(), end << planner.header.cluster_bits, list(references.free_runs(end))


def change_refcount_width(planner: Qcow2Planner, order: int) -> Iterator[Changes]:
    """The refcounts with `1 << order` bits each, right or wrong, steps of new blocks and the switch to them. Raises
    `UsageError` in QEMU's words if one does not fit. The old structures stay counted until `release`."""
    planner.ready()
    bits, old = planner.header.cluster_bits, planner.refcounts
    blocks = sorted(block for _, block in planner.refcounts.blocks())
    if len(set(blocks)) < len(blocks):
        raise FormatError(planner.path, f"a refcount block is in use twice: {REPAIR}")
    layout = RefcountLayout(bits, order)
    references = _as_recorded(planner, layout)
    planner.layout = layout
    places = _lay_out(planner, references, references, _end(planner), l1=False)
    pieces = Pieces()
    for offset, content in _refcounts(planner, references, places):
        planner.view.extend(offset + len(content))
        if pieces.add(offset, content):
            yield planner.take()._replace(fresh=pieces.take())
    _switch(planner, places, refcount_order=order)
    planner.unlink_clusters(old.table_offset >> bits, old.table_clusters)
    for block in blocks:
        planner.unlink_clusters(block >> bits, 1)
    yield planner.take()._replace(fresh=pieces.take())


def _as_recorded(planner: Qcow2Planner, wanted: RefcountLayout) -> References:
    """What the refcounts say, all of which have to fit the layout that is wanted."""
    from safeimg.drivers.formats.qcow2.check import decode_block

    bits, old = planner.header.cluster_bits, planner.layout
    references = References(planner.path, 1 << 62 - bits)
    for index, block in planner.refcounts.blocks():
        counts = decode_block(planner.view.read(block, 1 << bits), old.refcount_order)
        above = (counts > wanted.maximum).nonzero()[0]
        if len(above):
            first = int(above[0])
            raise UsageError(
                f"Cannot decrease refcount entry width to {1 << wanted.refcount_order} bits: Cluster at offset "
                f"{index * old.block_entries + first << bits:#x} has a refcount of {int(counts[first])}"
            )
        references.set_run(index * old.block_entries, counts)
    return references


def _begin(planner: Qcow2Planner) -> None:
    if planner.finished:
        raise RuntimeError(f"{planner.path}: nothing can be planned any more")
    planner.finished = True


def _end(planner: Qcow2Planner) -> int:
    """The first cluster behind everything in the file; on a device, behind everything in use."""
    if planner.on_device:
        return count_everything(planner).end()
    return -(-planner.view.length // planner.cluster_size)


def _lay_out(
    planner: Qcow2Planner, references: References, used: References, start: int, *, l1: bool
) -> _Layout:
    """Places for a refcount table, its blocks and the L1 table in clusters from `start` on that `used` does
    not count. `references` counts them from then on."""
    entries, size = planner.layout.block_entries, planner.cluster_size
    l1_clusters = -(-8 * planner.l1_size // size) if l1 else 0
    counted = references.block_indexes(entries)
    table_clusters = 1
    while True:
        if table_clusters * size > MAX_REFCOUNT_TABLE_BYTES:
            raise UnsupportedError(f"{planner.path}: the image file is larger than QEMU's refcounts cover")
        space = _Space(used, start)
        # The order in which QEMU has them in a new image: the table, the first block, L1.
        table = space.take(table_clusters)
        blocks = {table // entries: space.take(1)}
        l1_first = space.take(l1_clusters)
        while missing := sorted((counted | space.block_indexes(entries)) - blocks.keys()):
            for index in missing:
                blocks[index] = space.take(1)
        needed = -(-8 * (max(blocks) + 1) // size)
        if needed <= table_clusters:
            break
        table_clusters = needed
    for first, count in space.taken:
        references.add_run(first, count)
    return _Layout(table, table_clusters, sorted(blocks.items()), l1_first if l1 else None)


def _refcounts(planner: Qcow2Planner, references: References, layout: _Layout) -> Iterator[tuple[int, bytes]]:
    """The new blocks and their table: (offset, content)."""
    bits, entries = planner.header.cluster_bits, planner.layout.block_entries
    table = bytearray(layout.table_clusters << bits)
    for index, cluster in layout.blocks:
        yield cluster << bits, references.encode(index * entries, planner.layout)
        table[8 * index:8 * index + 8] = (cluster << bits).to_bytes(8, "big")
    yield layout.table << bits, bytes(table)


def _write(planner: Qcow2Planner, references: References, layout: _Layout) -> None:
    """The new structures, an empty L1 table among them, and the switch to them."""
    bits, view = planner.header.cluster_bits, planner.view
    for offset, content in _refcounts(planner, references, layout):
        view.fresh(offset, content)
    assert layout.l1 is not None
    l1_clusters = -(-8 * planner.l1_size >> bits)
    if l1_clusters:
        view.fresh(layout.l1 << bits, bytes(l1_clusters << bits))
    planner.restart_tables(layout.l1 << bits, planner.l1_size)
    _switch(planner, layout, l1_table_offset=layout.l1 << bits, l1_size=planner.l1_size)


def _switch(planner: Qcow2Planner, layout: _Layout, **fields: int) -> None:
    """To the new refcounts, and what else of the header changes with them."""
    bits = planner.header.cluster_bits
    fields |= {"refcount_table_offset": layout.table << bits, "refcount_table_clusters": layout.table_clusters}
    if planner.header.version > 2:
        features = int.from_bytes(planner.view.read(72, 8), "big")
        fields["incompatible_features"] = features & ~DIRTY
    planner.switch(**fields)
    planner.restart(layout.table << bits, layout.table_clusters)
