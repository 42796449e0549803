"""A file system in memory, with what the journal's tests want to go wrong."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field

from safeimg.journal.events import (
    Abandoned,
    BeforeRecord,
    ChangedOutside,
    Completed,
    ContentRecord,
    Declared,
    Digested,
    Event,
    FinishRecord,
    FreshRecord,
    GivenUp,
    Identity,
    ImageRecord,
    LengthRecord,
    MoveRecord,
    Observed,
    Owner,
    PatchRecord,
    Paused,
    PointOfNoReturn,
    RecoveryStarted,
    RolledBack,
    Settled,
    Started,
    StepApplied,
    StepPrepared,
    TakenBack,
    TakingBack,
    UnlinkedRecord,
)

OPERATION = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class FakeStat:
    inode: int
    size: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int = 0
    ctime_ns: int = 0
    device: int = 7
    is_device: bool = False


@dataclass
class Node:
    inode: int
    data: bytearray = field(default_factory=bytearray)
    mode: int = 0o100644
    uid: int = field(default_factory=os.geteuid)
    gid: int = 0
    mtime_ns: int = 0
    attributes: dict[str, bytes] = field(default_factory=dict)
    locked_by: object = None
    is_device: bool = False


class MemoryFile:
    def __init__(self, files: MemoryFiles, path: str, node: Node) -> None:
        self._files, self.path, self.node = files, path, node

    def length(self) -> int:
        return len(self.node.data)

    def pread(self, offset: int, length: int) -> bytes:
        return bytes(self.node.data[offset : offset + length])

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._grow(offset + len(data))
        self.node.data[offset : offset + len(data)] = data
        self.node.mtime_ns += 1

    def preallocate(self, offset: int, length: int, *, keep_size: bool) -> None:
        self._grow(offset + length, dry=keep_size)

    def _grow(self, end: int, dry: bool = False) -> None:
        if end > len(self.node.data):
            if self._files.room is not None and end - len(self.node.data) > self._files.room:
                raise OSError(errno.ENOSPC, "No space left on device", self.path)
            if not dry:
                self.node.data.extend(bytes(end - len(self.node.data)))

    def truncate(self, length: int) -> None:
        del self.node.data[length:]
        self._grow(length)

    def sync(self) -> None:
        self._files.syncs.append(self.path)
        if self._files.fail_sync:
            raise OSError(errno.EIO, "Input/output error", self.path)

    sync_all = sync

    def stat(self) -> FakeStat:
        node = self.node
        return FakeStat(
            node.inode, len(node.data), node.mode, node.uid, node.gid, node.mtime_ns, is_device=node.is_device
        )

    def get_attribute(self, name: str) -> bytes | None:
        return self.node.attributes.get(name)

    def set_attribute(self, name: str, value: bytes) -> bool:
        if self._files.attributes:
            self.node.attributes[name] = value
        return self._files.attributes

    def remove_attribute(self, name: str) -> None:
        self.node.attributes.pop(name, None)

    def try_lock(self) -> bool:
        if self.node.locked_by not in (None, self):
            return False
        self.node.locked_by = self
        return True

    def close(self) -> None:
        if self.node.locked_by is self:
            self.node.locked_by = None


class MemoryFiles:
    """`room`: bytes by which one file may still grow at a time; None for no limit."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.links: dict[str, str] = {}
        self.room: int | None = None
        self.fail_sync = False
        self.attributes = True
        self.refuse: dict[str, int] = {}  # folder → errno of creating something in it
        self.syncs: list[str] = []
        self._inodes = 100

    def put(self, path: str, data: bytes = b"", **fields: object) -> Node:
        self._inodes += 1
        node = self.nodes[path] = Node(self._inodes, bytearray(data), **fields)  # type: ignore[arg-type]
        return node

    def copy(self) -> MemoryFiles:
        twin = MemoryFiles()
        for path, node in self.nodes.items():
            twin.nodes[path] = Node(
                node.inode,
                bytearray(node.data),
                node.mode,
                node.uid,
                node.gid,
                node.mtime_ns,
                dict(node.attributes),
            )
        twin._inodes = self._inodes
        return twin

    def open(self, path: str, *, write: bool = False) -> MemoryFile:
        node = self.nodes.get(self.resolve(path))
        if node is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return MemoryFile(self, path, node)

    def create(self, path: str, *, mode: int = 0o644, exclusive: bool = False) -> MemoryFile:
        refused = self.refuse.get(os.path.dirname(path))
        if refused is not None:
            raise OSError(refused, os.strerror(refused), path)
        if path in self.nodes:
            if exclusive:
                raise FileExistsError(errno.EEXIST, "File exists", path)
            self.nodes[path].data.clear()
        else:
            self.put(path, mode=0o100000 | mode)
        return MemoryFile(self, path, self.nodes[path])

    def stat(self, path: str) -> FakeStat | None:
        node = self.nodes.get(self.resolve(path))
        return None if node is None else MemoryFile(self, path, node).stat()

    def unlink(self, path: str) -> None:
        if self.nodes.pop(path, None) is None and self.links.pop(path, None) is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    def rename(self, source: str, target: str) -> None:
        self.nodes[target] = self.nodes.pop(source)

    def sync_directory(self, path: str) -> None:
        self.syncs.append(path)

    def list_directory(self, path: str) -> list[str]:
        names = [
            os.path.relpath(name, path) for name in [*self.nodes, *self.links] if name.startswith(path + "/")
        ]
        return sorted({name.split("/")[0] for name in names})

    def resolve(self, path: str) -> str:
        path = os.path.normpath(path)
        return self.links.get(path, path)

    def give_to(self, path: str, uid: int, gid: int) -> None:
        self.nodes[path].uid, self.nodes[path].gid = uid, gid


