"""map: which layer of a chain holds which guest range, and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from safeimg.drivers.formats.api import Extent, Image, Kind
from safeimg.drivers.records import NamedTuple


class Entry(NamedTuple):
    """A guest range that is stored one way."""

    start: int
    length: int
    depth: int  # the layer that decides: 0 is the top
    present: bool  # that layer says what it is; False: nothing does
    zero: bool  # reads as zeroes
    data: bool  # is stored as data
    offset: int | None  # in the layer's file

    def continues(self, last: Entry) -> bool:
        """Whether this range and the one before it are one for qemu-img."""
        if self[2:6] != last[2:6]:
            return False
        if self.offset is None or last.offset is None:
            return self.offset is last.offset
        return last.offset + last.length == self.offset


def block_map(layers: Sequence[Image], start: int, length: int) -> Iterator[Entry]:
    """The range clipped to the top image, in order, merged as far as possible. `FormatError`,
    `StorageError`."""
    held: Entry | None = None
    for entry in blocks(layers, start, length):
        if held is not None and entry.continues(held):
            held = held._replace(length=held.length + entry.length)
            continue
        if held is not None:
            yield held
        held = entry
    if held is not None:
        yield held


def blocks(layers: Sequence[Image], start: int, length: int) -> Iterator[Entry]:
    """Like `block_map`, in the pieces in which qemu-img looks things up: at most an L2 table's range each."""
    resolver = _Resolver(layers)
    return resolver.resolve(0, start, min(start + length, layers[0].size))


class _Resolver:
    """Goes down the chain until a layer says what a range is."""

    def __init__(self, layers: Sequence[Image]) -> None:
        self._layers = layers
        self._holes: dict[int, bool] = {}  # by depth: whether data clusters may be holes of the file

    def resolve(self, depth: int, start: int, end: int) -> Iterator[Entry]:
        image = self._layers[depth]
        covered = getattr(getattr(image, "header", None), "l2_coverage", end)
        while start < end:
            stop = min(end, start - start % covered + covered)
            for extent in image.extents(start, stop - start):
                if extent.kind is Kind.UNALLOCATED:
                    yield from self._below(depth, extent)
                else:
                    yield from self._own(depth, extent)
            start = stop

    def _below(self, depth: int, extent: Extent) -> Iterator[Entry]:
        start, end, offset = extent.start, extent.start + extent.length, extent.offset
        if depth + 1 < len(self._layers):
            shared = min(end, self._layers[depth + 1].size)
            if start < shared:
                yield from self.resolve(depth + 1, start, shared)
                start = shared
        if start < end:
            place = None if offset is None else offset + start - extent.start
            yield Entry(start, end - start, depth, False, True, False, place)

    def _own(self, depth: int, extent: Extent) -> Iterator[Entry]:
        start, length, kind, offset = extent.start, extent.length, extent.kind, extent.offset
        if self._layers[depth].cipher is not None:
            offset = None  # what is there is not what the guest sees
        if kind is Kind.ZERO:
            yield Entry(start, length, depth, True, True, bool(extent.allocated), offset)
        elif extent.allocated is False:  # a hole, whatever it reads as
            yield Entry(start, length, depth, False, False, False, None)
        elif kind is Kind.COMPRESSED or offset is None:
            yield Entry(start, length, depth, True, False, True, None)
        elif not self._may_be_hole(depth):
            yield Entry(start, length, depth, True, False, True, offset)
        else:
            at = offset
            for span in self._layers[depth].data.spans(offset, length):
                yield Entry(start + at - offset, span.length, depth, True, not span.is_data, True, at)
                at += span.length
            if at < offset + length:  # beyond the end of the file
                yield Entry(start + at - offset, offset + length - at, depth, True, True, True, at)

    def _may_be_hole(self, depth: int) -> bool:
        if depth not in self._holes:
            self._holes[depth] = self._layers[depth].data_may_be_holes
        return self._holes[depth]
