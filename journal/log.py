"""The log of a pending operation: an append-only file of events that survives a kill, a full disk and a power
cut."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Protocol

from safeimg.journal import frames
from safeimg.journal.codec import BadEvent, decode_event, encode_event
from safeimg.journal.errors import JournalError, JournalUnavailable, LogBusy, LogDamaged, LogForeign, LogVoid
from safeimg.journal.events import Declared, Event, GivenUp, Started, StepPrepared
from safeimg.journal.files import File, FileStat, FileSystem, Lockable, system_error
from safeimg.journal.trust import check_trusted, sidecar_stat

CHUNK = 1 << 20  # the file grows by at least this
RESERVE = 256 << 10  # zero-filled space kept behind the last event, for those that settle the operation
RESERVE_PER_STEP = 512  # taking a step back takes two small events
MAX_UNSYNCED = (
    frames.MAX_TAIL // 4
)  # more is synced before the next append, so that a torn tail stays bounded

_ATTEMPTS = 3  # at reading a log that looks damaged
_NEEDS_RESERVE = (Declared, Started, StepPrepared, GivenUp)  # the others settle the operation and may use the reserve


class _Scan:
    """Reads a log's file from the beginning, event by event; afterwards tells where it ended."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.header = frames.read_header(file)
        self.end = frames.HEADER
        self.sequence = 0
        self.durable = 0
        self.head = frames.GENESIS
        self.images = 0
        self.steps = 0
        self.tail = frames.Tail(self.end, False)

    def events(self) -> Iterator[Event]:
        """Every event in order. Raises `LogDamaged` where the file is not what safeimg wrote."""
        length = self.file.length()
        while (frame := frames.read_frame(self.file, self.header.key, self.end, length)) is not None:
            event = self._accept(frame)
            yield event
        self.tail = frames.judge_tail(self.file, self.header.key, self.end, length, self.sequence + 1)
        if length < self.header.initial and self.tail.used > frames.HEADER:
            raise LogDamaged(
                self.file.path, f"the log was cut off, it had at least {self.header.initial} bytes", length
            )

    def _accept(self, frame: frames.Frame) -> Event:
        """The event of an intact frame: it must continue the chain, as no torn write can make it not to."""
        sequence = self.sequence + 1
        problem = None
        if frame.sequence != sequence:
            problem = f"expected event {sequence} of the log, found event {frame.sequence}"
        elif frame.previous != self.head:
            problem = f"event {sequence} of the log does not follow event {self.sequence}"
        elif not self.durable <= frame.durable < sequence:
            problem = f"event {sequence} of the log says that event {frame.durable} was durable"
        if problem is not None:
            raise LogDamaged(self.file.path, problem, frame.offset)
        try:
            event = (
                decode_event(frame.payload, images=self.images)
                if self.images
                else decode_event(frame.payload)
            )
            _check_place(event, sequence, self.header.operation)
        except BadEvent as error:
            raise LogDamaged(self.file.path, f"event {sequence} of the log: {error}", frame.offset) from None
        if isinstance(event, Declared):
            self.images = len(event.images)
        self.steps += isinstance(event, StepPrepared)
        self.end, self.sequence, self.durable, self.head = frame.end, sequence, frame.durable, frame.hash
        return event


def _check_place(event: Event, sequence: int, operation: str) -> None:
    if isinstance(event, Declared) != (sequence == 1):
        raise BadEvent("a log begins with one Declared, and has no other")
    if isinstance(event, Declared) and event.operation != operation:
        raise BadEvent(f"declares operation {event.operation} in the log of operation {operation}")


