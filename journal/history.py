"""The history: what settled operations did, queryable, and which operations of this host are pending.

`SqliteHistory` keeps it in the state directory; `MemoryHistory` is its double for tests and for the power-cut
simulation. Losing the pending index loses nothing: the logs are the truth while an operation is pending.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Protocol

from safeimg.drivers.records import NamedTuple
from safeimg.journal import chain
from safeimg.journal.chain import EventRow, OperationRow
from safeimg.journal.errors import JournalError
from safeimg.journal.events import (
    ChangedOutside,
    ContentRecord,
    Declared,
    Digested,
    Event,
    Identity,
    Settled,
    Started,
)
from safeimg.journal.identity import same_file

UNDO = "undo"  # the command that takes completed operations back
UNDOES = "operation"  # its setting that names the operation


class PendingRow(NamedTuple):
    """An operation that has not been settled, as far as this host knows."""

    operation: str
    command: str
    log: str  # absolute path
    home: str  # absolute path of the home image
    machine: str
    started: float  # seconds since the epoch


class History(Protocol):
    """Images are asked about by their identity now (`identity.identify`)."""

    def at(self, path: str) -> History:
        """The history that keeps what there is about the image at `path`: another one than this where it lies beside
        the image. Recording needs no such choice."""
        ...

    def add_pending(self, entry: PendingRow) -> None: ...
    def remove_pending(self, operation: str) -> None: ...
    def pending(self) -> list[PendingRow]: ...
    def record_settled(self, events: Iterable[Event], *, home: str) -> None:
        """Records a settled operation and takes it off the pending index, all or nothing and durably.

        `events`: all of its log. `home`: the home image's path, for display. Recording an operation again changes
        nothing.
        """
        ...

    def log(self, image: Identity) -> list[OperationRow]:
        """The settled operations that touched the image, oldest first."""
        ...

    def show(self, image: Identity, operation: str) -> list[EventRow]:
        """The events of one of them. `operation` may be cut short to what is unambiguous; `JournalError` if
        there is none such."""
        ...

    def chain(self, image: Identity, kinds: Sequence[str] = ()) -> list[EventRow]:
        """The image's whole chain, in order of position; or its events of these kinds."""
        ...

    def newest(self, image: Identity, kinds: Sequence[str]) -> EventRow | None:
        """The newest event of these kinds in the image's chain."""
        ...


class ImageRow(NamedTuple):
    """An image that the history knows. Text for what may exceed 63 bits."""

    number: int
    tag: str | None
    device: str
    inode: str
    path: str


class Store(Protocol):
    """What recording needs of a history's tables, within one transaction."""

    def knows(self, operation: str) -> bool: ...
    def images(self, identity: Identity) -> list[ImageRow]:
        """Those with the identity's tag or inode, oldest first."""
        ...

    def put_image(self, image: ImageRow) -> int:
        """Inserts it (number 0), or updates the one of that number."""
        ...

    def head(self, image: int) -> tuple[int, bytes]:
        """Position and hash of the last row of its chain; 0 and `chain.GENESIS` if it has none."""
        ...

    def put_operation(self, row: OperationRow) -> None: ...
    def put_part(self, operation: str, image: int, role: str, path: str, identity: Identity) -> None: ...
    def put_events(self, image: int, rows: Sequence[EventRow]) -> None: ...
    def drop_pending(self, operation: str) -> None: ...
    def last_hash(self, operation: str) -> bytes:
        """Of an operation's last event in its home's chain; empty if that is not here."""
        ...


class Prepared(NamedTuple):
    """An operation made ready for recording."""

    summary: OperationRow
    declared: Declared
    bodies: list[tuple[str, str]]  # kind and body of each event
    looks: Mapping[int, Identity]  # how the images looked once everything was done to them
    lost: str  # why the operation cannot be undone
    contents: Mapping[int, ContentRecord]  # what they showed, where that is on record
    changed: Mapping[int, float]  # images that were changed outside before it: when they were last settled
    undoes: str | None  # the operation that this one took back


def prepare(events: Iterable[Event], home: str) -> Prepared:
    """Reads the events once, keeping nothing of their bulk. Raises `JournalError` if they are not a whole
    operation."""
    first: Event | None = None
    last: Event | None = None
    bodies = []
    looks: dict[int, Identity] = {}
    undoes, lost = None, ""
    contents: dict[int, ContentRecord] = {}
    changed: dict[int, float] = {}
    for event in events:
        first = first or event
        if isinstance(event, Settled):
            looks.update(event.identities)
            lost = event.lost
        else:
            last = event
        if isinstance(event, ChangedOutside):
            changed.update(event.images)
        if isinstance(event, Started):
            undoes = event.settings.get(UNDOES)
        if isinstance(event, Digested):
            contents.update((record.image, record) for record in event.images)
        bodies.append((type(event).__name__, chain.body_of(event)))
    summary = chain.summarise(first, last, printable(home))
    assert isinstance(first, Declared)
    if first.command != UNDO or not isinstance(undoes, str):
        undoes = None
    return Prepared(summary, first, bodies, looks, lost, contents, changed, undoes)


