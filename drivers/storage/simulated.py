"""The recording twin of the storage layer: a file system in memory that notes every mutation.

For tests, ours and those of programs built on safeimg. Use it wherever a `storage.api.FileSystem` is asked
for, when a test has to know what a power cut would leave (`powercut.crash_states`), to stop a run at an exact
call (`kill_at`), or to make calls fail (`fail_at`, `fail_sync`, `set_capacity`). When the real file system is
the point (locks between processes, O_DIRECT, speed), use `file.LocalFileSystem` on a temporary folder
instead.

    fs = SimulatedFileSystem()
    fs.write_file("/base.img", bytes(1 << 20))      # durable
    before = fs.begin_trace()
    run(fs)                                         # what is tested
    for state in crash_states(before, fs.trace, seed=1):
        judge(state.fs)                             # a crashed file system; state.description replays it

    mutating call ──► Recorder ──► Model: live copies, disk copies, what is unsynced (durability.py draws it)
                      (faults)└──► Trace ──► crash_states (powercut.py)

Everything is deterministic: inode numbers count up, times come from a logical clock that ticks once a
mutation. Several threads may use it at once.
"""

from __future__ import annotations

import errno
import os
import stat as stat_bits
from dataclasses import replace
from pathlib import Path

from safeimg.drivers.errors import LockError, StorageError, UsageError
from safeimg.drivers.storage.api import CACHE_MODES, Buffer, FileStat
from safeimg.drivers.storage.durability import Attributes, Entry, Model, Name, Node
from safeimg.drivers.storage.locks import NOTHING, RAW_READER, WRITER, Claim
from safeimg.drivers.storage.lookup import find, find_directory, joined, locate, named
from safeimg.drivers.storage.recorder import Killed, Recorder, Trace, failure
from safeimg.drivers.storage.simulated_file import SimulatedFile
from safeimg.drivers.storage.sparse import PAGE

__all__ = ["Killed", "SimulatedFile", "SimulatedFileSystem", "Trace"]

_CHUNK = 1 << 20


