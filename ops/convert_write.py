"""What a worker of `convert` does with a chunk: read, find the zeroes, compress, ask for places, write."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from safeimg.drivers.errors import StorageError
from safeimg.drivers.formats.api import Placement, Planner
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import File
from safeimg.drivers.transfer.buffers import BufferPool
from safeimg.drivers.transfer.copy import zero_tail
from safeimg.drivers.transfer.core import CHUNK, Transfer
from safeimg.drivers.transfer.crew import Turns
from safeimg.drivers.transfer.digest import Written, digests, zero_digests
from safeimg.drivers.transfer.target import Target
from safeimg.drivers.transfer.view import Source
from safeimg.drivers.transfer.zero import data_runs, fill_zero
from safeimg.ops.convert_plan import Chunk, CopyFailed, Span
from safeimg.ops.steps import Move

AHEAD = 64 << 20  # bytes that a growing file is preallocated ahead of what is written

WORTHWHILE = 128 << 10  # bytes of a write that are worth a call of their own to allocate

Compress = Callable[[memoryview], bytes | None]


class Batch:
    """What a step collects from the workers. Lists are appended to by several threads at once."""

    def __init__(self, at: int) -> None:
        self.at = at  # everything before this guest offset has been given to workers
        self.written: list[Written] = []
        self.moves: list[Move] = []


class Space(Protocol):
    """Allocates a new file's space before it is written. Two threads that leave it to their writes slow each
    other down by a factor of up to ten (ext4, with its delayed allocation)."""

    def cover(self, offset: int, length: int) -> None:
        """Sees to it that the range is allocated, if the disk has room."""
        ...

    def trim(self) -> None:
        """Gives back what was not needed."""
        ...


class Ahead:
    """Space of a growing file, in long strides."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._until = file.length()

    def cover(self, offset: int, length: int) -> None:
        end = offset + length
        if end <= self._until:
            return
        with self._lock:
            if end > self._until:
                start, self._until = self._until, end + AHEAD
                try:
                    self._file.preallocate(start, self._until - start, keep_size=True)
                except StorageError:
                    self._until = 1 << 63  # the disk is nearly full: space for what is really written may do

    def trim(self) -> None:
        self._file.truncate(self._file.length())


class Exact:
    """Space of a file with holes: only of what is written."""

    def __init__(self, file: File) -> None:
        self._file = file

    def cover(self, offset: int, length: int) -> None:
        if length >= WORTHWHILE:
            try:
                self._file.preallocate(offset, length, keep_size=True)
            except StorageError:
                pass  # the write will say why

    def trim(self) -> None:
        pass


