"""What is written around a step: before-images of what it overwrites, and structures that nobody references yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from safeimg.drivers.storage.api import File
from safeimg.drivers.transfer.buffers import BufferPool
from safeimg.drivers.transfer.copy import Part, parts
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.digest import Written, digests
from safeimg.drivers.transfer.zero import is_zero
from safeimg.journal.events import BeforeRecord
from safeimg.journal.undo import UndoFile
from safeimg.ops.steps import Move


async def save_before(
    transfer: Transfer, moves: Sequence[Move], files: Sequence[File], undo: UndoFile
) -> tuple[BeforeRecord, ...]:
    """Copies what the moves will overwrite to the undo file, chunk by chunk in workers.

    Holes and zeroes take no space there. What lies beyond the end of a file is a hole. The space for all data is
    reserved first, so that a full disk is found before anything is begun."""
    records: list[BeforeRecord] = []  # appended to from several threads
    ranges: list[tuple[int, int, int]] = []  # image, offset, length of what is data
    for move in moves:
        end = move.offset
        for start, length, is_data, _ in files[move.image].spans(move.offset, move.length):
            end = start + length
            if is_data:
                ranges.append((move.image, start, length))
            else:
                records.append(BeforeRecord(move.image, start, length, None, True, b""))
        if end < move.offset + move.length:
            records.append(BeforeRecord(move.image, end, move.offset + move.length - end, None, True, b""))
    undo.reserve(sum(length for _, _, length in ranges))

    def work(part: Part, buffers: BufferPool) -> None:
        image, start, _ = ranges[part.which]
        buffer = buffers.get(part.length)
        offset = start + part.start
        got = files[image].pread_into(offset, buffer)
        buffer[got:] = bytes(part.length - got)
        if is_zero(buffer):
            records.append(BeforeRecord(image, offset, part.length, None, False, b""))
        else:
            kept, digest = undo.append(buffer)
            records.append(BeforeRecord(image, offset, part.length, kept, False, digest))

    await transfer.each(parts(length for _, _, length in ranges), work, done=lambda part: 0)
    return tuple(_merge(sorted(records, key=lambda record: record[:2])))


def _merge(records: Iterable[BeforeRecord]) -> Iterator[BeforeRecord]:
    """Records in order; neighbours without bytes in the undo file become one record."""
    held: BeforeRecord | None = None
    for record in records:
        if (
            held is not None
            and held.undo is None is record.undo
            and (held.image, held.offset + held.length, held.hole) == (record.image, record.offset, record.hole)
        ):
            held = held._replace(length=held.length + record.length)
            continue
        if held is not None:
            yield held
        held = record
    if held is not None:
        yield held


def write_fresh(file: File, pieces: Iterable[tuple[int, bytes]]) -> list[Written]:
    """Puts new structures (offset, content) into space of the home image that nobody references yet
    (`Changes.fresh`). A disk without a size has empty tables, which take none."""
    written = []
    for offset, content in pieces:
        if len(content):
            file.pwrite(offset, content)
            written.append(Written(0, offset, len(content), digests(content)))
    return written
