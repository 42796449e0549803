"""What `convert` has to do with each part of the source: copy it, make it zero, or leave it out.

The source's extents are cut at multiples of a window (a mebibyte, or the target's cluster where that is
larger). What a window holds of data becomes one `Chunk` for a worker; long stretches without data become one
`Zeroes`, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from safeimg.drivers.errors import StorageError
from safeimg.drivers.formats.api import Kind
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.transfer.view import LayerExtent, Source


class Span(NamedTuple):
    """Guest offsets `start` to `end`."""

    start: int
    end: int


class Chunk(NamedTuple):
    """A part of the source to be read and written."""

    ticket: int
    start: int
    length: int  # up to here everything is taken care of
    copy: tuple[Span, ...]  # to be read, and written where it is not zero: whole clusters of the target
    zero: tuple[Span, ...]  # to be made zero: whole clusters of the target
    pieces: tuple[LayerExtent, ...]  # cover the window

    @property
    def data(self) -> int:
        """Bytes to be read."""
        return sum(end - start for start, end in self.copy)


class Rules(NamedTuple):
    """What becomes of which part of the source."""

    unit: int  # bytes of a target cluster, 1 for raw
    window: int  # bytes that one chunk covers, a multiple of `unit`
    everything: bool = False  # -S 0: zeroes are data too
    zero_below: int = 0  # guest offset from which on the target reads as zeroes already
    skip_below: int = 0  # below it the target's backing image shows what the source's top does not have

    @property
    def longest_zeroes(self) -> int:
        """Bytes that one chunk makes zero at most."""
        return 64 * self.window


class _Fate(Enum):
    COPY = "copy"
    ZERO = "zero"
    NOTHING = "nothing"


class CopyFailed(StorageError):
    """`what` ("reading", "writing", "reading block status") failed at or behind guest offset `at`."""

    def __init__(self, error: StorageError, what: str, at: int) -> None:
        super().__init__(error.path, error.action, OSError(error.errno, error.strerror))
        self.what = what
        self.at = at


class _Part(NamedTuple):
    fate: _Fate
    piece: LayerExtent


def chunks(source: Source, start: int, rules: Rules) -> Iterator[Chunk]:
    """The chunks of the source from guest offset `start` (an end of an earlier chunk) on, without gaps.

    A chunk may be empty (nothing to copy or to make zero): it says that a stretch needs nothing."""
    window = rules.window
    held: list[_Part] = []  # the parts of the window under way
    at = opened = start
    ticket = 0
    for piece in _pieces(source, start):
        for part in _judge(piece, rules):
            end = part.piece.extent.start + part.piece.extent.length
            while at < end:
                whole = (end - at) // window * window
                if not held and part.fate is not _Fate.COPY and at % window == 0 and whole:
                    length = min(whole, rules.longest_zeroes) if part.fate is _Fate.ZERO else whole
                    zero = (Span(at, at + length),) if part.fate is _Fate.ZERO else ()
                    yield Chunk(ticket, at, length, (), zero, ())
                    ticket += 1
                    at += length
                    opened = at
                    continue
                stop = min(end, at - at % window + window)
                held.append(_cut(part, at, stop))
                at = stop
                if at % window == 0:
                    yield _chunk(ticket, opened, at, held, rules, source.size)
                    ticket += 1
                    held = []
                    opened = at
    if held:
        yield _chunk(ticket, opened, at, held, rules, source.size)


def _pieces(source: Source, start: int) -> Iterator[LayerExtent]:
    """What the source holds from `start` on. Raises `CopyFailed`."""
    at = start
    try:
        for piece in source.extents(start, source.size - start):
            yield piece
            at = piece.extent.start + piece.extent.length
    except StorageError as error:
        raise CopyFailed(error, "reading block status", at) from error


def _judge(piece: LayerExtent, rules: Rules) -> Iterator[_Part]:
    """The piece, cut where other rules begin to hold."""
    at, end = piece.extent.start, piece.extent.start + piece.extent.length
    for border in sorted((rules.zero_below, rules.skip_below, end)):
        stop = min(border, end)
        if at < stop:
            part = _cut(_Part(_Fate.COPY, piece), at, stop)
            yield _Part(_fate(part.piece, rules), part.piece)
            at = stop


def _fate(piece: LayerExtent, rules: Rules) -> _Fate:
    start = piece.extent.start
    if piece.layer > 0 and start < rules.skip_below:
        return _Fate.NOTHING
    if rules.everything or piece.extent.kind is not Kind.ZERO:
        return _Fate.COPY
    return _Fate.ZERO if start < rules.zero_below else _Fate.NOTHING


def _cut(part: _Part, start: int, end: int) -> _Part:
    """The guest range `start` to `end` of a part. Of a compressed cluster the whole stays known."""
    layer, extent = part.piece
    if extent.start == start and extent.start + extent.length == end:
        return part
    offset = extent.offset
    if offset is not None and extent.kind is not Kind.COMPRESSED:
        offset += start - extent.start
    piece = LayerExtent(layer, extent._replace(start=start, length=end - start, offset=offset))
    return _Part(part.fate, piece)


def _chunk(ticket: int, start: int, end: int, parts: list[_Part], rules: Rules, size: int) -> Chunk:
    """One window's parts, rounded to the target's clusters: what needs a part of a cluster needs all of
    it."""
    unit = rules.unit
    copy: list[Span] = []
    zero: list[Span] = []

    def add(low: int, high: int) -> None:
        if low < high and copy and low <= copy[-1].end:
            copy[-1] = Span(copy[-1].start, max(copy[-1].end, high))
        elif low < high:
            copy.append(Span(low, high))

    def floor(offset: int) -> int:
        return max(start, offset - offset % unit)

    def ceiling(offset: int) -> int:
        return min(-(-offset // unit) * unit, size)

    for fate, piece in parts:
        low = piece.extent.start
        high = low + piece.extent.length
        if fate is _Fate.COPY:
            add(floor(low), ceiling(high))
        elif fate is _Fate.ZERO:
            first, last = ceiling(low), high if high == size else floor(high)
            if first >= last:  # within one cluster, or on both sides of a border
                add(floor(low), ceiling(high))
                continue
            if first > low:
                add(floor(low), first)
            zero.append(Span(first, last))
            if last < high:
                add(last, ceiling(high))
    covered = [part.piece for part in parts]
    return Chunk(ticket, start, end - start, tuple(copy), tuple(_without(zero, copy)), tuple(covered))


def _without(spans: list[Span], taken: list[Span]) -> Iterator[Span]:
    """What of `spans` lies in none of `taken`; both in order and each without overlaps."""
    for start, end in spans:
        at = start
        for low, high in taken:
            if high <= at or low >= end:
                continue
            if low > at:
                yield Span(at, low)
            at = max(at, high)
        if at < end:
            yield Span(at, end)