class Writer(NamedTuple):
    """Writes chunks of `source` to a target. One for all steps of an operation."""

    source: Source
    target: Target
    image: int  # the number that steps give its file
    planner: Planner
    old: Source  # what the target shows without the operation
    transfer: Transfer
    block: int  # granularity in bytes at which zeroes are looked for
    sparse: int  # bytes of zeroes that are worth leaving out; 0: none are
    zero_below: int  # guest offset below which zeroes have to be made
    compress: Compress | None
    undo: bool  # what is in live places is kept: data for them becomes moves
    space: Space | None  # of a new file

    def run(self, chunk: Chunk, buffers: BufferPool, batch: Batch, turns: Turns) -> None:
        """Writes one chunk, as far as that is possible before the step; the rest becomes moves of the
        batch. Raises `CopyFailed`."""
        window = buffers.get(chunk.length if chunk.copy else 0)
        data: list[Span] = []
        zero = list(chunk.zero)
        for span in chunk.copy:
            try:
                self.source.read_pieces(chunk.pieces, span.start, _of(window, chunk, span))
            except StorageError as error:
                raise CopyFailed(error, "reading", span.start if error.guest is None else error.guest) from error
            found, blank = self._sift(chunk, span, _of(window, chunk, span))
            data += found
            zero += blank
        try:
            if self.compress is not None:
                self._write_compressed(chunk, window, data, zero, buffers, batch, turns)
            else:
                self._write(chunk, window, data, zero, buffers, batch, turns)
        except StorageError as error:
            raise CopyFailed(error, "writing", chunk.start) from error

    def _write(self, chunk: Chunk, window: memoryview, data: list[Span], zero: list[Span],
               buffers: BufferPool, batch: Batch, turns: Turns) -> None:
        with turns.turn(chunk.ticket):
            places = [(span, self.planner.place(span.start, span.end - span.start)) for span in data]
            blanks = [(span, self.planner.zero(span.start, span.end - span.start)) for span in zero]
        for span, of in places:
            self._write_data(chunk, window, span, of, buffers, batch)
        for span, of in blanks:
            self._write_zeroes(span, of, buffers, batch)

    def _sift(self, chunk: Chunk, span: Span, content: memoryview) -> tuple[list[Span], list[Span]]:
        """What of a span is to be written, and what is to be made zero."""
        base = span.start
        data: list[Span] = []
        for start, end in self._looked_at(chunk, span):
            found = data_runs(content[start - base : end - base], self.block, self.sparse, start % self.block)
            for low, high in found:
                if data and data[-1].end == start + low:
                    low = data.pop().start - start
                data.append(Span(start + low, start + high))
        blank: list[Span] = []
        at = base
        for start, end in [*data, Span(span.end, span.end)]:
            if at < start and at < self.zero_below:
                blank.append(Span(at, start))
            at = end
        return data, blank

    def _looked_at(self, chunk: Chunk, span: Span) -> Iterator[Span]:
        """The parts in which zeroes are looked for. Where blocks are larger than what can be left out, one does not
        reach over the end of a piece of the source, as in qemu-img."""
        at = span.start
        if self.block > self.planner.cluster_size:
            for piece in chunk.pieces:
                if at < piece.extent.start < span.end:
                    yield Span(at, piece.extent.start)
                    at = piece.extent.start
        yield Span(at, span.end)

    def _write_data(self, chunk: Chunk, window: memoryview, span: Span, places: Sequence[Placement],
                    buffers: BufferPool, batch: Batch) -> None:
        for place in places:
            if self.undo and not place.fresh:
                batch.moves.append(Move(self.image, place.offset, place.length, place.start, place.start))
                continue
            own = Span(place.start, place.start + place.length)
            if span.start <= own.start and own.end <= span.end:
                content = _of(window, chunk, own)
            else:
                content = self._widened(place, span, _of(window, chunk, span), buffers)
            self._put(place.offset, content, place.start, batch, live=not place.fresh)
            if place.fresh:
                zero_tail(self.target, place, self.planner.granularity, buffers)

    def _write_zeroes(self, span: Span, places: Sequence[Placement], buffers: BufferPool,
                      batch: Batch) -> None:
        """Fills what the planner could not make zero by metadata."""
        for place in places:
            if not place.fresh:
                if self.undo:
                    batch.moves.append(Move(self.image, place.offset, place.length, None, place.start))
                    continue
                if self.target.cipher is None:
                    self.target.file.write_zeroes(place.offset, place.length, unmap=True)
                    found = zero_digests(place.length) if self.transfer.digests else b""
                    batch.written.append(Written(self.image, place.offset, place.length, found, live=True))
                    continue
            for part in _parts(place, self.planner.cluster_size):
                zeroed = self._widened(part, span, None, buffers)
                self._put(part.offset, zeroed, part.start, batch, live=not place.fresh)
            if place.fresh:
                zero_tail(self.target, place, self.planner.granularity, buffers)

    def _widened(self, place: Placement, span: Span, content: memoryview | None,
                 buffers: BufferPool) -> memoryview:
        """What a whole cluster will hold: `content` of `span` (None: zeroes), and around it what it shows
        now."""
        whole = buffers.get(place.length, slot=1)
        end = place.start + place.length
        low, high = max(place.start, span.start), min(end, span.end)
        if place.start < low:
            self.old.read_into(place.start, whole[: low - place.start])
        if high < end:
            self.old.read_into(high, whole[high - place.start :])
        part = whole[low - place.start : high - place.start]
        if content is None:
            fill_zero(part)
        else:
            part[:] = content[low - span.start : high - span.start]
        return whole

    def _put(self, offset: int, content: memoryview, guest: int | None, batch: Batch, *, live: bool = False) -> None:
        """Writes `content`, which is lost. `guest`: its guest offset; None for what is never encrypted."""
        if self.space is not None:
            self.space.cover(offset, len(content))
        if guest is None:
            self.target.file.pwrite(offset, content)
        else:
            self.target.write(content, offset, guest)
        self.transfer.hint(self.target.file, offset, len(content))
        found = digests(content) if self.transfer.digests else b""
        batch.written.append(Written(self.image, offset, len(content), found, live))

    def _write_compressed(self, chunk: Chunk, window: memoryview, data: list[Span], zero: list[Span],
                          buffers: BufferPool, batch: Batch, turns: Turns) -> None:
        """Clusters that get no smaller are written as they are. Neighbours in the file are written at
        once."""
        assert self.compress is not None
        unit = self.planner.cluster_size
        packed: list[tuple[Span, list[bytes]]] = []  # a cluster; it and its neighbours where they got smaller, or []
        small: list[bytes] = []  # the last of these
        behind = 0
        for start, end in data:
            for at in range(start, end, unit):
                span = Span(at, min(at + unit, end))
                stored = self.compress(self._whole(_of(window, chunk, span), unit, buffers))
                if stored is not None and small and at == behind:
                    small.append(stored)
                else:
                    small = [] if stored is None else [stored]
                    packed.append((span, small))
                behind = span.end
        plain: list[tuple[Span, Sequence[Placement]]] = []
        dense: list[tuple[int, bytes]] = []
        with turns.turn(chunk.ticket):
            for span, run in packed:
                if run:
                    offsets = self.planner.place_compressed(span.start, [len(stored) for stored in run])
                    dense += zip(offsets, run, strict=True)
                else:
                    plain.append((span, self.planner.place(span.start, span.end - span.start)))
            blanks = [(span, self.planner.zero(span.start, span.end - span.start)) for span in zero]
        for span, of in plain:
            self._write_data(chunk, window, span, of, buffers, batch)
        for offset, joined in _joined(dense):
            self._put(offset, memoryview(joined), None, batch)
        for span, of in blanks:
            self._write_zeroes(span, of, buffers, batch)

    def _whole(self, content: memoryview, unit: int, buffers: BufferPool) -> memoryview:
        """A whole cluster: beyond the end of the disk it holds zeroes."""
        if len(content) == unit:
            return content
        whole = buffers.get(unit, slot=2)
        whole[: len(content)] = content
        fill_zero(whole[len(content) :])
        return whole


def _of(window: memoryview, chunk: Chunk, span: Span) -> memoryview:
    return window[span.start - chunk.start : span.end - chunk.start]


def _parts(place: Placement, unit: int) -> Iterator[Placement]:
    step = max(CHUNK, unit)
    for at in range(0, place.length, step):
        yield Placement(place.start + at, min(step, place.length - at), place.offset + at, place.fresh)


def _joined(pieces: list[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    run: list[bytes] = []
    first = end = 0
    for offset, content in sorted(pieces):
        if run and offset != end:
            yield first, b"".join(run)
            run = []
        if not run:
            first = end = offset
        run.append(content)
        end += len(content)
    if run:
        yield first, b"".join(run)
