"""What lies under the simulated files: every mutation passes `Recorder.record`, and faults strike there.

One recorder is one run of one process on one set of disks: the model (what is live, what is durable), the
trace, the armed faults, the space left. It knows nodes, not paths.
"""

from __future__ import annotations

import errno
import os
import stat as stat_bits
import threading
from dataclasses import dataclass, field
from pathlib import Path

from safeimg.drivers.errors import StorageError, SyncFailed
from safeimg.drivers.storage.api import FileStat
from safeimg.drivers.storage.durability import Entry, Model, Node
from safeimg.drivers.storage.locks import NOTHING, Claim
from safeimg.drivers.storage.sparse import PAGE


class Killed(BaseException):
    """The simulated process is dead (`kill_at`): no mutation happens any more, in no thread."""


def failure(path: str, action: str, code: int) -> StorageError:
    """The error of a system call that failed with errno `code`."""
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


@dataclass(slots=True, eq=False)
class Opened:
    """What an open file holds of its node."""

    node: Node
    claim: Claim = NOTHING  # QEMU's locks
    exclusive: bool = False  # the whole file's lock


class Recorder:
    """Applies mutations to a model and notes them, unless a fault is due. `lock` is held around every
    call."""

    def __init__(self, model: Model, *, device: int, extended_attributes: bool) -> None:
        self.model = model
        self.device = device
        self.extended_attributes = extended_attributes  # whether files can have them
        self.lock = threading.RLock()
        self.trace = Trace()
        self.capacity: dict[str, int] = {}  # directory → bytes
        self.opened: list[Opened] = []
        self.dead = False
        self._mutations = self._syncs = 0
        self._kill_at: int | None = None
        self._fail_at: tuple[int, int] | None = None
        self._fail_syncs: set[int] = set()
        self._fail_sync_of: set[int] = set()

    # ---- faults, armed

    def kill_at(self, number: int) -> None:
        self._kill_at = self._mutations + number

    def fail_at(self, number: int, code: int) -> None:
        self._fail_at = (self._mutations + number, code)

    def fail_sync_number(self, number: int) -> None:
        self._fail_syncs.add(self._syncs + number)

    def fail_sync_of(self, node: Node) -> None:
        self._fail_sync_of.add(node.number)

    # ---- calls

    def record(self, entry: Entry, path: str, action: str) -> None:
        """Carries a mutation out, or raises `Killed` or `StorageError` and leaves everything as it was."""
        with self.lock:
            number = self._mutations + 1
            if self.dead or number == self._kill_at:
                self.dead = True
                raise Killed(f"{path}: {action}: killed here")
            if self._fail_at is not None and number == self._fail_at[0]:
                code, self._fail_at = self._fail_at[1], None
                if entry.kind in ("sync", "sync_all"):
                    self._commit(entry._replace(kind="sync_failed"))
                raise failure(path, action, code)
            self._commit(entry)

    def _commit(self, entry: Entry) -> None:
        self.model.apply(entry)
        self.trace.entries.append(entry)
        self._mutations += 1

    def sync(self, node: Node, kind: str, path: str) -> None:
        """`kind`: "sync" or "sync_all"."""
        with self.lock:
            self._syncs += 1
            if self._syncs in self._fail_syncs or node.number in self._fail_sync_of:
                self._fail_syncs.discard(self._syncs)
                self._fail_sync_of.discard(node.number)
                self.record(Entry("sync_failed", node.number), path, "sync")
                raise failure(path, "sync", errno.EIO)
            self.record(Entry(kind, node.number), path, "sync")

    def stat(self, node: Node) -> FileStat:
        with self.lock:
            live, attributes = node.live, node.live.attributes
            return FileStat(
                device=self.device,
                inode=node.number,
                size=live.length,
                mtime_ns=live.mtime,
                ctime_ns=live.ctime,
                mode=stat_bits.S_IFREG | attributes.mode,
                uid=attributes.uid,
                gid=attributes.gid,
                allocated=live.content.allocated(),
                is_device=False,
            )

    # ---- space

    def _disk_of(self, directory: str) -> str | None:
        """The directory with a capacity that files of `directory` count against."""
        above = (directory, *map(str, Path(directory).parents))
        return next((path for path in above if path in self.capacity), None)

    def used(self, directory: str) -> int:
        """Bytes occupied by the files created below `directory`, on its disk, that have a name or are
        open."""
        numbers = {number for names in self.model.directories.values() for number in names.values()}
        nodes = {number: self.model.nodes[number] for number in numbers}
        nodes.update({opened.node.number: opened.node for opened in self.opened})
        disk = self._disk_of(directory)
        below = (
            node
            for node in nodes.values()
            if directory in (node.home, *map(str, Path(node.home).parents))
            and self._disk_of(node.home) == disk
        )
        return sum(node.live.content.allocated() for node in below)

    def fitting(self, node: Node, offset: int, length: int) -> int:
        """How many of the bytes can be written before space runs out."""
        disk = self._disk_of(node.home) if self.capacity else None
        if disk is None:
            return length
        room = max(self.capacity[disk] - self.used(disk), 0)
        growth = node.live.content.growth
        if growth(offset, length) <= room:
            return length
        end = (offset // PAGE + 1) * PAGE
        if growth(offset, end - offset) > room:
            return 0
        while growth(offset, end + PAGE - offset) <= room:
            end += PAGE
        return end - offset