def settle(store: Store, settled: Prepared, chosen: Container[int] | None = None, head: bytes = b"") -> bytes:
    """Writes a settled operation's rows: every event into its home's chain, one into each participant's. The hash of
    the last one at its home.

    `chosen`: the images that this store is for, by index (all of them if not given). `head`: that hash, where the home
    is not one of them."""
    summary = settled.summary
    store.drop_pending(summary.operation)
    if store.knows(summary.operation):
        return head or store.last_hash(summary.operation)
    store.put_operation(summary)
    seen: set[int] = set()
    for index, image in enumerate(settled.declared.images):
        if chosen is not None and index not in chosen:
            continue
        identity = settled.looks.get(index, image.identity)
        path = summary.home if index == 0 else _beside(summary.home, printable(image.path))
        number = image_number(store, identity, path)
        if number in seen:
            continue
        seen.add(number)
        store.put_part(summary.operation, number, image.role, path, identity)
        position, previous = store.head(number)
        if index == 0:
            rows = chain.chain_home(settled.bodies, summary.operation, position, previous)
            head = rows[-1].hash
        else:
            more: dict[str, Any] = {
                "found": image.identity,
                "look": settled.looks.get(index),
                "lost": settled.lost,
                "content": settled.contents.get(index),
                "changed": settled.changed.get(index),
            }
            if settled.undoes is not None:
                more[UNDOES] = settled.undoes
            rows = [chain.chain_participant(summary, image.role, head, position, previous, more)]
        store.put_events(number, rows)
    return head


def image_number(store: Store, identity: Identity, path: str) -> int:
    """The image's number in the history, which learns of it if need be."""
    known = match(store.images(identity), identity)
    row = ImageRow(
        known.number if known else 0, identity.tag, str(identity.device), str(identity.inode), path
    )
    if known is not None and row.tag is None:
        row = row._replace(tag=known.tag)
    return known.number if known == row else store.put_image(row)


def match(rows: Sequence[ImageRow], identity: Identity) -> ImageRow | None:
    """The row of an image: the same id of ours, wherever it lies now; else the same file as far as one can
    tell."""
    if identity.tag is not None:
        for row in rows:
            if row.tag == identity.tag:
                return row
    for row in reversed(rows):
        if row.device.isdecimal() and row.inode.isdecimal():
            recorded = Identity(int(row.device), int(row.inode), 0, 0, 0, row.tag)
            if same_file(recorded, identity):
                return row
    return None


def select(rows: Sequence[EventRow], operation: str) -> list[EventRow]:
    """The rows of the one operation whose id begins with `operation`; `JournalError` if that is none or
    several."""
    found = {row.operation for row in rows if operation and row.operation.startswith(operation.lower())}
    if len(found) != 1:
        problem = "no operation" if not found else f"{len(found)} operations"
        raise JournalError(f"{problem} of this image in the history begin with {operation!r}")
    return [row for row in rows if row.operation in found]


def printable(path: str) -> str:
    """The path as text that a database takes: undecodable bytes of a file name become \\x escapes."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _beside(home: str, path: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(home), path))


class MemoryHistory:
    """A history that is gone with the process."""

    def at(self, path: str) -> MemoryHistory:
        return self

    def __init__(self) -> None:
        self.image_rows: list[ImageRow] = []
        self.operations: dict[str, OperationRow] = {}
        self.parts: list[tuple[str, int, str]] = []
        self.events: dict[int, list[EventRow]] = {}
        self.pending_rows: dict[str, PendingRow] = {}

    def add_pending(self, entry: PendingRow) -> None:
        self.pending_rows[entry.operation] = entry

    def remove_pending(self, operation: str) -> None:
        self.drop_pending(operation)

    def pending(self) -> list[PendingRow]:
        return list(self.pending_rows.values())

    def record_settled(self, events: Iterable[Event], *, home: str) -> None:
        settle(self, prepare(events, home))

    def log(self, image: Identity) -> list[OperationRow]:
        row = match(self.images(image), image)
        return [
            self.operations[operation]._replace(role=role)
            for operation, number, role in self.parts
            if row is not None and number == row.number
        ]

    def show(self, image: Identity, operation: str) -> list[EventRow]:
        return select(self.chain(image), operation)

    def chain(self, image: Identity, kinds: Sequence[str] = ()) -> list[EventRow]:
        found = match(self.images(image), image)
        rows = [] if found is None else self.events.get(found.number, [])
        return [row for row in rows if not kinds or row.kind in kinds]

    def newest(self, image: Identity, kinds: Sequence[str]) -> EventRow | None:
        return next((row for row in reversed(self.chain(image)) if row.kind in kinds), None)

    def knows(self, operation: str) -> bool:
        return operation in self.operations

    def images(self, identity: Identity) -> list[ImageRow]:
        return [
            row
            for row in self.image_rows
            if row.inode == str(identity.inode) or (row.tag is not None and row.tag == identity.tag)
        ]

    def put_image(self, image: ImageRow) -> int:
        if image.number:
            self.image_rows[image.number - 1] = image
        else:
            image = image._replace(number=len(self.image_rows) + 1)
            self.image_rows.append(image)
        return image.number

    def head(self, image: int) -> tuple[int, bytes]:
        rows = self.events.get(image)
        return (rows[-1].position, rows[-1].hash) if rows else (0, chain.GENESIS)

    def put_operation(self, row: OperationRow) -> None:
        self.operations[row.operation] = row

    def put_part(self, operation: str, image: int, role: str, path: str, identity: Identity) -> None:
        self.parts.append((operation, image, role))

    def put_events(self, image: int, rows: Sequence[EventRow]) -> None:
        self.events.setdefault(image, []).extend(rows)

    def drop_pending(self, operation: str) -> None:
        self.pending_rows.pop(operation, None)

    def last_hash(self, operation: str) -> bytes:
        everything = (row for rows in self.events.values() for row in reversed(rows))
        return next((row.hash for row in everything if row.operation == operation), b"")