def identity(**fields: int | str) -> Identity:
    return Identity(**({"device": 7, "inode": 101, "size": 0, "mtime_ns": 1, "ctime_ns": 2} | fields))  # type: ignore[arg-type]


OWNER = Owner("machine", "boot", 42, 4242, 0, "host")
DECLARED = Declared(
    OPERATION,
    "commit",
    ("-d", "top.qcow2"),
    "0.1.0",
    OWNER,
    (
        ImageRecord("base", "base.qcow2", "qcow2", identity(tag=OPERATION), True),
        ImageRecord("overlay", "dir/top\udcff.qcow2", "qcow2", identity(inode=2**64 - 1, mtime_ns=-5), False),
    ),
    1700000000.25,
)
STARTED = Started(
    {"a": [1, None, "x", {"b": 0.5}], "cursor": True}, (1 << 40, 0), True, (1,), 1 << 41, 1700000001.0
)
STEP = StepPrepared(
    1,
    "data",
    allocate=(
        PatchRecord(0, 512, None, b"new" + bytes(5000) + b"x"),
        PatchRecord(0, 0, b"\1" * 8, b"\2" * 8),
    ),
    link=(PatchRecord(1, 65536, bytes(128), b"\xf5SiF" * 32),),
    moves=(MoveRecord(0, 4096, 10, 0, None), MoveRecord(0, 8192, 10, None, 512)),
    fresh=(FreshRecord(0, 1 << 30, 65537, bytes(range(64)), False),),
    before=(BeforeRecord(0, 4096, 10, 4096, False, bytes(32)), BeforeRecord(0, 8192, 10, None, True, b"")),
    lengths=(LengthRecord(0, 10, 20),),
    unlinked=(UnlinkedRecord(0, 65536, 65536),),
    cursor={"at": 5},
    done=20,
    time=1.5,
)
EVERY_EVENT: tuple[Event, ...] = (
    DECLARED,
    STARTED,
    Observed(((1, identity(size=9)),)),
    STEP,
    StepApplied(1, (bytes(32), b"")),
    GivenUp(1, (BeforeRecord(0, 4096, 512, 8192, False, bytes(32)),)),
    PointOfNoReturn(2, 3.0),
    Paused("no space left", 4.0),
    RecoveryStarted("rollback", OWNER, 5.0),
    TakingBack(1),
    TakenBack(1),
    Completed((FinishRecord(0, 0, b"ab", b"cd"),), 6.0),
    RolledBack(("the old content of x",), 7.0),
    Abandoned("because", 8.0),
    ChangedOutside(((1, 2.5),)),
    Digested((ContentRecord(0, "qcow2", "ab" * 32),)),
    Settled(((0, identity()),), "too much to keep", 9.0),
)
