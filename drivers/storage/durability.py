"""What a disk remembers: the durable model under the simulated file system.

    mutating call ──► Entry ──► trace (append only)
                        │
                        ▼            sync: every unsynced change of the file
      live copy of a file  ────────────────────────────────────────────►  disk copy
      (the page cache: what        changes: [ c1, c2, c3, … ]             (what power loss
       every process reads)        since the last good sync               cannot take away)

A process that dies leaves the live copy as it is and the changes as unsynced as they were (`Model.clone`): a
power cut *during recovery* can still lose them. A power cut leaves the disk copy plus any part of the
changes:

* Data, sector by sector (512 bytes, never torn inside). A sector holds what it held on disk or what it held
  live right after any one of the unsynced changes that touched it (a page cache writes whole sectors). So
  changes are recorded widened to sectors, any subset may arrive, in any order, and a change may arrive in
  part.
* The length: that on disk or that after any one of the changes, whatever data arrived. Data past it is gone;
  data missing before it reads as zeroes. Shrinking is a new length and a hole, and either may arrive without
  the other.
* Names: each create, link, unlink and rename not followed by a sync of its directory arrives or not, alone. A
  rename is whole or not at all; one between two directories is only sure once both are synced. A synced file
  whose name did not arrive cannot be reached; one whose removal did not arrive is back.
* Times, owner, mode and extended attributes: old or new. `sync` (fdatasync) does not cover them, `sync_all`
  does.

A failed sync poisons the changes that it should have covered: the system thinks them clean, so no later sync
covers them, and only writing the same sectors again (with a good sync after) makes those sure. A length that
did not arrive is sure again once something synced reaches past it, or sets it.

Stricter than most real file systems, on purpose: a protocol that survives this survives those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.sparse import SparseBytes

SECTOR = 512
TICK = 1_000_000  # nanoseconds between two mutations on the logical clock
EPOCH = 1_700_000_000 * 10**9

Name = tuple[str, str]  # directory (absolute, without links) and the name in it


@dataclass(frozen=True, slots=True)
class Attributes:
    """What `sync` does not cover, apart from times."""

    mode: int
    uid: int
    gid: int
    extended: Mapping[str, bytes] = field(default_factory=dict)  # replaced, never changed


class Entry(NamedTuple):
    """One mutation, with all that replaying it takes."""

    kind: str  # a method of `Model` without its `_do_`
    node: int = 0
    offset: int = 0
    length: int = 0
    data: bytes = b""
    flag: bool = False  # zero: `unmap`; preallocate: `keep_size`
    through: bool = False  # opened writethrough or directsync: durable when the call returns
    names: tuple[Name, ...] = ()
    attributes: Attributes | None = None
    target: str = ""  # of a symbolic link


class Piece(NamedTuple):
    """Part of a change, in whole sectors (except `reserve`)."""

    kind: str  # "data", "hole", "reserve" (space; changes no byte)
    offset: int
    length: int
    data: bytes = b""


class Change(NamedTuple):
    """A mutation of one file that no sync covers yet."""

    serial: int  # of the mutation, unique and increasing
    kind: str
    offset: int  # as called, for descriptions
    size: int
    pieces: tuple[Piece, ...]
    length: int | None  # the file's length afterwards, if this changed it
    poisoned: bool = False


class NameChange(NamedTuple):
    """A create, link, unlink or rename that its directories' syncs do not cover yet. Arrives whole or not at
    all."""

    serial: int
    kind: str
    sets: tuple[tuple[Name, int | None], ...]  # in order; None removes
    waits: frozenset[str]  # directories not synced since


class Copy:
    """A file as somebody sees it: the page cache (live) or the disk."""

    __slots__ = ("attributes", "content", "ctime", "length", "mtime")

    def __init__(self, attributes: Attributes, now: int) -> None:
        self.content = SparseBytes()
        self.length = 0
        self.attributes = attributes
        self.mtime = self.ctime = now

    def clone(self) -> Copy:
        other = Copy.__new__(Copy)
        other.content = self.content.clone()
        other.length = self.length
        other.attributes = self.attributes
        other.mtime, other.ctime = self.mtime, self.ctime
        return other

    def apply(self, piece: Piece) -> None:
        if piece.kind == "data":
            self.content.write(piece.offset, piece.data)
        elif piece.kind == "reserve":
            self.content.reserve(piece.offset, piece.length)
        else:
            self.content.punch(piece.offset, piece.length)


class Node:
    """An inode: a regular file, or a symbolic link if `target` is set."""

    __slots__ = (
        "changes",
        "disk",
        "disk_version",
        "home",
        "live",
        "number",
        "old_attributes",
        "synced_times",
        "target",
    )

    def __init__(self, number: int, home: str, live: Copy, disk: Copy, target: str = "") -> None:
        self.number = number
        self.home = home  # the directory it was created in: whose space it takes
        self.live = live
        self.disk = disk
        self.disk_version = 0  # changes with `disk`
        self.changes: list[Change] = []
        self.old_attributes: list[Attributes] = []  # versions between those of `disk` and `live`
        self.synced_times = (disk.mtime, disk.ctime)  # at the last sync
        self.target = target

    def clone(self) -> Node:
        other = Node(self.number, self.home, self.live.clone(), self.disk.clone(), self.target)
        other.disk_version = self.disk_version
        other.changes = list(self.changes)
        other.old_attributes = list(self.old_attributes)
        other.synced_times = self.synced_times
        return other

    def settle(self, newest: int) -> None:
        """The `newest` changes reach the disk; older ones stay in doubt where these did not touch them."""
        split = len(self.changes) - newest
        rest, chosen = self.changes[:split], self.changes[split:]
        self.disk_version += 1
        for change in chosen:
            for piece in change.pieces:
                self.disk.apply(piece)
        if not rest or any(change.length is not None for change in chosen):
            self.disk.length = self.live.length
            rest = [change._replace(length=None) for change in rest]
        else:
            ends = (change.offset + change.size for change in chosen if change.kind in ("write", "zero"))
            floor = min(max(ends, default=0), self.live.length)
            self.disk.length = max(self.disk.length, floor)
            self.disk.content.erase(self.disk.length, self.disk.content.end() - self.disk.length)
            rest = [c._replace(length=None) if c.length is not None and c.length < floor else c for c in rest]
        covered = [(p.offset, p.offset + p.length) for c in chosen for p in c.pieces if p.kind != "reserve"]
        rest = [c._replace(pieces=_outside(c.pieces, covered)) for c in rest]
        self.changes = [change for change in rest if change.pieces or change.length is not None]


def clip(piece: Piece, start: int, end: int) -> Piece | None:
    """The part of a piece inside a range."""
    start, end = max(start, piece.offset), min(end, piece.offset + piece.length)
    if start >= end:
        return None
    data = piece.data[start - piece.offset : end - piece.offset] if piece.data else b""
    return Piece(piece.kind, start, end - start, data)


def _outside(pieces: Iterable[Piece], covered: Iterable[tuple[int, int]]) -> tuple[Piece, ...]:
    """The parts of pieces outside all of the ranges."""
    rest = list(pieces)
    for start, end in covered:
        parts: list[Piece] = []
        for piece in rest:
            if piece.offset + piece.length <= start or piece.offset >= end:
                parts.append(piece)
            else:
                around = (clip(piece, piece.offset, start), clip(piece, end, piece.offset + piece.length))
                parts.extend(part for part in around if part is not None)
        rest = parts
    return tuple(rest)


def _sectors(content: SparseBytes, offset: int, length: int) -> tuple[Piece, ...]:
    """A range just written, in whole sectors."""
    start, end = offset // SECTOR * SECTOR, -(-(offset + length) // SECTOR) * SECTOR
    return (Piece("data", start, end - start, content.read(start, end - start)),)


def _hole(content: SparseBytes, offset: int, length: int) -> tuple[Piece, ...]:
    """A range just made to read as zeroes, in whole sectors. A sector at its edge on a page that is not there
    did not change."""
    start, end = -(-offset // SECTOR) * SECTOR, (offset + length) // SECTOR * SECTOR
    edges = {offset // SECTOR * SECTOR, (offset + length - 1) // SECTOR * SECTOR} if length else set()
    pieces = [Piece("hole", start, end - start)] if start < end else []
    for edge in sorted(edges):
        if not start <= edge < end and content.has_page(edge):
            pieces.append(Piece("data", edge, SECTOR, content.read(edge, SECTOR)))
    return tuple(pieces)


class Model:
    """All files and names, live and on disk. `apply` is the only way in, so that replaying a trace is running
    it."""

    __slots__ = (
        "clock",
        "directories",
        "disk_names",
        "disk_names_version",
        "name_changes",
        "next_number",
        "nodes",
        "serial",
    )

    def __init__(self) -> None:
        self.nodes: dict[int, Node] = {}
        self.directories: dict[str, dict[str, int]] = {"/": {}}  # live: directory → name → node
        self.disk_names: dict[str, dict[str, int]] = {"/": {}}
        self.disk_names_version = 0
        self.name_changes: list[NameChange] = []
        self.clock = EPOCH
        self.serial = 0
        self.next_number = 100

    def clone(self) -> Model:
        """The same state, independent. Files that nobody can ever reach again are left out."""
        other = Model()
        other.directories = {path: dict(names) for path, names in self.directories.items()}
        other.disk_names = {path: dict(names) for path, names in self.disk_names.items()}
        other.disk_names_version = self.disk_names_version
        other.name_changes = list(self.name_changes)
        other.clock, other.serial, other.next_number = self.clock, self.serial, self.next_number
        kept = {number for change in self.name_changes for _, number in change.sets}
        for tree in (self.directories, self.disk_names):
            kept.update(number for names in tree.values() for number in names.values())
        other.nodes = {number: node.clone() for number, node in self.nodes.items() if number in kept}
        return other

    def apply(self, entry: Entry) -> None:
        self.serial += 1
        self.clock += TICK
        if entry.node and entry.node not in self.nodes:
            return  # a file without a name, still open in the traced run: no crash shows it
        _ACTIONS[entry.kind](self, entry)

    # ---- files

    def _changed(self, entry: Entry, pieces: tuple[Piece, ...], length: int) -> None:
        node = self.nodes[entry.node]
        live = node.live
        live.mtime = live.ctime = self.clock
        new_length = length if length != live.length else None
        live.length = length
        if pieces or new_length is not None:
            size = entry.length or len(entry.data)
            node.changes.append(Change(self.serial, entry.kind, entry.offset, size, pieces, new_length))
            if entry.through:
                node.settle(1)

    def _do_write(self, entry: Entry) -> None:
        live = self.nodes[entry.node].live
        data, offset = entry.data, entry.offset
        live.content.write(offset, data)
        if offset % SECTOR or len(data) % SECTOR:
            pieces = _sectors(live.content, offset, len(data))
        else:
            pieces = (Piece("data", offset, len(data), data),)
        self._changed(entry, pieces, max(live.length, offset + len(data)))

    def _do_zero(self, entry: Entry) -> None:
        live = self.nodes[entry.node].live
        live.content.punch(entry.offset, entry.length)
        pieces = _hole(live.content, entry.offset, entry.length)
        if not entry.flag:
            live.content.reserve(entry.offset, entry.length)
            pieces += (Piece("reserve", entry.offset, entry.length),)
        self._changed(entry, pieces, max(live.length, entry.offset + entry.length))

    def _do_discard(self, entry: Entry) -> None:
        live = self.nodes[entry.node].live
        live.content.punch(entry.offset, entry.length)
        self._changed(entry, _hole(live.content, entry.offset, entry.length), live.length)

    def _do_preallocate(self, entry: Entry) -> None:
        live = self.nodes[entry.node].live
        live.content.reserve(entry.offset, entry.length)
        length = live.length if entry.flag else max(live.length, entry.offset + entry.length)
        self._changed(entry, (Piece("reserve", entry.offset, entry.length),), length)

    def _do_truncate(self, entry: Entry) -> None:
        live = self.nodes[entry.node].live
        end = max(live.content.end(), live.length)
        live.content.cut(entry.length)
        pieces = _hole(live.content, entry.length, end - entry.length) if end > entry.length else ()
        self._changed(entry._replace(offset=entry.length, length=0), pieces, entry.length)

    def _do_sync(self, entry: Entry) -> None:
        node = self.nodes[entry.node]
        if node.changes:
            node.settle(sum(not change.poisoned for change in node.changes))
        node.synced_times = (node.live.mtime, node.live.ctime)

    def _do_sync_all(self, entry: Entry) -> None:
        self._do_sync(entry)
        node = self.nodes[entry.node]
        node.disk_version += 1
        node.disk.attributes = node.live.attributes
        node.disk.mtime, node.disk.ctime = node.live.mtime, node.live.ctime
        node.old_attributes.clear()

    def _do_sync_failed(self, entry: Entry) -> None:
        node = self.nodes[entry.node]
        node.changes = [change._replace(poisoned=True) for change in node.changes]

    def _do_attributes(self, entry: Entry) -> None:
        assert entry.attributes is not None
        node = self.nodes[entry.node]
        node.old_attributes.append(node.live.attributes)
        node.live.attributes = entry.attributes
        node.live.ctime = self.clock

    # ---- names

    def _set_names(self, entry: Entry, *sets: tuple[Name, int | None]) -> None:
        for (directory, name), number in sets:
            if number is None:
                del self.directories[directory][name]
            else:
                self.directories[directory][name] = number
        waits = frozenset(directory for (directory, _), _ in sets)
        self.name_changes.append(NameChange(self.serial, entry.kind, sets, waits))

    def _do_create(self, entry: Entry) -> None:
        assert entry.attributes is not None
        ((directory, name),) = entry.names
        live, disk = Copy(entry.attributes, self.clock), Copy(entry.attributes, self.clock)
        self.nodes[self.next_number] = Node(self.next_number, directory, live, disk, entry.target)
        self._set_names(entry, ((directory, name), self.next_number))
        self.next_number += 1

    def _do_link(self, entry: Entry) -> None:
        self.nodes[entry.node].live.ctime = self.clock
        self._set_names(entry, (entry.names[0], entry.node))

    def _do_unlink(self, entry: Entry) -> None:
        self.nodes[entry.node].live.ctime = self.clock
        self._set_names(entry, (entry.names[0], None))

    def _do_rename(self, entry: Entry) -> None:
        self.nodes[entry.node].live.ctime = self.clock
        source, target = entry.names
        self._set_names(entry, (source, None), (target, entry.node))

    def _do_sync_directory(self, entry: Entry) -> None:
        ((directory, _),) = entry.names
        waiting: list[NameChange] = []
        settled: list[NameChange] = []
        names: set[Name] = set()  # decided by what is settled: an older change of them is decided with it
        for change in reversed(self.name_changes):
            change = change._replace(waits=change.waits - {directory})
            if change.waits and not any(name in names for name, _ in change.sets):
                waiting.append(change)
            else:
                settled.append(change)
                names.update(name for name, _ in change.sets)
        self.name_changes = waiting[::-1]
        self.disk_names_version += bool(settled)
        for change in reversed(settled):
            set_names(self.disk_names, change)

    def _do_make_directory(self, entry: Entry) -> None:
        ((directory, _),) = entry.names
        self.directories[directory] = {}
        self.disk_names[directory] = {}
        self.disk_names_version += 1


def set_names(tree: dict[str, dict[str, int]], change: NameChange) -> None:
    """Carries out a name change in a tree where earlier ones may be missing."""
    for (directory, name), number in change.sets:
        if number is None:
            tree[directory].pop(name, None)
        else:
            tree[directory][name] = number


_ACTIONS = {name[4:]: action for name, action in vars(Model).items() if name.startswith("_do_")}
