"""Check before touching: every range that a pending operation wrote must hold what the log says, or nothing is done.

- Sectors that metadata patches touched hold one of the values of `composite.py`.
- Data of solid steps has the recorded digests. Data of a step in flux, sector by sector, is what was there before
  (undo file) or what comes after (read again from the source).
- Images that were only read look as they did (device, inode, size, modification time).
- Space that the operation linked or is about to free is referenced by nobody else (`references.py`).

Everything else means that somebody wrote to an image meanwhile: `Conflict` names it, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from safeimg.drivers.errors import SecretMissing
from safeimg.drivers.formats.api import Cipher
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import File
from safeimg.drivers.transfer.buffers import BufferPool
from safeimg.drivers.transfer.copy import Part, parts
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.digest import BLOCK, SIZE, digests, zero_digests
from safeimg.drivers.transfer.loop import run_alone
from safeimg.drivers.transfer.target import Target
from safeimg.drivers.transfer.view import Content, read_stored
from safeimg.journal.errors import JournalError
from safeimg.journal.events import BeforeRecord, MoveRecord
from safeimg.journal.identity import identify, unchanged
from safeimg.journal.state import LiveStep, OperationState
from safeimg.journal.undo import UndoFile
from safeimg.ops.errors import Changed, Conflict
from safeimg.recovery.composite import SECTOR, Sector, composite, runs

Range = tuple[int, int, int]  # image, offset, length

CHUNK = 1 << 20  # bytes of data looked at in one go; a multiple of BLOCK


def verify(
    state: OperationState, targets: Mapping[int, Target], undo: UndoFile | None, view: Content | None,
    transfer: Transfer,
) -> None:
    """Raises `Conflict` unless every image is as the log says. Writes nothing.

    `targets`: the images by index. `view`: where moves copy from (None if there are none in flux). `transfer`: whose
    workers read. Where a secret was not given, nothing is known of what moves in flux write: they are not judged. Nor
    are those behind the point of no return, whose before-images nobody keeps."""
    files = {image: target.file for image, target in targets.items()}
    for image, file in files.items():
        _verify_metadata(file, composite(state.steps, image), state.cut.get(image))
    later: list[Range] = [(image, end, 1 << 63) for image, end in state.cut.items()]  # cut off, or written in place
    solid: list[_Solid] = []
    for step in reversed(state.steps):
        if step.in_flux and (state.no_return is None or step.prepared.number < state.no_return):
            _verify_flux(step, targets, undo, view)
        elif not step.in_flux:
            solid += _solid(step, files, len(later))
        prepared = step.prepared
        later += [(move.image, move.offset, move.length) for move in prepared.moves]
        later += [(patch.image, patch.offset, len(patch.after)) for patch in (*prepared.allocate, *prepared.link)]
    _verify_solid(solid, later, transfer)


def verify_sources(state: OperationState, files: Mapping[int, File]) -> None:
    """Raises `Conflict` if an image that the operation has only read, or only fenced, was changed by somebody else.

    An image that it writes to is known by its looks from when they are observed (behind its fence) until the
    operation itself changes it; then its ranges are what counts."""
    for index, file in files.items():
        if state.declared.images[index].writes and index not in state.observed:
            continue
        if not unchanged(state.identities[index], identify(file)):
            raise Conflict(
                f"{file.path}: somebody else wrote to it while the {state.declared.command} was pending; nothing was "
                f"written. Give the operation up with 'safeimg abandon'"
            )


def _verify_metadata(file: File, sectors: dict[int, Sector], limit: int | None) -> None:
    """`limit`: where the operation itself cut the file, or has begun to: nothing is left to check beyond, even if the
    step was taken back since."""
    for first, count in runs(sectors):
        start = first * SECTOR
        if limit is not None and start >= limit:
            continue
        content = file.pread(start, count * SECTOR)
        content += bytes(count * SECTOR - len(content))
        for number in range(first, first + count):
            at = (number - first) * SECTOR
            if not sectors[number].allows(content[at : at + SECTOR]):
                raise _changed(file, number * SECTOR, SECTOR, "metadata")


class _Solid(NamedTuple):
    """A range of a file with recorded digests."""

    image: int
    file: File
    offset: int
    length: int
    digests: bytes | None  # None: those of zeroes
    newer: int  # so many of the `later` ranges belong to newer steps


def _solid(step: LiveStep, files: Mapping[int, File], newer: int) -> Iterator[_Solid]:
    for fresh in step.prepared.fresh:
        yield _Solid(fresh.image, files[fresh.image], fresh.offset, fresh.length, fresh.digests, newer)
    recorded = iter(step.digests)
    for move in step.prepared.moves:
        expected = next(recorded, b"") if move.digested else None
        yield _Solid(move.image, files[move.image], move.offset, move.length, expected, newer)


def _verify_solid(ranges: Sequence[_Solid], later: Sequence[Range], transfer: Transfer) -> None:
    """Blocks that a newer step wrote to are that step's to answer for."""

    def look(part: Part, buffers: BufferPool) -> None:
        of = ranges[part.which]
        content = buffers.get(part.length)
        read_stored(of.file, of.offset + part.start, content)
        found, first = digests(content), part.start // BLOCK * SIZE
        expected = zero_digests(part.length) if of.digests is None else of.digests[first : first + len(found)]
        if found == expected:
            return
        for at in range(0, part.length, BLOCK):
            start, end = of.offset + part.start + at, of.offset + part.start + min(at + BLOCK, part.length)
            theirs = any(
                image == of.image and low < end and start < low + size for image, low, size in islice(later, of.newer)
            )
            digest = slice(at // BLOCK * SIZE, (at // BLOCK + 1) * SIZE)
            if not theirs and found[digest] != expected[digest]:
                raise _changed(of.file, start, end - start, "data")

    run_alone(lambda: transfer.each(parts((of.length for of in ranges), CHUNK), look))  # nothing is moved: no limit


def _verify_flux(step: LiveStep, targets: Mapping[int, Target], undo: UndoFile | None, view: Content | None) -> None:
    """Data in place, in flux: each sector is old or new. Without before-images nothing is known of the old."""
    if undo is None:
        return
    for move in step.prepared.moves:
        before = [record for record in step.prepared.before if _within(record, move)]
        file = targets[move.image].file
        for offset, content in _chunks(file, move.offset, move.length):
            old = _before(undo, before, offset, len(content))
            if content == old:
                continue
            try:
                new = _after(view, move, offset, len(content), targets[move.image].cipher)
            except (SecretMissing, JournalError):  # nothing is known of what comes after
                break
            for low in _sectors(offset, len(content)):
                high = min((offset + low) // SECTOR * SECTOR + SECTOR - offset, len(content))
                if content[low:high] not in (old[low:high], new[low:high]):
                    raise _changed(file, offset + low, high - low, "data")


def _within(record: BeforeRecord, move: MoveRecord) -> bool:
    return record.image == move.image and move.offset <= record.offset < move.offset + move.length


def _before(undo: UndoFile, records: Sequence[BeforeRecord], offset: int, length: int) -> bytes:
    """What was at the range; bytes that no record covers lay beyond the end of the file."""
    content = bytearray(length)
    for record in records:
        low, high = max(record.offset, offset), min(record.offset + record.length, offset + length)
        if low < high and record.undo is not None:
            kept = undo.read(record.undo, record.length, record.digest)
            content[low - offset : high - offset] = kept[low - record.offset : high - record.offset]
    return bytes(content)


def _after(view: Content | None, move: MoveRecord, offset: int, length: int, cipher: Cipher | None) -> bytes:
    """What the move writes to the range."""
    content = bytearray(length)
    if move.source is not None and view is not None:
        view.read_into(move.source + offset - move.offset, memoryview(content))
    if move.guest is not None and cipher is not None:
        cipher.encrypt(memoryview(content), offset, move.guest + offset - move.offset)
    return bytes(content)


def _sectors(offset: int, length: int) -> Iterator[int]:
    """Where the file's sectors begin within a range, its own beginning included."""
    yield 0
    yield from range(SECTOR - offset % SECTOR, length, SECTOR)


def _chunks(file: File, offset: int, length: int) -> Iterator[tuple[int, bytes]]:
    for at in range(offset, offset + length, CHUNK):
        size = min(CHUNK, offset + length - at)
        content = file.pread(at, size)
        yield at, content + bytes(size - len(content))


def _changed(file: File, offset: int, length: int, what: str) -> Changed:
    return Changed(
        f"{file.path}: somebody else changed {what} at offset {offset:#x} ({length} bytes)",
        "while the operation was pending; nothing was written. Undo that change, or give the operation up with "
        "'safeimg abandon'",
    )
