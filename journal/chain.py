"""The rows of the history: an operation's events without bulk bytes, chained per image with BLAKE3."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from blake3 import blake3
from safeimg.drivers.records import NamedTuple
from safeimg.journal.errors import JournalError
from safeimg.journal.events import (
    Abandoned,
    Completed,
    Declared,
    Event,
    Identity,
    ImageRecord,
    Owner,
    RolledBack,
)

GENESIS = bytes(32)  # what the first event of an image names as the hash before it
PARTICIPATED = "Participated"  # kind of the one event that an operation leaves in a participant's chain
CHANGED = "ChangedOutside"  # kind of the event that tells of changes before the operation
DIGESTED = "Digested"  # kind of the event that tells what images show
SETTLED = "Settled"  # kind of the event behind the outcome

_KEPT_BYTES = 64  # longer bytes are replaced by their length and BLAKE3-256
OUTCOME_KINDS = {"completed": "Completed", "rolled back": "RolledBack", "abandoned": "Abandoned"}
_OUTCOMES = {kind: outcome for outcome, kind in OUTCOME_KINDS.items()}


class EventRow(NamedTuple):
    """One event of one image's chain."""

    position: int  # in the image's chain, from 1
    operation: str
    sequence: int  # in the operation, from 1
    kind: str
    body: str  # JSON with sorted keys and no spaces
    previous: bytes
    hash: bytes


class OperationRow(NamedTuple):
    """A settled operation."""

    operation: str
    command: str
    arguments: tuple[str, ...]
    version: str
    outcome: str  # "completed", "rolled back", "abandoned"
    started: float  # seconds since the epoch
    settled: float
    uid: int
    host: str
    home: str  # path of the home image when it was settled
    role: str = ""  # of the image asked about


def body_of(event: Event) -> str:
    """The event's fields as canonical JSON: keys sorted, no spaces, ASCII, bulk bytes replaced."""
    return _json({name: _plain(value) for name, value in zip(event._fields, event, strict=True)})


def row_hash(previous: bytes, operation: str, sequence: int, kind: str, body: str) -> bytes:
    """BLAKE3-256 of: previous hash 32 │ operation 16 │ sequence u64 │ kind │ NUL │ body (integers
    little-endian)."""
    hasher = blake3(previous)
    hasher.update(bytes.fromhex(operation))
    hasher.update((sequence & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little"))
    hasher.update(kind.encode("utf-8", "surrogateescape") + b"\0" + body.encode("utf-8", "surrogateescape"))
    return hasher.digest()


def chain_home(
    bodies: Sequence[tuple[str, str]], operation: str, position: int, previous: bytes
) -> list[EventRow]:
    """The rows of an operation's events (kind and body), behind the row `position` whose hash is
    `previous`."""
    rows = []
    for sequence, (kind, body) in enumerate(bodies, start=1):
        digest = row_hash(previous, operation, sequence, kind, body)
        rows.append(EventRow(position + sequence, operation, sequence, kind, body, previous, digest))
        previous = digest
    return rows


def chain_participant(
    summary: OperationRow,
    role: str,
    head: bytes,
    position: int,
    previous: bytes,
    more: Mapping[str, Any],
) -> EventRow:
    """The row that a participant's chain gets: what happened, the hash of the last row at its home, and `more`."""
    body = _json(
        {
            **_plain(dict(more)),
            "command": summary.command,
            "home": summary.home,
            "home_head": head.hex(),
            "outcome": summary.outcome,
            "role": role,
            "settled": summary.settled,
        }
    )
    digest = row_hash(previous, summary.operation, 1, PARTICIPATED, body)
    return EventRow(position + 1, summary.operation, 1, PARTICIPATED, body, previous, digest)


def summarise(first: Event | None, last: Event | None, home: str) -> OperationRow:
    """The operation's row. Raises `JournalError` unless its events begin with `Declared` and end with an
    outcome."""
    if not isinstance(first, Declared) or not isinstance(last, Completed | RolledBack | Abandoned):
        raise JournalError("only a settled operation goes into the history")
    return OperationRow(
        first.operation,
        first.command,
        first.arguments,
        first.version,
        _OUTCOMES[type(last).__name__],
        first.time,
        last.time,
        first.owner.uid,
        first.owner.host,
        home,
    )


def _plain(value: Any) -> Any:
    """`value` as JSON types. Records keep their order; bytes become their hexadecimal digits, or length and
    hash."""
    if isinstance(value, bytes):
        if len(value) <= _KEPT_BYTES:
            return {"hex": value.hex()}
        return {"length": len(value), "blake3": blake3(value).hexdigest()}
    if isinstance(value, Identity | Owner | ImageRecord):
        return {name: _plain(item) for name, item in zip(value._fields, value, strict=True)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
