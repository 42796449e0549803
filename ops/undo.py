"""undo: a completed operation is taken back, from what was kept of it (`journal.kept`).

The steps of the operation are taken back one by one, the newest first, each by up to two steps of the undo:

    back    its links, and the data that it overwrote in place
    rest    content that it gave up (freed, cut off, written over), and its allocations

so that what a link leads to is there before the link is, as everywhere. The images hold to the byte what the operation
left (`recovery.undo` has checked it), hence they end as they were to the byte before it, where anything referred to
it. An undo has a log like any other operation: killed, it is finished or rolled back.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

from safeimg.drivers.formats.api import Changes, Image, Patch
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.drivers.transfer.loop import blocking
from safeimg.journal import kept
from safeimg.journal.errors import JournalError
from safeimg.journal.events import BeforeRecord, PatchRecord
from safeimg.journal.history import UNDO, UNDOES
from safeimg.journal.kept import Record
from safeimg.journal.state import LiveStep, OperationState
from safeimg.journal.undo import UndoFile
from safeimg.ops.errors import Conflict, Impossible
from safeimg.ops.launch import Environment, Job
from safeimg.ops.reopening import started_settings
from safeimg.ops.session import Touched
from safeimg.ops.steps import Move, Step

_REPAIRS = ("check", "repair")  # what such an image refers to tells nothing


class _Part(NamedTuple):
    """One step of an undo: a half of a step that is taken back."""

    step: LiveStep | None  # None: what the operation gave up at its end
    number: int
    rest: bool


class Undo:
    """The steps that take back the operation of `record`. `images`: those that it wrote to, in its order."""

    def __init__(self, images: Sequence[Image], record: Record) -> None:
        self._record = record
        state = record.state
        written = [index for index, image in enumerate(state.declared.images) if image.writes]
        self._own = {index: own for own, index in enumerate(written)}  # its numbers of images to ours
        self._images = images
        self._fenced = {
            self._own[patch.image]
            for step in state.steps
            if step.prepared.name == "fence"
            for patch in step.prepared.link
        }

    def total(self) -> int:
        """Bytes of data that are put back."""
        return sum(move.length for part in self._parts() for move in self._moves(part))

    def finish(self) -> Sequence[tuple[int, Patch]]:
        """Takes the fences down. An image that had been marked as corrupt before the operation is so again."""
        found = []
        for own in sorted(self._fenced):
            driver = lookup(self._images[own].format)
            image = driver.open(self._images[own].file, repair=True)
            found += [(own, patch) for patch in driver.unfence(image)]
        return tuple(found)

    def discards(self) -> Sequence[tuple[int, int, int]]:
        return ()

    async def steps(self, cursor: Any | None) -> AsyncIterator[Step]:
        at = -1 if cursor is None else int(cursor["at"])
        if at < 0:
            changes = [(own, lookup(image.format).fence(image)) for own, image in enumerate(self._images)]
            yield Step("fence", {"at": 0}, 0, changes=[pair for pair in changes if pair[1]])
        parts = self._parts()
        done = sum(move.length for part in parts[: max(at, 0)] for move in self._moves(part))
        for number in range(max(at, 0), len(parts)):
            moves = self._moves(parts[number])
            done += sum(move.length for move in moves)
            changes = await blocking(self._changes, parts[number])
            if moves or changes:
                yield Step(UNDO, {"at": number + 1}, done, moves=moves, changes=changes)
        lengths = self._record.state.started.lengths if self._record.state.started is not None else ()
        cut = [
            (own, lengths[index])
            for index, own in self._own.items()
            if lengths[index] < self._images[own].file.length()
        ]
        if cut:
            yield Step("trim", {"at": len(parts)}, done, truncate=cut, no_return=True)

    def _parts(self) -> list[_Part]:
        state = self._record.state
        parts = [_Part(None, state.last_number + 1, True)]
        for step in reversed(state.steps):
            if step.prepared.name != "fence":
                parts += [_Part(step, step.prepared.number, False), _Part(step, step.prepared.number, True)]
        return parts

    def _moves(self, part: _Part) -> list[Move]:
        if part.rest:
            records: Sequence[BeforeRecord] = self._record.state.given_up.get(part.number, ())
        else:
            records = () if part.step is None else part.step.prepared.before
        return [
            Move(self._own[each.image], each.offset, each.length, each.undo, 0)
            for each in records
            if each.undo is not None or not self._is_cut(part, each)
        ]

    def _is_cut(self, part: _Part, record: BeforeRecord) -> bool:
        """Whether the range lay in what the step cut off the file: made longer again, it holds zeroes by itself."""
        return part.step is not None and any(
            each.image == record.image and each.after <= record.offset for each in part.step.prepared.lengths
        )

    def _changes(self, part: _Part) -> list[tuple[int, Changes]]:
        if part.step is None:
            return []
        prepared = part.step.prepared
        patches = prepared.allocate if part.rest else prepared.link
        made = []
        for index, own in self._own.items():
            length = max((each.before for each in prepared.lengths if each.image == index), default=0)
            file = self._images[own].file
            changes = Changes(
                link=tuple(_inverse(self._images[own], [each for each in patches if each.image == index])),
                length=length if part.rest and length > file.length() else None,
            )
            if changes:
                made.append((own, changes))
        return made


def _inverse(image: Image, patches: Sequence[PatchRecord]) -> Iterator[Patch]:
    """What puts the bytes before the patches back, the last of them first."""
    for patch in reversed(patches):
        if patch.before is not None:  # else nobody refers to that space any more
            yield Patch(patch.offset, image.file.pread(patch.offset, len(patch.before)), patch.before)


class KeptSource:
    """The before-images in an undo file, as what moves copy from (`Content`): the offset is that in the file."""

    def __init__(self, undo: UndoFile | None, records: Iterable[BeforeRecord]) -> None:
        self._undo = undo
        self._records = sorted(
            (each.undo, each.length, each.digest) for each in records if each.undo is not None
        )
        self._starts = [start for start, _, _ in self._records]

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills `buffer` from one before-image. Raises `LogDamaged` if that is not what was kept."""
        index = bisect_right(self._starts, start) - 1
        if self._undo is None or index < 0:
            raise JournalError("what was kept of the operation is incomplete: its before-images are gone")
        at, length, digest = self._records[index]
        kept_bytes = self._undo.read(at, length, digest)
        buffer[:] = kept_bytes[start - at : start - at + len(buffer)]


