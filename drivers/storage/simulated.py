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

What is durable when, and what a power cut may do, is told in `durability.py`. Everything is deterministic:
inode numbers count up, times come from a logical clock that ticks once a mutation. Several threads may use it
at once.
"""

from __future__ import annotations

import errno
import os
import stat as stat_bits
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from safeimg.drivers.errors import LockError, StorageError, SyncFailed
from safeimg.drivers.storage.api import CACHE_MODES, Buffer, FileStat, Span
from safeimg.drivers.storage.durability import Attributes, Entry, Model, Name, Node
from safeimg.drivers.storage.sparse import PAGE

MAX_LENGTH = 2**63 - 1
_MAX_LINKS = 40
_CHUNK = 1 << 20


class Killed(BaseException):
    """The simulated process is dead (`kill_at`): no mutation happens any more, in no thread."""


def _failure(path: str, action: str, code: int) -> StorageError:
    kind = SyncFailed if action == "sync" else StorageError
    return kind(path, action, OSError(code, os.strerror(code)))


@dataclass(slots=True)
class Trace:
    """What was done, in order. `marks`: labels, each with the number of entries before it."""

    entries: list[Entry] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.entries)

    def labels(self, prefix: int) -> tuple[str, ...]:
        """The labels set by the time that `prefix` entries had been made."""
        return tuple(label for position, label in self.marks if position <= prefix)


class SimulatedFile:
    """An open file of a `SimulatedFileSystem`; made by its `open` and `create`."""

    __slots__ = ("_closed", "_fs", "_locking", "_node", "_path", "_through", "_unsafe", "_writable")

    def __init__(
        self, fs: SimulatedFileSystem, node: Node, path: str, writable: bool, cache: str, locking: bool
    ) -> None:
        self._fs = fs
        self._node = node
        self._path = path
        self._writable = writable
        self._through = cache in ("writethrough", "directsync")
        self._unsafe = cache == "unsafe"
        self._locking = locking
        self._closed = False

    @property
    def path(self) -> str:
        return self._path

    @property
    def writable(self) -> bool:
        return self._writable

    @property
    def alignment(self) -> int:
        return 1

    def _usable(self, action: str, *, offset: int = 0, length: int = 0) -> None:
        if self._closed:
            raise _failure(self._path, action, errno.EBADF)
        if offset < 0 or length < 0:
            raise _failure(self._path, action, errno.EINVAL)

    def _mutate(self, entry: Entry, action: str) -> None:
        if not self._writable:
            raise _failure(self._path, action, errno.EBADF)
        if entry.offset + max(entry.length, len(entry.data)) > MAX_LENGTH:
            raise _failure(self._path, action, errno.EFBIG)
        self._fs._record(entry, self._path, action)

    def length(self) -> int:
        self._usable("length")
        return self._node.live.length

    def pread(self, offset: int, length: int) -> bytes:
        self._usable("read", offset=offset, length=length)
        with self._fs._lock:
            self._fs._count_read(self._path)
            live = self._node.live
            return live.content.read(offset, min(length, live.length - offset))

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        data = self.pread(offset, buffer.nbytes)
        buffer.cast("B")[: len(data)] = data
        return len(data)

    def pwrite(self, offset: int, data: Buffer) -> None:
        """Writes what fits before it raises ENOSPC, as a real file system does."""
        self._usable("write", offset=offset)
        whole = bytes(data)
        with self._fs._lock:
            fits = self._fs._fitting(self._node, offset, len(whole))
            if fits:
                entry = Entry("write", self._node.number, offset, data=whole[:fits], through=self._through)
                self._mutate(entry, "write")
            if fits < len(whole):
                raise _failure(self._path, "write", errno.ENOSPC)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._usable("write zeroes", offset=offset, length=length)
        with self._fs._lock:
            if not unmap:
                self._fs._need_room(self._node, offset, length, self._path)
            if length:
                self._mutate(
                    Entry("zero", self._node.number, offset, length, flag=unmap, through=self._through),
                    "write zeroes",
                )

    def discard(self, offset: int, length: int) -> None:
        self._usable("discard", offset=offset, length=length)
        with self._fs._lock:
            length = min(length, self._node.live.length - offset)
            if length > 0:
                try:
                    self._mutate(Entry("discard", self._node.number, offset, length), "discard")
                except StorageError:
                    pass

    def preallocate(self, offset: int, length: int, *, keep_size: bool) -> None:
        self._usable("preallocate", offset=offset, length=length)
        with self._fs._lock:
            self._fs._need_room(self._node, offset, length, self._path)
            if length:
                self._mutate(
                    Entry("preallocate", self._node.number, offset, length, flag=keep_size), "preallocate"
                )

    def truncate(self, length: int) -> None:
        self._usable("truncate", length=length)
        self._mutate(Entry("truncate", self._node.number, length=length), "truncate")

    def spans(self, offset: int, length: int) -> Iterator[Span]:
        """As at the time of the call. Space preallocated or zeroed but never written is a hole, as on ext4
        and xfs."""
        self._usable("find holes", offset=offset, length=length)
        with self._fs._lock:
            end = min(offset + length, self._node.live.length)
            runs = list(self._node.live.content.data_runs(offset, end)) if offset < end else []
        return _spans(offset, end, runs)

    def sync(self) -> None:
        self._sync("sync")

    def sync_all(self) -> None:
        self._sync("sync_all")

    def _sync(self, kind: str) -> None:
        self._usable("sync")
        if not self._unsafe:
            self._fs._sync_node(self._node, kind, self._path)

    def start_writeback(self, offset: int, length: int) -> None:
        """Promises nothing, so it is not even recorded."""

    def stat(self) -> FileStat:
        self._usable("stat")
        return self._fs._stat(self._node)

    def get_attribute(self, name: str) -> bytes | None:
        self._usable("get attribute")
        return self._node.live.attributes.extended.get(name)

    def set_attribute(self, name: str, value: bytes) -> bool:
        self._usable("set attribute")
        if not self._fs.extended_attributes:
            return False
        return self._set_extended({**self._node.live.attributes.extended, name: bytes(value)})

    def remove_attribute(self, name: str) -> None:
        self._usable("remove attribute")
        extended = dict(self._node.live.attributes.extended)
        if extended.pop(name, None) is not None:
            self._set_extended(extended)

    def _set_extended(self, extended: dict[str, bytes]) -> bool:
        attributes = replace(self._node.live.attributes, extended=extended)
        try:
            self._fs._record(
                Entry("attributes", self._node.number, attributes=attributes), self._path, "set attribute"
            )
        except StorageError:
            return False
        return True

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._fs._forget(self, self._node)


def _spans(offset: int, end: int, runs: list[tuple[int, int]]) -> Iterator[Span]:
    position = offset
    for start, stop in runs:
        if position < start:
            yield Span(position, start - position, False)
        yield Span(start, stop - start, True)
        position = stop
    if position < end:
        yield Span(position, end - position, False)


class SimulatedFileSystem:
    """Files, links and directories in memory, every mutation recorded in `trace`.

    Starts with one directory, `/`; `make_directory` makes others. `trace` has one entry for each mutating
    call that succeeded, so the states "killed at call n" are the prefixes of length n - 1.
    """

    def __init__(
        self, *, extended_attributes: bool = True, uid: int = 0, gid: int = 0, device: int = 64769
    ) -> None:
        self.extended_attributes = extended_attributes
        self.uid, self.gid = uid, gid  # of files created
        self.device = device
        self.trace = Trace()
        self._model = Model()
        self._lock = threading.RLock()
        self._open: list[tuple[SimulatedFile, Node]] = []
        self._read_only: set[str] = set()
        self._capacity: dict[str, int] = {}
        self._mutations = self._reads = self._syncs = 0
        self._kill_at: int | None = None
        self._dead = False
        self._fail_at: tuple[int, int] | None = None
        self._fail_read_at: tuple[int, int] | None = None
        self._fail_syncs: set[int] = set()
        self._fail_sync_of: set[int] = set()

    # ---- copies

    def _with_model(self, model: Model) -> SimulatedFileSystem:
        other = SimulatedFileSystem(
            extended_attributes=self.extended_attributes, uid=self.uid, gid=self.gid, device=self.device
        )
        other._model = model
        other._read_only = set(self._read_only)
        other._capacity = dict(self._capacity)
        return other

    def clone(self) -> SimulatedFileSystem:
        """The same files for another process: nothing open, no trace, no faults armed. What is not yet
        durable here is not there either, so this is also the state that a killed process leaves. Cheap:
        copy-on-write."""
        with self._lock:
            return self._with_model(self._model.clone())

    def begin_trace(self) -> SimulatedFileSystem:
        """Starts an empty trace; the clone returned is where it starts from (`initial` of `crash_states`)."""
        with self._lock:
            self.trace = Trace()
            return self.clone()

    def mark(self, label: str) -> None:
        """Labels this point of the trace. Crash states list the labels that came before the crash: a test
        marks what it was promised ("committed") and demands it of every state that has the label."""
        with self._lock:
            if not self._dead:
                self.trace.marks.append((len(self.trace), label))

    # ---- faults

    def kill_at(self, number: int) -> None:
        """The `number`-th mutating call from now (1 is the next) raises `Killed` instead, and so does every
        later one. The state left is `clone()`."""
        self._kill_at = self._mutations + number

    def fail_at(self, number: int, code: int = errno.EIO) -> None:
        """The `number`-th mutating call from now fails once with that errno (a sync: as `fail_sync`
        tells)."""
        self._fail_at = (self._mutations + number, code)

    def fail_read_at(self, number: int, code: int = errno.EIO) -> None:
        """The `number`-th read of file data from now fails once with that errno."""
        self._fail_read_at = (self._reads + number, code)

    def fail_sync(self, which: str | int = 1) -> None:
        """The next sync of file `which`, or the `which`-th sync of any file from now, raises `SyncFailed`
        once. What it should have covered counts as clean from then on, and may still be lost after later good
        syncs."""
        if isinstance(which, int):
            self._fail_syncs.add(self._syncs + which)
        else:
            self._fail_sync_of.add(self._find(which, "sync").number)

    def set_capacity(self, capacity: int | None, directory: str = "/") -> None:
        """Bytes that files created below `directory` may occupy (in pages of 4 KiB, preallocated ones too)
        before ENOSPC; None for no limit. A directory with a capacity of its own is a disk of its own."""
        with self._lock:
            self._capacity.pop(self.resolve(directory), None)
            if capacity is not None:
                self._capacity[self.resolve(directory)] = capacity

    def set_read_only(self, directory: str, read_only: bool = True) -> None:
        """Names in `directory` cannot be created, removed or renamed (EACCES); files there can be written."""
        change = self._read_only.add if read_only else self._read_only.discard
        change(self.resolve(directory))

    # ---- what tests ask

    def unsynced(self, path: str) -> int:
        """How many changes to the file's data and length a power cut now could lose."""
        return len(self._find(path, "stat").changes)

    def used(self, directory: str = "/") -> int:
        """Bytes occupied by the files created below `directory` (on its disk) that have a name or are
        open."""
        return self._used(self._directory(directory))

    def write_file(self, path: str, data: Buffer) -> None:
        """Replaces the file's content, durably."""
        file = self.create(path)
        try:
            file.pwrite(0, data)
            file.sync_all()
        finally:
            file.close()
        self.sync_directory(self._locate(path, "sync")[0])

    def read_file(self, path: str) -> bytes:
        live = self._find(path, "read").live
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
        self.sync_directory(self._locate(path, "sync")[0])

    def export_file(self, path: str, real_path: str) -> None:
        """Copies a file out to the machine, holes kept: for `qemu-img` to judge."""
        with self._lock:
            live = self._find(path, "read").live
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
            node = self._find(path, "open")
            return self._opened(node, path, write, cache, locking and not force_share)

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
            directory, name = self._locate(path, "create", follow=not exclusive)
            number = self._entry(directory, name)
            if number is None:
                if not name:
                    raise _failure(path, "create", errno.EISDIR)
                self._record_new(path, directory, name, mode, "")
                return self._opened(self._find(path, "create"), path, True, cache, locking)
            if exclusive:
                raise _failure(path, "create", errno.EEXIST)
            node = self._model.nodes[number]
            file = self._opened(node, path, True, cache, locking)
            if truncate and node.live.length:
                try:
                    file.truncate(0)
                except BaseException:
                    file.close()
                    raise
            return file

    def stat(self, path: str) -> FileStat | None:
        with self._lock:
            try:
                directory, name = self._locate(path, "stat")
            except StorageError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR):
                    return None
                raise
            if not name:
                number = 2 + sorted(self._model.directories).index(directory)
                return FileStat(
                    self.device,
                    number,
                    PAGE,
                    0,
                    0,
                    stat_bits.S_IFDIR | 0o755,
                    self.uid,
                    self.gid,
                    PAGE,
                    False,
                )
            number_or_none = self._entry(directory, name)
            return None if number_or_none is None else self._stat(self._model.nodes[number_or_none])

    def unlink(self, path: str) -> None:
        with self._lock:
            place, number = self._named(path, "remove")
            self._record(Entry("unlink", number, names=(place,)), path, "remove")

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            place, number = self._named(source, "rename")
            directory, name = self._locate(target, "rename", follow=False)
            if not name:
                raise _failure(target, "rename", errno.EISDIR)
            self._check_writable(directory, target, "rename")
            if self._entry(directory, name) != number:  # two names of one file: rename does nothing (POSIX)
                self._record(Entry("rename", number, names=(place, (directory, name))), source, "rename")

    def link(self, source: str, target: str) -> None:
        """Gives a file a second name (a hard link)."""
        with self._lock:
            node = self._find(source, "link")
            self._record(Entry("link", node.number, names=(self._free_name(target, "link"),)), target, "link")

    def symlink(self, target: str, path: str) -> None:
        """Makes `path` a symbolic link that says `target`."""
        with self._lock:
            directory, name = self._free_name(path, "symlink")
            self._record_new(path, directory, name, 0o777, target)

    def make_directory(self, path: str) -> None:
        """Makes one directory, durable at once (directories are scenery here, never under test)."""
        with self._lock:
            self._record(
                Entry("make_directory", names=((self._join(*self._free_name(path, "mkdir")), ""),)),
                path,
                "mkdir",
            )

    def sync_directory(self, path: str) -> None:
        with self._lock:
            self._record(Entry("sync_directory", names=((self._directory(path), ""),)), path, "sync")

    def list_directory(self, path: str) -> list[str]:
        with self._lock:
            directory = self._directory(path)
            below = [Path(other) for other in self._model.directories if other != "/"]
            inside = [other.name for other in below if str(other.parent) == directory]
            return sorted([*self._model.directories[directory], *inside])

    def resolve(self, path: str) -> str:
        with self._lock:
            try:
                return self._join(*self._locate(path, "resolve"))
            except StorageError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    raise
                return os.path.normpath(self._join("/", path))

    def give_to(self, path: str, uid: int, gid: int) -> None:
        with self._lock:
            node = self._find(path, "chown")
            try:
                self._record(
                    Entry(
                        "attributes", node.number, attributes=replace(node.live.attributes, uid=uid, gid=gid)
                    ),
                    path,
                    "chown",
                )
            except StorageError:
                pass

    # ---- paths

    @staticmethod
    def _join(directory: str, name: str) -> str:
        return os.path.join(directory, name) if name else directory

    def _entry(self, directory: str, name: str) -> int | None:
        return self._model.directories[directory].get(name)

    def _locate(self, path: str, action: str, *, follow: bool = True) -> Name:
        """The real directory and the name in it; the name is empty if `path` is a directory itself. Relative
        paths start at `/`. Symbolic links are followed, the last one if `follow`."""
        parts = [part for part in path.split("/") if part not in ("", ".")]
        current, links = "/", 0
        while parts:
            part = parts.pop(0)
            if part == "..":
                current = str(Path(current).parent)
                continue
            child = self._join(current, part)
            if child in self._model.directories:
                current = child
                continue
            number = self._entry(current, part)
            target = "" if number is None else self._model.nodes[number].target
            if target and (parts or follow):
                links += 1
                if links > _MAX_LINKS:
                    raise _failure(path, action, errno.ELOOP)
                parts = [step for step in target.split("/") if step not in ("", ".")] + parts
                current = "/" if target.startswith("/") else current
            elif parts:
                raise _failure(path, action, errno.ENOENT if number is None else errno.ENOTDIR)
            else:
                return current, part
        return current, ""

    def _find(self, path: str, action: str) -> Node:
        directory, name = self._locate(path, action)
        if not name:
            raise _failure(path, action, errno.EISDIR)
        number = self._entry(directory, name)
        if number is None:
            raise _failure(path, action, errno.ENOENT)
        return self._model.nodes[number]

    def _directory(self, path: str) -> str:
        directory, name = self._locate(path, "open directory")
        if name:
            known = self._entry(directory, name) is not None
            raise _failure(path, "open directory", errno.ENOTDIR if known else errno.ENOENT)
        return directory

    def _check_writable(self, directory: str, path: str, action: str) -> None:
        if directory in self._read_only:
            raise _failure(path, action, errno.EACCES)

    def _free_name(self, path: str, action: str) -> Name:
        directory, name = self._locate(path, action, follow=False)
        if not name or self._entry(directory, name) is not None:
            raise _failure(path, action, errno.EEXIST)
        self._check_writable(directory, path, action)
        return directory, name

    def _named(self, path: str, action: str) -> tuple[Name, int]:
        """An existing name that may be taken away (links are not followed)."""
        directory, name = self._locate(path, action, follow=False)
        if not name:
            raise _failure(path, action, errno.EISDIR)
        number = self._entry(directory, name)
        if number is None:
            raise _failure(path, action, errno.ENOENT)
        self._check_writable(directory, path, action)
        return (directory, name), number

    # ---- the bottom: every mutation passes `_record`

    def _record_new(self, path: str, directory: str, name: str, mode: int, target: str) -> None:
        self._check_writable(directory, path, "create")
        attributes = Attributes(mode & 0o7777, self.uid, self.gid)
        self._record(
            Entry("create", names=((directory, name),), attributes=attributes, target=target), path, "create"
        )

    def _record(self, entry: Entry, path: str, action: str) -> None:
        with self._lock:
            number = self._mutations + 1
            if self._dead or number == self._kill_at:
                self._dead = True
                raise Killed(f"{path}: {action}: killed here")
            if self._fail_at is not None and number == self._fail_at[0]:
                code, self._fail_at = self._fail_at[1], None
                if entry.kind in ("sync", "sync_all"):
                    self._commit(entry._replace(kind="sync_failed"))
                raise _failure(path, action, code)
            self._commit(entry)

    def _commit(self, entry: Entry) -> None:
        self._model.apply(entry)
        self.trace.entries.append(entry)
        self._mutations += 1

    def _sync_node(self, node: Node, kind: str, path: str) -> None:
        with self._lock:
            self._syncs += 1
            if self._syncs in self._fail_syncs or node.number in self._fail_sync_of:
                self._fail_syncs.discard(self._syncs)
                self._fail_sync_of.discard(node.number)
                self._record(Entry("sync_failed", node.number), path, "sync")
                raise _failure(path, "sync", errno.EIO)
            self._record(Entry(kind, node.number), path, "sync")

    def _count_read(self, path: str) -> None:
        self._reads += 1
        if self._fail_read_at is not None and self._reads == self._fail_read_at[0]:
            code, self._fail_read_at = self._fail_read_at[1], None
            raise _failure(path, "read", code)

    def _opened(self, node: Node, path: str, write: bool, cache: str, locking: bool) -> SimulatedFile:
        if cache not in CACHE_MODES:
            raise ValueError(f"cache mode {cache!r} is none of {', '.join(CACHE_MODES)}")
        if locking:
            for other, its_node in self._open:
                if its_node is node and other._locking and (write or other._writable):
                    shared = "" if write else "shared "
                    raise LockError(
                        f'Failed to get {shared}"write" lock\nIs another process using the image [{path}]?'
                    )
        file = SimulatedFile(self, node, path, write, cache, locking)
        self._open.append((file, node))
        return file

    def _forget(self, file: SimulatedFile, node: Node) -> None:
        with self._lock:
            self._open = [pair for pair in self._open if pair[0] is not file]

    def _stat(self, node: Node) -> FileStat:
        with self._lock:
            live, attributes = node.live, node.live.attributes
            return FileStat(
                self.device,
                node.number,
                live.length,
                live.mtime,
                live.ctime,
                stat_bits.S_IFREG | attributes.mode,
                attributes.uid,
                attributes.gid,
                live.content.allocated(),
                False,
            )

    # ---- space

    def _disk_of(self, directory: str) -> str | None:
        """The directory with a capacity that files of `directory` count against."""
        above = [directory, *map(str, Path(directory).parents)]
        return next((path for path in above if path in self._capacity), None)

    def _used(self, directory: str) -> int:
        numbers = {number for names in self._model.directories.values() for number in names.values()}
        nodes = {number: self._model.nodes[number] for number in numbers}
        nodes.update({node.number: node for _, node in self._open})  # unlinked but open: still there
        disk = self._disk_of(directory)
        return sum(
            node.live.content.allocated()
            for node in nodes.values()
            if directory in (node.home, *map(str, Path(node.home).parents))
            and self._disk_of(node.home) == disk
        )

    def _room(self, node: Node) -> int | None:
        disk = self._disk_of(node.home) if self._capacity else None
        return None if disk is None else max(self._capacity[disk] - self._used(disk), 0)

    def _fitting(self, node: Node, offset: int, length: int) -> int:
        """How many of the bytes can be written before space runs out."""
        room = self._room(node)
        content = node.live.content
        if room is None or content.growth(offset, length) <= room:
            return length
        end = (offset // PAGE + 1) * PAGE
        if content.growth(offset, end - offset) > room:
            return 0
        while content.growth(offset, end + PAGE - offset) <= room:
            end += PAGE
        return end - offset

    def _need_room(self, node: Node, offset: int, length: int, path: str) -> None:
        room = self._room(node)
        if room is not None and node.live.content.growth(offset, length) > room:
            raise _failure(path, "preallocate", errno.ENOSPC)