class Log:
    """An open log. `append` and `sync` may be called from several threads; errors of the storage layer
    propagate.

    After a failed sync nothing may be recorded any more (what the log holds on disk is unknown until it is
    opened afresh): `append` and `sync` then raise `JournalError`.
    """

    def __init__(self, files: FileSystem, file: File, scan: _Scan, *, writable: bool) -> None:
        """Private: see `create` and `open`."""
        self._files = files
        self._file = file
        self._scan = scan
        self._writable = writable
        self._lock = threading.RLock()
        self._capacity = file.length()
        self._synced_end = scan.end
        self._broken: str | None = None

    @classmethod
    def create(
        cls, files: FileSystem, path: str, operation: str, like: FileStat, *, chunk: int | None = None
    ) -> Log:
        """A new log with nothing in it, durable, locked, mode 0600, of the owner and group of `like` (the
        image).

        `operation`: 32 hexadecimal digits. `chunk`: bytes by which the file grows (CHUNK; tests use less). A file
        that is there already is the storage layer's EEXIST; raises `JournalUnavailable` where the file could
        not be trusted when read again (a server that gives it to somebody else).
        """
        file = files.create(path, mode=0o600, exclusive=True)
        try:
            # Who finds an empty log takes its lock before removing it; so if we have the lock, and the file
            # still has its name, it is ours.
            there = files.stat(path) if _try_lock(file) else None
            if there is None or there.inode != file.stat().inode:
                raise LogBusy(path)
            try:
                files.give_to(path, like.uid, like.gid)
                check_trusted(file.stat(), path, like.uid)
                chunk = max(CHUNK if chunk is None else chunk, frames.HEADER)
                file.pwrite(0, frames.pack_header(operation, chunk))
                _extend(file, frames.HEADER, chunk)
                file.sync_all()
                files.sync_directory(os.path.dirname(path) or ".")
            except BaseException as error:
                _remove_quietly(files, path)
                if isinstance(error, LogForeign):
                    raise JournalUnavailable(
                        f"{path}: the file system gives new files to another user"
                    ) from None
                raise
            return cls(files, file, _Scan(file), writable=True)
        except BaseException:
            file.close()
            raise

    @classmethod
    def open(
        cls, files: FileSystem, path: str, *, write: bool = False, image_owner: int | None = None
    ) -> Log:
        """The log at `path`; its torn tail, if any, is dropped. `image_owner`: the uid whose log is believed
        besides the caller's and root's.

        With `write` it is locked, the torn tail is overwritten with zeroes, and all that remains is made
        durable (hazards 7 and 8): recovery may rely on it. Raises `LogVoid`, `LogForeign`, `LogDamaged`,
        `LogBusy` (only with `write`).
        """
        file = _open_trusted(files, path, write, image_owner)
        try:
            if write and not _try_lock(file):
                raise LogBusy(path)
            scan = _settled_scan(file)
            if scan.sequence == 0:
                raise LogVoid(path)
            log = cls(files, file, scan, writable=write)
            if write:
                log._drop_tail()
            return log
        except BaseException:
            file.close()
            raise

    @property
    def path(self) -> str:
        return self._file.path

    @property
    def operation(self) -> str:
        return self._scan.header.operation

    @property
    def sequence(self) -> int:
        """Of the last event; the first is 1, 0 means none."""
        return self._scan.sequence

    @property
    def durable(self) -> int:
        """The highest sequence known to be on stable storage."""
        return self._scan.durable

    @property
    def used(self) -> int:
        """Bytes of the file up to the end of the last event."""
        return self._scan.end

    @property
    def head(self) -> bytes:
        """The hash of the last frame, which covers the whole log."""
        return self._scan.head

    @property
    def events(self) -> tuple[Event, ...]:
        """All events, read from the file at each call: a log may be larger than what should stay in
        memory."""
        return tuple(self.replay())

    def replay(self) -> Iterator[Event]:
        """All events so far, one at a time, read and verified again."""
        scan, last = _Scan(self._file), self._scan.sequence
        if last:
            for event in scan.events():
                yield event
                if scan.sequence == last:
                    return
            raise LogDamaged(self.path, f"event {scan.sequence + 1} of the log is gone", scan.end)

    def append(self, event: Event) -> int:
        """Writes `event` behind the last one and returns its sequence. It is durable after the next `sync`.

        Nothing is recorded if it raises: `BadEvent`, or the storage layer's error (ENOSPC while making room,
        with the reserve untouched). Events that settle an operation still fit then.
        """
        with self._lock:
            self._check_usable()
            scan = self._scan
            sequence = scan.sequence + 1
            payload = encode_event(event, images=scan.images) if scan.images else encode_event(event)
            _check_place(event, sequence, self.operation)
            if scan.end + len(payload) - self._synced_end > MAX_UNSYNCED:
                self.sync()
            frame = frames.pack_frame(scan.header.key, sequence, scan.durable, scan.head, payload)
            self._make_room(len(frame), needs_reserve=isinstance(event, _NEEDS_RESERVE))
            try:
                self._file.pwrite(scan.end, frame)
            except BaseException:
                self._erase(scan.end, scan.end + len(frame))
                raise
            scan.end += len(frame)
            scan.sequence, scan.head = sequence, frame[-frames.HASH :]
            if isinstance(event, Declared):
                scan.images = len(event.images)
            scan.steps += isinstance(event, StepPrepared)
            return sequence

    def sync(self) -> None:
        """All events appended so far are on stable storage when this returns."""
        with self._lock:
            self._check_usable()
            try:
                self._file.sync()
            except BaseException as error:
                self._broken = " ".join(str(error).split()) or "a sync failed"
                raise
            self._scan.durable, self._synced_end = self._scan.sequence, self._scan.end

    def remove(self) -> None:
        """Takes the log's name away, durably. `close` it afterwards: until then it stays locked."""
        self._files.unlink(self.path)
        self._files.sync_directory(os.path.dirname(self.path) or ".")

    def close(self) -> None:
        self._file.close()

    def _check_usable(self) -> None:
        if not self._writable:
            raise JournalError(f"{self.path}: the log is open for reading only")
        if self._broken is not None:
            raise JournalError(
                f"{self.path}: nothing can be recorded any more after an error ({self._broken})"
            )

    def _make_room(self, size: int, *, needs_reserve: bool) -> None:
        """Extends the file so that the reserve remains behind `size` more bytes."""
        end = self._scan.end + size
        wanted = end + RESERVE + RESERVE_PER_STEP * (self._scan.steps + 1)
        wanted = min(wanted, end + frames.MAX_TAIL // 2)
        if wanted <= self._capacity:
            return
        chunk = max(self._scan.header.initial, frames.HEADER)
        target = -(-wanted // chunk) * chunk
        try:
            _extend(self._file, self._capacity, target)
        except Exception as error:
            self._capacity = self._file.length()
            if needs_reserve or end > self._capacity or system_error(error) is None:
                raise
            return
        self._capacity = target

    def _erase(self, start: int, end: int) -> None:
        """Zeroes what a failed append may have left; if that fails too, nothing more is written."""
        try:
            self._file.pwrite(start, bytes(end - start))
        except BaseException as error:
            self._broken = " ".join(str(error).split()) or "a write failed"

    def _drop_tail(self) -> None:
        """Makes what was read durable, and what was not read gone, before anything is appended in its
        place.

        Events that may not be durable are written again: if it was a failed sync that ended their writer, the
        system takes them for clean, and no later sync covers them."""
        scan = self._scan
        for start in range(self._durable_end(), scan.end, CHUNK):
            self._file.pwrite(start, self._file.pread(start, min(CHUNK, scan.end - start)))
        for start in range(scan.end, scan.tail.used, CHUNK):
            self._file.pwrite(start, bytes(min(CHUNK, scan.tail.used - start)))
        self.sync()

    def _durable_end(self) -> int:
        """Where the last event ends that a later one says is durable."""
        scan = _Scan(self._file)
        if self._scan.durable:
            for _ in scan.events():
                if scan.sequence == self._scan.durable:
                    break
        return scan.end


class Reader(Protocol):
    """What takes the events of a log, as a list does."""

    def append(self, event: Event, /) -> None: ...
    def clear(self) -> None:
        """The log is read again from its beginning."""


def read_events(files: FileSystem, path: str, *, image_owner: int | None = None) -> list[Event]:
    """The events of a log that another process may be writing at this moment; takes no lock and changes
    nothing.

    Raises as `Log.open` does."""
    events: list[Event] = []
    read_log(files, path, events, image_owner=image_owner)
    return events


def read_log(files: FileSystem, path: str, reader: Reader, *, image_owner: int | None = None) -> None:
    """As `read_events`, for who need not keep all of them."""
    file = _open_trusted(files, path, False, image_owner)
    try:
        if _settled_scan(file, reader).sequence == 0:
            raise LogVoid(path)
    finally:
        file.close()


def remove_void(files: FileSystem, path: str, *, image_owner: int | None = None) -> None:
    """Removes the log at `path` if nothing was ever durable in it, else leaves it. Raises `LogBusy` if in
    use."""
    file = _open_trusted(files, path, True, image_owner)
    try:
        if not _try_lock(file):
            raise LogBusy(path)
        there = files.stat(path)
        if there is None or there.inode != file.stat().inode:
            return
        try:
            if _settled_scan(file).sequence:
                return
        except LogVoid:
            pass
        files.unlink(path)
        files.sync_directory(os.path.dirname(path) or ".")
    finally:
        file.close()


def _open_trusted(files: FileSystem, path: str, write: bool, image_owner: int | None) -> File:
    sidecar_stat(files, path, image_owner)  # before opening: a FIFO would block
    file = files.open(path, write=write)
    try:
        check_trusted(file.stat(), path, image_owner)
    except BaseException:
        file.close()
        raise
    return file


def _settled_scan(file: File, keep: Reader | None = None) -> _Scan:
    """Reads the whole log, into `keep` if given. Its writer may be at it: what looks like damage is looked at
    again."""
    for attempt in range(_ATTEMPTS):
        try:
            scan = _Scan(file)
            if keep is not None:
                keep.clear()
            for event in scan.events():
                if keep is not None:
                    keep.append(event)
            return scan
        except LogDamaged:
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _try_lock(file: File) -> bool:
    return file.try_lock() if isinstance(file, Lockable) else True


def _extend(file: File, start: int, end: int) -> None:
    """Allocates `start` to `end` and fills it with zeroes, so that writing there later needs nothing of the
    disk."""
    file.preallocate(start, end - start, keep_size=False)
    for at in range(start, end, CHUNK):
        file.pwrite(at, bytes(min(CHUNK, end - at)))


def _remove_quietly(files: FileSystem, path: str) -> None:
    try:
        files.unlink(path)
    except Exception as error:
        if system_error(error) is None:
            raise