class _Stranded:
    """An undo without what was kept: nothing but rolling it back is left."""

    def __init__(self, problem: str) -> None:
        self._problem = problem

    def steps(self, cursor: Any | None) -> AsyncIterator[Step]:
        raise Impossible(self._problem)

    def finish(self) -> Sequence[tuple[int, Patch]]:
        return ()

    def discards(self) -> Sequence[tuple[int, int, int]]:
        return ()


def _touched(images: Sequence[Image], roles: Sequence[str]) -> list[Touched]:
    return [
        Touched(role, image.file.path, image.format, image.file, True)
        for role, image in zip(roles, images, strict=True)
    ]


def open_images(fs: FileSystem, home: str, state: OperationState, cache: str) -> list[Image]:
    """The images that an operation, declared as in `state`, wrote to, open for writing whatever state they are in.
    No secrets are needed: it is what is on disk that is put back. External data files count as raw images."""
    folder = os.path.dirname(fs.resolve(home))
    images: list[Image] = []
    try:
        for index, record in enumerate(state.declared.images):
            if record.writes:
                path = home if index == 0 else os.path.normpath(os.path.join(folder, record.path))
                file = fs.open(path, write=True, cache=cache, locking=True)
                try:
                    images.append(lookup(record.format).open(file, repair=True))
                except BaseException:
                    file.close()
                    raise
    except BaseException:
        for image in images:
            image.close()
        raise
    return images


def new_job(images: list[Image], record: Record) -> Job:
    """The undo of the operation of `record`, whose images are open (`open_images`)."""
    return _job(images, record, _roles(record))


def _roles(record: Record) -> list[str]:
    return [image.role for image in record.state.declared.images if image.writes]


def open_layers(fs: FileSystem, home: str, state: OperationState, secrets: Secrets) -> list[Image]:
    """See `registry.Reopener`."""
    return open_images(fs, home, state, "writeback")


def make_job(layers: list[Image], state: OperationState, environment: Environment) -> Job:
    """See `registry.Reopener`."""
    home = layers[0].file.path
    settings = started_settings(home, state, {UNDOES: str, "record": str}, UNDO)
    try:
        record = kept.load(environment.fs, settings["record"])
    except JournalError as error:
        roles = [image.role for image in state.declared.images]
        gone = f"{home}: the undo cannot go on, only be rolled back: {error}"
        return Job(UNDO, _Stranded(gone), _touched(layers, roles), layers, KeptSource(None, []), settings)
    written = [image for image in record.state.declared.images if image.writes]
    if record.state.declared.operation != settings[UNDOES] or len(written) != len(layers):
        record.close()
        raise Conflict(f"{home}: what was kept is not of the operation that was being undone")
    return _job(layers, record, [image.role for image in state.declared.images])


def _job(images: list[Image], record: Record, roles: Sequence[str]) -> Job:
    state = record.state
    operation = Undo(images, record)
    source = KeptSource(record.undo, record.before_images)
    settings = {
        UNDOES: state.declared.operation, "command": state.declared.command, "record": record.path,
    }  # fmt: skip
    return Job(
        UNDO, operation, _touched(images, roles), images, source, settings, total=operation.total(),
        damaged=state.declared.command in _REPAIRS,
    )  # fmt: skip
