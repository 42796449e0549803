"""compare: whether two chains hold the same guest content.

No trio: starting it takes longer than comparing a gigabyte, and nothing here has to be cancelled at a
boundary. Two threads take pieces in order from one iterator, read both sides into page-aligned buffers and
compare them outside the interpreter lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from enum import Enum

from safeimg.drivers.errors import DriverError
from safeimg.drivers.formats.api import Image, Kind
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.transfer.buffers import Buffers
from safeimg.drivers.transfer.same import same
from safeimg.drivers.transfer.view import LayerExtent, View
from safeimg.drivers.transfer.zero import is_zero
from safeimg.ops.map import Entry, blocks

CHUNK = 2 << 20  # bytes, and what qemu-img's progress goes by
ALONE = 64 << 20  # bytes of an image up to which more threads do not pay
SECTOR = 512  # what qemu-img reports a difference to

Report = Callable[[int, int], None]


class Outcome(Enum):
    IDENTICAL = "identical"
    CONTENT = "content"  # differs at `offset`
    SIZE = "size"  # strict mode only
    STATUS = "status"  # strict mode only: allocated otherwise at `offset`


class Comparison(NamedTuple):
    outcome: Outcome
    offset: int = 0


class UnreadableError(DriverError):
    """The data of image `which` (0 or 1) cannot be read at guest `offset`. `__cause__` says why."""

    def __init__(self, which: int, offset: int) -> None:
        self.which = which
        self.offset = offset
        super().__init__(f"image {which} is unreadable at {offset:#x}")


class UnmappedError(DriverError):
    """The metadata of image `which` does not say where its data is. `__cause__` says why."""

    def __init__(self, which: int) -> None:
        self.which = which
        super().__init__(f"image {which} has damaged metadata")


class _Piece(NamedTuple):
    """A guest range to look at. `parts`: the extents of each image there; None where it is known to be
    zero."""

    start: int
    length: int
    parts: tuple[Sequence[LayerExtent] | None, Sequence[LayerExtent] | None]


def compare(
    first: Sequence[Image],
    second: Sequence[Image],
    *,
    strict: bool,
    report: Report,
    larger: Callable[[], None],
) -> Comparison:
    """Compares two chains (top first). A longer image is the same if the rest of it is zero.

    `report(done, total)` is called with guest bytes as they are taken up, in order; `larger()` when the
    common part is the same and the rest of the longer image is next. Raises `UnreadableError`,
    `UnmappedError`."""
    sizes = first[0].size, second[0].size
    shared, total = min(sizes), max(sizes)
    report(0, total)
    if strict and shared != total:
        return Comparison(Outcome.SIZE)
    views = View(first), View(second)
    status = _status_mismatch(first, second, shared) if strict else None
    end = shared if status is None else status
    found = _Search(views, _pieces(views, 0, end), report, total).run()
    if found is not None:
        return Comparison(Outcome.CONTENT, found)
    if status is not None:
        return Comparison(Outcome.STATUS, status)
    if shared != total:
        larger()
        longer = 0 if sizes[0] == total else 1
        found = _Search(views, _rest(views[longer], longer, shared, total), report, total).run()
        if found is not None:
            return Comparison(Outcome.CONTENT, found)
    return Comparison(Outcome.IDENTICAL)


def _guarded(which: int, extents: Iterator[LayerExtent]) -> Iterator[LayerExtent]:
    try:
        yield from extents
    except DriverError as error:
        raise UnmappedError(which) from error


def _holds(piece: LayerExtent) -> bool:
    return piece.extent.kind in (Kind.DATA, Kind.COMPRESSED)


def _pieces(views: tuple[View, View], start: int, end: int) -> Iterator[_Piece]:
    """The range in pieces that each image stores in one way, of at most `CHUNK` bytes.

    Neighbouring compressed clusters make one piece."""
    sides = [_runs(which, view, start, end) for which, view in enumerate(views)]
    heads = [next(side, None) for side in sides]
    at = start
    while at < end:
        stop = end
        parts: list[Sequence[LayerExtent] | None] = []
        for head in heads:
            assert head is not None
            stop = min(stop, head[1])
            parts.append(head[2])
        if parts[0] is parts[1] is None:
            yield _Piece(at, stop - at, (None, None))
            at = stop
        while at < stop:
            length = min(CHUNK, stop - at)
            yield _Piece(at, length, (_within(parts[0], at, length), _within(parts[1], at, length)))
            at += length
        for which, head in enumerate(heads):
            if head is not None and head[1] <= at:
                heads[which] = next(sides[which], None)


def _runs(
    which: int, view: View, start: int, end: int
) -> Iterator[tuple[int, int, Sequence[LayerExtent] | None]]:
    """Start, end and extents of each run; no extents for zeroes. 64 compressed clusters make one run."""
    held: list[LayerExtent] = []
    for piece in _guarded(which, view.extents(start, end - start)):
        low, high = piece.extent.start, piece.extent.start + piece.extent.length
        if held and (piece.extent.kind is not Kind.COMPRESSED or len(held) == 64):
            yield held[0].extent.start, low, held
            held = []
        if piece.extent.kind is Kind.COMPRESSED:
            held.append(piece)
        else:
            yield low, high, [piece] if _holds(piece) else None
    if held:
        yield held[0].extent.start, held[-1].extent.start + held[-1].extent.length, held


def _within(parts: Sequence[LayerExtent] | None, start: int, length: int) -> Sequence[LayerExtent] | None:
    if parts is None or len(parts) == 1:
        return parts
    return [p for p in parts if p.extent.start < start + length and p.extent.start + p.extent.length > start]


def _rest(view: View, which: int, start: int, end: int) -> Iterator[_Piece]:
    """The end of the longer image, which the other one has as zeroes."""
    for low, high, parts in _runs(which, view, start, end):
        at = low
        while at < high:
            length = min(CHUNK, high - at) if parts is not None else high - at
            own = _within(parts, at, length)
            yield _Piece(at, length, (own, None) if which == 0 else (None, own))
            at += length


class _Search:
    """Looks for the first difference with a few threads."""

    def __init__(
        self, views: tuple[View, View], pieces: Iterator[_Piece], report: Report, total: int
    ) -> None:
        self._views = views
        self._pieces = pieces
        self._report = report
        self._total = total
        self._lock = threading.Lock()
        self._found: int | None = None
        self._failure: tuple[int, BaseException] | None = None  # where, and what
        self._at = 0  # where the next piece starts
        self._busy: set[int] = set()  # where the pieces being compared start

    def run(self) -> int | None:
        """The offset of the first difference, or None."""
        helpers = _helpers() if self._total > ALONE else 0
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(helpers)]
        for thread in threads:
            thread.start()
        self._work()
        for thread in threads:
            thread.join()
        if self._failure is not None and (self._found is None or self._failure[0] <= self._found):
            raise self._failure[1]
        return self._found

    def _work(self) -> None:
        buffers = Buffers()
        while (piece := self._take()) is not None:
            try:
                found = self._difference(piece, buffers)
            except BaseException as error:
                self._fail(piece.start, error)
                return
            with self._lock:
                self._busy.discard(piece.start)
                if found is not None:
                    self._found = found if self._found is None else min(self._found, found)
                    return
                self._show()

    def _take(self) -> _Piece | None:
        """The next piece with something to read: in order, so that the first difference is found."""
        with self._lock:
            try:
                while self._found is None and self._failure is None:
                    piece = next(self._pieces, None)
                    if piece is None:
                        return None
                    self._at = piece.start + piece.length
                    if piece.parts != (None, None):
                        self._busy.add(piece.start)
                        return piece
                    self._show()
            except BaseException as error:
                self._failure = self._at, error
            return None

    def _show(self) -> None:
        """Reports up to where all is compared."""
        if self._found is None and self._failure is None:
            self._report(min(self._busy, default=self._at), self._total)

    def _fail(self, start: int, error: BaseException) -> None:
        with self._lock:
            if self._failure is None or start < self._failure[0]:
                self._failure = start, error

    def _difference(self, piece: _Piece, buffers: Buffers) -> int | None:
        sides = []
        for which, parts in enumerate(piece.parts):
            if parts is not None:
                side = buffers.get(piece.length, which)
                try:
                    self._views[which].read_pieces(parts, piece.start, side)
                except DriverError as error:
                    raise UnreadableError(which, piece.start) from error
                sides.append(side)
        if _same(sides, 0, piece.length):
            return None
        at = 0
        while _same(sides, at, min(at + SECTOR, piece.length)):
            at += SECTOR
        return piece.start + at


def _same(sides: Sequence[memoryview], start: int, end: int) -> bool:
    """Whether both sides are equal there; one side alone: whether it is zero."""
    if len(sides) == 1:
        return is_zero(sides[0][start:end])
    return same(sides[0], sides[1], start, end)


def _helpers() -> int:
    """Threads besides the calling one: some read while another compares."""
    return 1 if len(os.sched_getaffinity(0)) < 4 else 3


def _status_mismatch(first: Sequence[Image], second: Sequence[Image], size: int) -> int | None:
    """Where the images are first allocated differently, by what qemu-img goes by."""
    sides = [_statuses(which, layers, size) for which, layers in enumerate((first, second))]
    heads = [next(side, None) for side in sides]
    at = 0
    while at < size:
        assert heads[0] is not None and heads[1] is not None
        if heads[0][1] != heads[1][1]:
            return at
        at = min(heads[0][0], heads[1][0])
        for which, head in enumerate(heads):
            if head is not None and head[0] <= at:
                heads[which] = next(sides[which], None)
    return None


def _statuses(which: int, layers: Sequence[Image], size: int) -> Iterator[tuple[int, tuple[bool, ...]]]:
    """End and status of each block: allocated, zero, data, with an offset, at the end of the image."""
    try:
        for entry in blocks(layers, 0, size):
            end = entry.start + entry.length
            present = entry.present or _cut_short(layers, entry)
            yield end, (present, entry.zero, entry.data, entry.offset is not None, end == size)
    except DriverError as error:
        raise UnmappedError(which) from error


def _cut_short(layers: Sequence[Image], entry: Entry) -> bool:
    """Zeroes because the layer below is shorter count as allocated in that layer."""
    return entry.depth + 1 < len(layers)