class SimulatedFileSystem:
    """Files, links and directories in memory, every mutation recorded in `trace`.

    Starts with one directory, `/`; `make_directory` makes others. `trace` has one entry for each mutating
    call that did something, so what `kill_at(n)` on a fresh trace leaves is the prefix of n - 1 entries.
    """

    def __init__(
        self, *, extended_attributes: bool = True, uid: int = 0, gid: int = 0, device: int = 64769
    ) -> None:
        self.uid, self.gid = uid, gid  # of files created
        self._recorder = Recorder(Model(), device=device, extended_attributes=extended_attributes)
        self._lock = self._recorder.lock
        self._read_only: set[str] = set()

    @property
    def trace(self) -> Trace:
        return self._recorder.trace

    @property
    def model(self) -> Model:
        """What is live and what is on disk. Read it only; `powercut` and curious tests do."""
        return self._recorder.model

    # ---- copies

    def with_model(self, model: Model) -> SimulatedFileSystem:
        """Other files on the same kind of machine: nothing open, no trace, no faults armed."""
        mine = self._recorder
        other = SimulatedFileSystem(
            extended_attributes=mine.extended_attributes, uid=self.uid, gid=self.gid, device=mine.device
        )
        other._recorder.model = model
        other._recorder.capacity = dict(mine.capacity)
        other._read_only = set(self._read_only)
        return other

    def clone(self) -> SimulatedFileSystem:
        """The same files for another process: nothing open, no trace, no faults armed. What is not yet
        durable here is not there either, so this is also the state that a killed process leaves. Cheap:
        copy-on-write."""
        with self._lock:
            return self.with_model(self.model.clone())

    def begin_trace(self) -> SimulatedFileSystem:
        """Starts an empty trace; the clone returned is where it starts from (`initial` of `crash_states`)."""
        with self._lock:
            self._recorder.trace = Trace()
            return self.clone()

    def mark(self, label: str) -> None:
        """Labels this point of the trace. Crash states list the labels that came before the crash: a test
        marks what it was promised ("committed") and demands it of every state that has the label."""
        with self._lock:
            if not self._recorder.dead:
                self.trace.marks.append((len(self.trace), label))

    # ---- faults

    def kill_at(self, number: int) -> None:
        """The `number`-th mutating call from now (1 is the next) raises `Killed` instead, and so does every
        later one. The state left is `clone()`."""
        self._recorder.kill_at(number)

    def fail_at(self, number: int, code: int = errno.EIO) -> None:
        """The `number`-th mutating call from now fails once with that errno (a sync: as `fail_sync`
        tells). For failing reads and opens, put `faults.FaultyFileSystem` over this."""
        self._recorder.fail_at(number, code)

    def fail_sync(self, which: str | int = 1) -> None:
        """The next sync of file `which`, or the `which`-th sync of any file from now, raises `SyncFailed`
        once. What it should have covered counts as clean from then on, and may still be lost after later good
        syncs."""
        if isinstance(which, int):
            self._recorder.fail_sync_number(which)
        else:
            self._recorder.fail_sync_of(find(self.model, which, "sync"))

    def set_capacity(self, capacity: int | None, directory: str = "/") -> None:
        """Bytes that files created below `directory` may occupy (in pages of 4 KiB, preallocated ones too)
        before ENOSPC; None for no limit. A directory with a capacity of its own is a disk of its own."""
        with self._lock:
            place = find_directory(self.model, directory)
            self._recorder.capacity.pop(place, None)
            if capacity is not None:
                self._recorder.capacity[place] = capacity

    def set_read_only(self, directory: str, read_only: bool = True) -> None:
        """Names in `directory` cannot be created, removed or renamed (EACCES); files there can be written."""
        change = self._read_only.add if read_only else self._read_only.discard
        change(find_directory(self.model, directory))

    # ---- what tests ask

    def unsynced(self, path: str) -> int:
        """How many changes to the file's data and length a power cut now could lose."""
        return len(find(self.model, path, "stat").changes)

    def used(self, directory: str = "/") -> int:
        """Bytes occupied by the files created below `directory`, on its disk, that have a name or are
        open."""
        with self._lock:
            return self._recorder.used(find_directory(self.model, directory))

    def write_file(self, path: str, data: Buffer) -> None:
        """Replaces the file's content, durably."""
        file = self.create(path)
        try:
            file.pwrite(0, data)
            file.sync_all()
        finally:
            file.close()
        self.sync_directory(locate(self.model, path, "sync")[0])

    def read_file(self, path: str) -> bytes:
        with self._lock:
            live = find(self.model, path, "read").live
            return live.content.read(0, live.length)

    def import_file(self, real_path: str, path: str) -> None:
        """Copies a file of the machine in, holes kept, durably."""
        file = self.create(path)
        with Path(real_path).open("rb", buffering=0) as source:
            length = os.fstat(source.fileno()).st_size
            file.truncate(length)
            position = 0
            while position < length:
                try:
                    position = os.lseek(source.fileno(), position, os.SEEK_DATA)
                except OSError as error:
                    if error.errno == errno.ENXIO:  # only a hole is left
                        break
                    raise
                end = os.lseek(source.fileno(), position, os.SEEK_HOLE)
                while position < end:
                    data = os.pread(source.fileno(), min(_CHUNK, end - position), position)
                    file.pwrite(position, data)
                    position += len(data)
        file.sync_all()
        file.close()
        self.sync_directory(locate(self.model, path, "sync")[0])

    def export_file(self, path: str, real_path: str) -> None:
        """Copies a file out to the machine, holes kept: for `qemu-img` to judge."""
        with self._lock:
            live = find(self.model, path, "read").live
            with Path(real_path).open("wb", buffering=0) as target:
                os.truncate(target.fileno(), live.length)
                for start, end in live.content.data_runs(0, live.length):
                    for position in range(start, end, _CHUNK):
                        data = live.content.read(position, min(_CHUNK, end - position))
                        os.pwrite(target.fileno(), data, position)

    # ---- the interface

    def open(
        self,
        path: str,
        *,
        write: bool = False,
        cache: str = "writeback",
        locking: bool = False,
        force_share: bool = False,
    ) -> SimulatedFile:
        with self._lock:
            if not write and not locate(self.model, path, "open")[1]:
                raise UsageError(f"'file' driver requires '{path}' to be a regular file")
            node = find(self.model, path, "open")
            claim = WRITER if write and not force_share else RAW_READER
            file = self._opened(node, path, write, cache, claim if locking else NOTHING)
            file.locking = file.locking and not force_share
            return file

    def create(
        self,
        path: str,
        *,
        mode: int = 0o644,
        exclusive: bool = False,
        truncate: bool = True,
        cache: str = "writeback",
        locking: bool = False,
    ) -> SimulatedFile:
        with self._lock:
            claim = WRITER if locking else NOTHING
            directory, name = place = locate(self.model, path, "create", follow=not exclusive)
            number = self.model.directories[directory].get(name)
            if not name:
                raise failure(path, "create", errno.EISDIR)
            if number is None:
                self._make(place, path, mode)
                return self._opened(find(self.model, path, "create"), path, True, cache, claim)
            if exclusive:
                raise failure(path, "create", errno.EEXIST)
            file = self._opened(self.model.nodes[number], path, True, cache, claim)
            if truncate and file.length():
                try:
                    file.truncate(0)
                except BaseException:
                    file.close()
                    raise
            return file

    def stat(self, path: str) -> FileStat | None:
        with self._lock:
            try:
                directory, name = locate(self.model, path, "stat")
            except StorageError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    return None
                raise
            if name:
                number = self.model.directories[directory].get(name)
                return None if number is None else self._recorder.stat(self.model.nodes[number])
            number = 2 + sorted(self.model.directories).index(directory)
            mode = stat_bits.S_IFDIR | 0o755
            return FileStat(self._recorder.device, number, PAGE, 0, 0, mode, self.uid, self.gid, PAGE, False)

    def unlink(self, path: str) -> None:
        with self._lock:
            place, node = named(self.model, path, "remove")
            self._check_writable(place[0], path, "remove")
            self._recorder.record(Entry("unlink", node.number, names=(place,)), path, "remove")

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            place, node = named(self.model, source, "rename")
            directory, name = goal = locate(self.model, target, "rename", follow=False)
            if not name:
                raise failure(target, "rename", errno.EISDIR)
            self._check_writable(place[0], source, "rename")
            self._check_writable(directory, target, "rename")
            if (
                self.model.directories[directory].get(name) != node.number
            ):  # two names of one file stay (POSIX)
                self._recorder.record(Entry("rename", node.number, names=(place, goal)), source, "rename")

    def link(self, source: str, target: str) -> None:
        """Gives a file a second name (a hard link)."""
        with self._lock:
            node = find(self.model, source, "link")
            place = self._free_name(target, "link")
            self._recorder.record(Entry("link", node.number, names=(place,)), target, "link")

    def symlink(self, target: str, path: str) -> None:
        """Makes `path` a symbolic link that says `target`."""
        with self._lock:
            self._make(self._free_name(path, "symlink"), path, 0o777, target)

    def make_directory(self, path: str) -> None:
        """Makes one directory, durable at once (directories are scenery here, never under test)."""
        with self._lock:
            place = self._free_name(path, "mkdir")
            self._recorder.record(Entry("make_directory", names=((joined(place), ""),)), path, "mkdir")

    def sync_directory(self, path: str) -> None:
        with self._lock:
            entry = Entry("sync_directory", names=((find_directory(self.model, path), ""),))
            self._recorder.record(entry, path, "sync")

    def list_directory(self, path: str) -> list[str]:
        with self._lock:
            directory = find_directory(self.model, path)
            below = [Path(other) for other in self.model.directories if other != "/"]
            inside = [other.name for other in below if str(other.parent) == directory]
            return sorted([*self.model.directories[directory], *inside])

    def resolve(self, path: str) -> str:
        """Below a directory that is not there: the path as given, made absolute."""
        with self._lock:
            try:
                return joined(locate(self.model, path, "resolve"))
            except StorageError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    raise
                return os.path.normpath("/" + path.lstrip("/"))

    def give_to(self, path: str, uid: int, gid: int) -> None:
        with self._lock:
            try:
                node = named(self.model, path, "chown")[1]
                attributes = replace(node.live.attributes, uid=uid, gid=gid)
                self._recorder.record(Entry("attributes", node.number, attributes=attributes), path, "chown")
            except StorageError:
                pass

    # ---- below

    def _check_writable(self, directory: str, path: str, action: str) -> None:
        if directory in self._read_only:
            raise failure(path, action, errno.EACCES)

    def _free_name(self, path: str, action: str) -> Name:
        directory, name = locate(self.model, path, action, follow=False)
        if not name or name in self.model.directories[directory]:
            raise failure(path, action, errno.EEXIST)
        self._check_writable(directory, path, action)
        return directory, name

    def _make(self, place: Name, path: str, mode: int, target: str = "") -> None:
        self._check_writable(place[0], path, "create")
        attributes = Attributes(mode & 0o7777, self.uid, self.gid)
        entry = Entry("create", names=(place,), attributes=attributes, target=target)
        self._recorder.record(entry, path, "create")

    def _opened(self, node: Node, path: str, write: bool, cache: str, claim: Claim) -> SimulatedFile:
        if cache not in CACHE_MODES:
            raise UsageError(f"Invalid cache option: {cache}")
        file = SimulatedFile(self._recorder, node, path, write, cache)
        try:
            file.lock(claim)
        except LockError:
            file.close()
            raise
        file.locking = claim != NOTHING
        return file
