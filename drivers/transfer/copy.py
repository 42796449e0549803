"""Copying primitives: what operations and the engine do with guest data in bulk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from safeimg.drivers.formats.api import Placement
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.transfer.buffers import BufferPool
from safeimg.drivers.transfer.core import CHUNK, Transfer
from safeimg.drivers.transfer.digest import BLOCK, Written, digests
from safeimg.drivers.transfer.target import Target
from safeimg.drivers.transfer.view import Content, Source
from safeimg.drivers.transfer.zero import fill_zero

ZERO_CHUNK = 1 << 30  # bytes that one `write_zeroes` covers: cancellation comes between two


class Part(NamedTuple):
    """A chunk of one of several ranges."""

    which: int  # of the range
    start: int  # within the range
    length: int


def parts(lengths: Iterable[int], limit: int = CHUNK) -> Iterator[Part]:
    """Cuts ranges of the given lengths into parts of at most `limit` bytes, in order."""
    for index, length in enumerate(lengths):
        for start in range(0, length, limit):
            yield Part(index, start, min(limit, length - start))


class FileMove(Protocol):
    """What `ops.steps.Move` says: data of a guest range (`source`; None: zeroes) goes to a range of a
    file, which is at `guest` of the image written."""

    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def source(self) -> int | None: ...
    @property
    def guest(self) -> int: ...


async def write_moves(transfer: Transfer, view: Content | None, moves: Sequence[tuple[Target, FileMove]], *,
                      unmap: bool = False) -> list[bytes]:
    """Writes each move into its file; the digests of what is there then, in order (empty for plain zeroes).

    `view` may be None if no move has a source. Moves must not overlap, nor read what another one writes.
    `unmap`: zeroes become holes where they are not encrypted. Zeroes are neither progress nor limited in
    rate."""
    made: list[dict[int, bytes]] = [{} for _ in moves]

    def work(part: Part, buffers: BufferPool) -> None:
        target, move = moves[part.which]
        at = move.offset + part.start
        if _is_plain_zero(target, move):
            target.file.write_zeroes(at, part.length, unmap=unmap)
            return
        buffer = buffers.get(part.length)
        if move.source is None:
            fill_zero(buffer)
        else:
            assert view is not None
            view.read_into(move.source + part.start, buffer)
        target.write(buffer, at, move.guest + part.start)
        transfer.hint(target.file, at, part.length)
        if transfer.digests:
            made[part.which][part.start] = digests(buffer)

    def planned() -> Iterator[Part]:
        for index, (target, move) in enumerate(moves):
            for part in parts([move.length], ZERO_CHUNK if _is_plain_zero(target, move) else CHUNK):
                yield Part(index, part.start, part.length)

    def cost(part: Part) -> int:
        return 0 if moves[part.which][1].source is None else part.length

    await transfer.each(planned(), work, cost=cost)
    return [b"".join(digest for _, digest in sorted(of.items())) for of in made]


def _is_plain_zero(target: Target, move: FileMove) -> bool:
    return move.source is None and target.cipher is None


async def copy_fresh(transfer: Transfer, view: Source, image: int, target: Target,
                     placements: Sequence[Placement], *, granularity: int = 1) -> list[Written]:
    """Writes the view's content of each placement to its place in `target`, and tells what was written.

    A placement that does not end at a multiple of the planner's `granularity` is one that the end of the virtual
    disk clips: what lies behind up to that multiple is written as zeroes, so that nothing old shows when the disk
    grows. Neighbours in the file are reported as one."""
    made: list[dict[int, bytes]] = [{} for _ in placements]

    def work(part: Part, buffers: BufferPool) -> None:
        place = placements[part.which]
        at = place.offset + part.start
        buffer = buffers.get(part.length)
        view.read_into(place.start + part.start, buffer)
        target.write(buffer, at, place.start + part.start)
        transfer.hint(target.file, at, part.length)
        if transfer.digests:
            made[part.which][part.start] = digests(buffer)
        if part.start + part.length == place.length:
            zero_tail(target, place, granularity, buffers)

    await transfer.each(parts(place.length for place in placements), work, cost=lambda part: part.length)
    return join(
        Written(image, place.offset, place.length, b"".join(digest for _, digest in sorted(of.items())))
        for place, of in zip(placements, made, strict=True)
    )


def zero_tail(target: Target, place: Placement, granularity: int, buffers: BufferPool) -> None:
    """Fills what lies behind `place`, up to a multiple of `granularity`, with zeroes."""
    end = place.start + place.length
    target.zero(place.offset + place.length, -end % granularity, end, buffers)


def join(pieces: Iterable[Written]) -> list[Written]:
    """Sorted, with pieces that continue each other as one where the digests allow it."""
    joined: list[Written] = []
    run: list[Written] = []  # as one
    end = 0
    for piece in sorted(pieces):
        if run and piece.offset == end and not (end - run[0].offset) % BLOCK and _alike(piece, run[0]):
            end += piece.length
        else:
            if run:
                joined.append(_as_one(run))
                run = []
            end = piece.offset + piece.length
        run.append(piece)
    if run:
        joined.append(_as_one(run))
    return joined


def _alike(piece: Written, other: Written) -> bool:
    return piece.image == other.image and piece.live == other.live


def _as_one(run: Sequence[Written]) -> Written:
    first, last = run[0], run[-1]
    if len(run) == 1:
        return first
    length = last.offset + last.length - first.offset
    return first._replace(length=length, digests=b"".join(piece.digests for piece in run))
