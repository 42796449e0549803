"""A pending operation's journal while somebody works on it: its log, its undo file, the participants' pointers.

Begin: log with `Declared` | pointers | undo file | `Started`. End: outcome | `Settled` | history | kept for undo |
pointers removed | undo file removed | log removed. Each `|` is a sync; a crash anywhere leaves either nothing, or a log
that says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from safeimg.drivers.errors import StorageError, SyncFailed
from safeimg.drivers.formats.api import Cipher, Image
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import File, FileSystem
from safeimg.journal import find, kept, place
from safeimg.journal.clock import now
from safeimg.journal.errors import JournalError, JournalUnavailable, LogForeign
from safeimg.journal.events import (
    ChangedOutside,
    Completed,
    Declared,
    Event,
    Identity,
    ImageRecord,
    Settled,
    Started,
)
from safeimg.journal.files import remove_durably
from safeimg.journal.history import UNDO, UNDOES, History, PendingRow
from safeimg.journal.identity import identify
from safeimg.journal.kept import Keeping
from safeimg.journal.log import Log
from safeimg.journal.owner import current_owner
from safeimg.journal.pointer import NEW_SUFFIX, Pointer, write_pointer
from safeimg.journal.state import OperationState, fold
from safeimg.journal.story import changed_since
from safeimg.journal.undo import SUFFIX, UndoFile
from safeimg.journal.version import VERSION
from safeimg.ops.errors import SomethingPending

DATA_FILE = "data file"  # the role of an external data file


class Touched(NamedTuple):
    """A file of an operation, open: an image, or the external data file of one."""

    role: str
    path: str
    format: str
    file: File
    writes: bool
    cipher: Cipher | None = None  # what guest data in it is encrypted with


def touched(images: Iterable[tuple[str, Image, bool]]) -> list[Touched]:
    """The files of images given as (role, image, whether it is written), in the order in which steps number them:
    the images, then the external data files of those that have one (see `data_index`)."""
    own: list[Touched] = []
    external: list[Touched] = []
    for role, image, writes in images:
        inside = image.data is image.file
        cipher = image.cipher if inside else None
        own.append(Touched(role, image.file.path, image.format, image.file, writes, cipher))
        if not inside:
            external.append(Touched(DATA_FILE, image.data.path, "raw", image.data, writes, image.cipher))
    return own + external


def data_index(images: Sequence[Image], index: int) -> int:
    """The number that steps give the file which holds the guest data of image `index`, if they number `images` as
    `touched` does."""
    if images[index].data is images[index].file:
        return index
    return len(images) + sum(image.data is not image.file for image in images[:index])


def refuse_pending(fs: FileSystem, history: History, images: Sequence[Touched]) -> None:
    """Raises `SomethingPending` if an operation is pending on an image that is to be written."""
    pending = history.pending()
    for image in images:
        if image.writes:
            refuse_pending_on(fs, image.path)
            known = find.indexed(fs, pending, image.path)
            if known is not None:
                home, log = known
                raise SomethingPending(image.path, log.declared.command, log.operation, home)


def refuse_pending_on(fs: FileSystem, path: str) -> None:
    """Raises `SomethingPending`, `LogForeign` or `LogDamaged` if the image at `path` must not be changed now.

    What is void is cleared away."""
    found = find.find(fs, path)
    if found is None:
        return
    if isinstance(found, find.VoidFound):
        find.clear_void(fs, found)
        return
    if isinstance(found, find.PointerFound):
        resolved = find.resolve_pointer(fs, found)
        if resolved.kind == "settled":
            remove_durably(fs, found.path)
            return
        if resolved.log is None:
            raise LogForeign(f"{found.path}: takes part in an operation of {resolved.home} that cannot be found")
        raise SomethingPending(path, resolved.log.declared.command, found.operation, resolved.home)
    raise SomethingPending(path, found.declared.command, found.operation, path)


class Session:
    """Events go through `record`, which keeps `state` in step with the log."""

    def __init__(
        self,
        fs: FileSystem,
        history: History,
        home: str,
        log: Log,
        state: OperationState,
        undo: UndoFile | None,
        keeping: Keeping | None,
    ) -> None:
        """Private: see `begin` and `reopen`. `keeping`: how much may be kept for `undo`; None for nothing."""
        self.fs = fs
        self.history = history
        self.home = home
        self.log = log
        self.state = state
        self.undo = undo
        self.keeping = keeping
        # Why the operation will not be undone; empty as long as it can.
        self.lost = "" if keeping is not None and keeping.each else f"nothing of the {self.command} was to be kept"

    @property
    def command(self) -> str:
        return self.state.declared.command

    @classmethod
    def begin(
        cls,
        fs: FileSystem,
        history: History,
        *,
        command: str,
        arguments: Sequence[str],
        images: Sequence[Touched],
        settings: Mapping[str, Any],
        undo: bool,
        created: Sequence[int],
        total: int,
        journal: str = "auto",
        keeping: Keeping | None = None,
    ) -> Session:
        """Everything durable that has to be before an image is touched. Raises `JournalUnavailable`, `LogBusy`."""
        home = images[0].path
        for image in images:
            if not image.writes:  # its times must outlive a power cut: they tell whether somebody changed it
                image.file.sync_all()
        operation = os.urandom(16).hex()
        folder = os.path.dirname(fs.resolve(home))
        records = tuple(
            ImageRecord(
                image.role, os.path.relpath(fs.resolve(image.path), folder), image.format,
                identify(image.file, tag=image.writes), image.writes,
            )
            for image in images
        )
        explicit = None if journal in ("auto", "require") else journal
        log = place.create_log(fs, home, operation, explicit=explicit)
        session: Session | None = None
        try:
            declared = Declared(
                operation, command, tuple(arguments), VERSION, current_owner(), records, now()
            )
            session = cls(fs, history, home, log, fold([declared]), None, keeping)
            log.append(declared)
            log.sync()
            session._point(images)
            if undo:
                session.undo = UndoFile.create(fs, log.path + SUFFIX, operation, images[0].file.stat())
            lengths = tuple(image.file.length() for image in images)
            history.add_pending(PendingRow(
                operation, command, log.path, fs.resolve(home), declared.owner.machine, declared.time
            ))
            changed = session._changed_outside()
            session.record(Started(dict(settings), lengths, undo, tuple(created), total, now()))
            if changed:
                session.record(ChangedOutside(changed))
            session.sync()
            return session
        except BaseException as error:
            clean = isinstance(error, StorageError | JournalError) and not isinstance(error, SyncFailed)
            if session is not None and clean:
                session._withdraw()
            log.close()
            raise

    def _changed_outside(self) -> tuple[tuple[int, float], ...]:
        """The images that something changed that is not on record, and when the operation before was settled."""
        since = (
            (index, changed_since(self.history.at(self.path_of(image)), image.identity))
            for index, image in enumerate(self.state.declared.images)
            if image.writes
        )
        return tuple((index, time) for index, time in since if time is not None)

    def _withdraw(self) -> None:
        """Best effort: what could not begin leaves nothing behind. Once it is started, it is pending."""
        if self.state.started is None:
            try:
                self.settle({})
            except (StorageError, JournalError):
                pass

    @classmethod
    def reopen(
        cls,
        fs: FileSystem,
        history: History,
        home: str,
        log_path: str,
        *,
        undo: bool = True,
        keeping: Keeping | None = None,
    ) -> Session:
        """The session of a pending operation, locked against others (`LogBusy`), its torn tail dropped. With `undo`,
        its before-images are at hand. `keeping`: how much may be kept for `undo` once it is completed."""
        there = fs.stat(home)
        owner = None if there is None else there.uid
        log = Log.open(fs, log_path, write=True, image_owner=owner)
        try:
            state = fold(log.replay())
            before = None
            if undo and state.started is not None and state.started.undo and state.outcome is None:
                before = UndoFile.open(
                    fs, log_path + SUFFIX, state.declared.operation, write=True, image_owner=owner
                )
            session = cls(fs, history, home, log, state, before, keeping)
            if state.past_return or state.outcome is not None:  # what undo needs may be half gone
                session.lost = session.lost or f"the {session.command} was interrupted as what it replaced went away"
            return session
        except BaseException:
            log.close()
            raise

    def record(self, event: Event) -> None:
        """Appends an event; durable after `sync`."""
        self.log.append(event)
        self.state.apply(event)

    def sync(self) -> None:
        """All events are durable when this returns. Before-images have to be, before the event that names them."""
        self.log.sync()

    def observe(self, files: Sequence[File]) -> tuple[tuple[int, Identity], ...]:
        """How the images look now, in a way that survives a power cut: times are synced first.

        Not the home, nor a data file that is written to: it gets new data before the step is on record."""
        seen = []
        for index, file in enumerate(files[1:], start=1):
            record = self.state.declared.images[index]
            if record.writes and record.role == DATA_FILE:
                continue
            file.sync_all()
            seen.append((index, identify(file)))
        return tuple(seen)

    def settle(self, files: Mapping[int, File]) -> None:
        """The outcome is durable, and so is what follows from it in the images: how they look, history, what undo
        needs; then everything that lies beside the images goes. `files`: those that are open."""
        if self.state.outcome is not None:
            if self.state.settled is None:
                self._record_looks(files)
            self.history.record_settled(self.log.replay(), home=self.fs.resolve(self.home))
            if isinstance(self.state.outcome, Completed) and not self.lost and self.keeping is not None:
                with suppress(StorageError, JournalError):  # the operation is done all the same
                    kept.keep(self.fs, self.history, self.keeping, self.log, self.undo)
            self._forget_undone()
        self._remove_pointers()
        if self.undo is not None:
            self.undo.close()
        remove_durably(self.fs, self.log.path + SUFFIX)
        self.log.remove()

    def _forget_undone(self) -> None:
        """What was kept of the operation that this one has taken back goes."""
        settings = {} if self.state.started is None else self.state.started.settings
        if self.command != UNDO or not isinstance(self.state.outcome, Completed):
            return
        with suppress(StorageError, JournalError):  # the next `gc` finds it
            kept.forget(self.fs, str(settings.get("record")), str(settings.get(UNDOES)))

    def _record_looks(self, files: Mapping[int, File]) -> None:
        """How the images look now, in a way that survives a power cut: times are synced first."""
        for index, file in files.items():
            if self.state.declared.images[index].writes:
                file.sync_all()
        looks = tuple((index, identify(file)) for index, file in sorted(files.items()))
        self.record(Settled(looks, self.lost, now()))
        self.sync()

    def close(self) -> None:
        """Gives the log's lock back. What is pending stays pending."""
        if self.undo is not None:
            self.undo.close()
        self.log.close()

    def _remove_pointers(self) -> None:
        """Removes the images' pointers to this operation, and what a crash while writing one left."""
        for path in self._pointer_places():
            found = find.look(self.fs, path)
            if isinstance(found, find.PointerFound) and found.operation == self.state.declared.operation:
                remove_durably(self.fs, path)
            elif isinstance(found, find.VoidFound):
                find.clear_void(self.fs, found)
            if self.fs.stat(path + NEW_SUFFIX) is not None:
                remove_durably(self.fs, path + NEW_SUFFIX)

    def _pointer_places(self) -> Iterator[str]:
        """Where pointers to this operation may be: of all images that it writes; the home's last, by which the others
        are found."""
        for index, image in reversed(list(enumerate(self.state.declared.images))):
            if image.writes:
                path = self.home if index == 0 else self.path_of(image)
                yield from (each for each in place.candidates(self.fs, path) if each != self.log.path)

    def owns(self, index: int) -> bool:
        """Whether the image says itself that it takes part: the home by its log, others by their pointer."""
        if index == 0:
            return True
        for path in place.candidates(self.fs, self.path_of(self.state.declared.images[index])):
            found = find.look(self.fs, path)
            if isinstance(found, find.PointerFound) and found.operation == self.state.declared.operation:
                return True
        return False

    def path_of(self, image: ImageRecord) -> str:
        """Where an image of the operation is looked for: relative to where the home image lies now."""
        return os.path.join(os.path.dirname(self.fs.resolve(self.home)), image.path)

    def _point(self, images: Sequence[Touched]) -> None:
        """Writes the participants' pointers, each durable, and one of the home's if its log would not be found."""
        found_at_home = self.log.path in place.candidates(self.fs, self.home)
        for index, image in enumerate(images):
            if image.writes and (index or not found_at_home):
                self._write_pointer(image, self.state.declared.images[index].identity)

    def _write_pointer(self, image: Touched, identity: Identity) -> None:
        """At the first of the places for it that can be written to. `JournalUnavailable`: there is none."""
        declared = self.state.declared
        home = self.fs.resolve(self.home)
        beside_home = self.log.path == place.beside(self.fs, self.home)
        refused = []
        for path in place.candidates(self.fs, image.path):
            near = path == place.beside(self.fs, image.path)
            folder = os.path.dirname(path)
            pointer = Pointer(
                declared.operation, declared.images[0].identity, os.path.relpath(home, folder) if near else home,
                identity, declared.owner.machine,
                None if beside_home else os.path.relpath(self.log.path, folder) if near else self.log.path,
            )
            try:
                place.ensure_folder(path)
                write_pointer(self.fs, path, pointer, image.file.stat())
                return
            except JournalUnavailable as error:
                refused.append(str(error))
            except StorageError as error:
                if error.errno not in place.ELSEWHERE:
                    raise
                refused.append(str(error))
        raise JournalUnavailable(
            f"{image.path}: no place for a pointer to the journal ({'; '.join(refused)}); go on without any with "
            f"--no-journal"
        )
