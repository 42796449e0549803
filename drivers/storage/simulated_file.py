"""An open file of the simulated file system."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace

from safeimg.drivers.errors import LockError, StorageError
from safeimg.drivers.storage.api import Buffer, FileStat, Span
from safeimg.drivers.storage.durability import Entry, Node
from safeimg.drivers.storage.locks import Claim
from safeimg.drivers.storage.recorder import Opened, Recorder, failure

MAX_LENGTH = 2**63 - 1
_PERMISSIONS = ("consistent read", "write", "write unchanged", "resize")  # in the order of locks.py


class SimulatedFile:
    """An open file of a `SimulatedFileSystem`; made by its `open` and `create`.

    Unlike a `LocalFile`, which refuses to write after a failed sync, it goes on, so that a test sees what a
    program loses that does."""

    __slots__ = ("_cache", "_closed", "_node", "_opened", "_path", "_recorder", "_writable", "locking")

    def __init__(self, recorder: Recorder, node: Node, path: str, writable: bool, cache: str) -> None:
        self._recorder = recorder
        self._node = node
        self._path = path
        self._writable = writable
        self._cache = cache
        self._closed = False
        self.locking = False  # see `locks.Lockable`
        self._opened = Opened(node)
        recorder.opened.append(self._opened)

    @property
    def _through(self) -> bool:
        return self._cache in ("writethrough", "directsync")

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
            raise failure(self._path, action, errno.EBADF)
        if offset < 0 or length < 0:
            raise failure(self._path, action, errno.EINVAL)

    def _mutate(self, entry: Entry, action: str) -> None:
        if not self._writable:
            raise failure(self._path, action, errno.EBADF)
        if entry.offset + max(entry.length, len(entry.data)) > MAX_LENGTH:
            raise failure(self._path, action, errno.EFBIG)
        self._recorder.record(entry, self._path, action)

    def length(self) -> int:
        self._usable("length")
        return self._node.live.length

    def pread(self, offset: int, length: int) -> bytes:
        self._usable("read", offset=offset, length=length)
        with self._recorder.lock:
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
        with self._recorder.lock:
            fits = self._recorder.fitting(self._node, offset, len(whole))
            if fits:
                number, through = self._node.number, self._through
                self._mutate(Entry("write", number, offset, data=whole[:fits], through=through), "write")
            if fits < len(whole):
                raise failure(self._path, "write", errno.ENOSPC)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._usable("write zeroes", offset=offset, length=length)
        entry = Entry("zero", self._node.number, offset, length, flag=unmap, through=self._through)
        self._take_space(entry, "write zeroes", takes=not unmap)

    def discard(self, offset: int, length: int) -> None:
        self._usable("discard", offset=offset, length=length)
        with self._recorder.lock:
            length = min(length, self._node.live.length - offset)
            if length > 0:
                try:
                    self._mutate(Entry("discard", self._node.number, offset, length), "discard")
                except StorageError:
                    pass

    def preallocate(self, offset: int, length: int, *, keep_size: bool) -> None:
        self._usable("preallocate", offset=offset, length=length)
        entry = Entry("preallocate", self._node.number, offset, length, flag=keep_size, through=self._through)
        self._take_space(entry, "preallocate", takes=True)

    def _take_space(self, entry: Entry, action: str, *, takes: bool) -> None:
        """Unlike a write, a fallocate for which there is no room does nothing."""
        with self._recorder.lock:
            if takes and self._recorder.fitting(self._node, entry.offset, entry.length) < entry.length:
                raise failure(self._path, action, errno.ENOSPC)
            if entry.length:
                self._mutate(entry, action)

    def truncate(self, length: int) -> None:
        self._usable("truncate", length=length)
        entry = Entry("truncate", self._node.number, length=length, through=self._through)
        self._mutate(entry, "truncate")

    def spans(self, offset: int, length: int) -> Iterator[Span]:
        """As at the time of the call. Space preallocated or zeroed but never written is a hole, as on ext4
        and xfs."""
        self._usable("find holes", offset=offset, length=length)
        with self._recorder.lock:
            end = min(offset + length, self._node.live.length)
            runs = list(self._node.live.content.data_runs(offset, end)) if offset < end else []
        return _spans(offset, end, runs)

    def sync(self) -> None:
        self._sync("sync")

    def sync_all(self) -> None:
        self._sync("sync_all")

    def _sync(self, kind: str) -> None:
        self._usable("sync")
        if self._cache != "unsafe":
            self._recorder.sync(self._node, kind, self._path)

    def start_writeback(self, offset: int, length: int) -> None:
        """Promises nothing, so it is not even recorded."""

    def stat(self) -> FileStat:
        self._usable("stat")
        return self._recorder.stat(self._node)

    def get_attribute(self, name: str) -> bytes | None:
        self._usable("get attribute")
        return self._node.live.attributes.extended.get(name)

    def set_attribute(self, name: str, value: bytes) -> bool:
        self._usable("set attribute")
        if not self._recorder.extended_attributes:
            return False
        return self._set_extended({**self._node.live.attributes.extended, name: bytes(value)})

    def remove_attribute(self, name: str) -> None:
        self._usable("remove attribute")
        extended = dict(self._node.live.attributes.extended)
        if extended.pop(name, None) is not None:
            self._set_extended(extended)

    def _set_extended(self, extended: dict[str, bytes]) -> bool:
        attributes = replace(self._node.live.attributes, extended=extended)
        entry = Entry("attributes", self._node.number, attributes=attributes)
        try:
            self._recorder.record(entry, self._path, "set attribute")
        except StorageError:
            return False
        return True

    def lock(self, claim: Claim) -> None:
        """QEMU's image locks, as `locks.Lockable`: `LockError` if another open file is in the way."""
        with self._recorder.lock:
            others = [other for other in self._recorder.opened if other.node is self._node]
            for other in others:
                if other is self._opened:
                    continue
                for permission in claim.uses:
                    if permission in other.claim.denies:
                        raise self._refusal("", permission)
                for permission in claim.denies:
                    if permission in other.claim.uses:
                        raise self._refusal("shared ", permission)
            self._opened.claim = claim

    def _refusal(self, shared: str, permission: int) -> LockError:
        return LockError(
            f'Failed to get {shared}"{_PERMISSIONS[permission]}" lock\n'
            f"Is another process using the image [{self._path}]?"
        )

    def try_lock(self) -> bool:
        """The whole file's exclusive lock, kept until it is closed: what the journal takes on its logs."""
        self._usable("lock")
        with self._recorder.lock:
            if any(other.node is self._node and other.exclusive for other in self._recorder.opened):
                return self._opened.exclusive
            self._opened.exclusive = True
            return True

    def close(self) -> None:
        with self._recorder.lock:
            if not self._closed:
                self._closed = True
                self._recorder.opened.remove(self._opened)


def _spans(offset: int, end: int, runs: list[tuple[int, int]]) -> Iterator[Span]:
    position = offset
    for start, stop in runs:
        if position < start:
            yield Span(position, start - position, False)
        yield Span(start, stop - start, True)
        position = stop
    if position < end:
        yield Span(position, end - position, False)
