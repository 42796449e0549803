"""What an image's chain tells of it: how it looked after its operations, and what was taken back.

Bodies are what a database holds: everything is checked, and what makes no sense tells nothing (`audit` finds it)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from safeimg.drivers.records import NamedTuple
from safeimg.journal.chain import CHANGED, DIGESTED, OUTCOME_KINDS, PARTICIPATED, SETTLED, EventRow
from safeimg.journal.events import Identity
from safeimg.journal.history import UNDO, UNDOES, History
from safeimg.journal.identity import unchanged, untouched

# The events that tell it: few of each operation, and small.
KINDS = ("Declared", "Started", CHANGED, *OUTCOME_KINDS.values(), SETTLED, PARTICIPATED)


class Look(NamedTuple):
    """How the image looked after an operation was settled."""

    operation: str
    time: float  # seconds since the epoch
    identity: Identity


def last_look(history: History, image: Identity) -> Look | None:
    """How the image looked after its newest operation, where that is on record."""
    row = history.newest(image, (SETTLED, PARTICIPATED))
    return None if row is None else _look(row)


def changed_since(history: History, image: Identity) -> float | None:
    """When the newest operation on the image was settled, if it is not any more as that left it: something that is
    not on record changed it since. None if it is, or nobody knows."""
    look = last_look(history, image)
    return None if look is None or unchanged(look.identity, image) else look.time


class Shown(NamedTuple):
    """What an image showed when its newest operation was done."""

    format: str
    digest: bytes


def last_content(history: History, image: Identity) -> Shown | None:
    """What the image showed after its newest operation; None if that is not on record."""
    look, row = last_look(history, image), history.newest(image, (DIGESTED, PARTICIPATED))
    if look is None or row is None or row.operation != look.operation:
        return None
    body = _body(row)
    images = body.get("images") if row.kind == DIGESTED else [body.get("content")]
    for each in images if isinstance(images, list) else ():
        match each:
            case [int(index), str(format), str(digest)] if row.kind == PARTICIPATED or index == 0:
                with suppress(ValueError):
                    return Shown(format, bytes.fromhex(digest))
    return None


def changed_before(rows: Sequence[EventRow]) -> dict[str, float]:
    """The operations before which the image had been changed by something that is not on record, and since when."""
    found = {}
    for row in rows:
        body = _body(row)
        since = body.get("changed") if row.kind == PARTICIPATED else None
        images = body.get("images")
        if row.kind == CHANGED and isinstance(images, list):
            since = next((each[1] for each in images if isinstance(each, list) and each[:1] == [0]), None)
        if isinstance(since, int | float):
            found[row.operation] = float(since)
    return found


def look_after(rows: Sequence[EventRow], operation: str) -> Identity | None:
    """How the image looked when it last was as `operation` had left it: right after it, or after whatever followed was
    undone again or rolled back. None if that is not on record."""
    now: Identity | None = None
    taken: list[str] = []  # what followed and was not undone
    for each in _told(rows):
        if each.operation == operation:
            now = each.look
        elif now is None:
            continue
        elif taken and each.undoes == taken[-1]:
            taken.pop()
            if not taken:
                now = each.look
        elif taken or (each.found is not None and untouched(now, each.found)):
            if each.kind == OUTCOME_KINDS["rolled back"]:
                now = now if taken else each.look
            else:
                taken.append(each.operation)
    return now


class _Told(NamedTuple):
    """What an image's chain tells of one operation."""

    operation: str
    kind: str  # of the event that tells the outcome
    found: Identity | None  # how the image looked before
    look: Identity | None  # and afterwards
    undoes: str | None


def _told(rows: Sequence[EventRow]) -> list[_Told]:
    back = {by: operation for operation, by in undone(rows).items()}
    told: dict[str, _Told] = {}
    for row in rows:
        body, operation = _body(row), row.operation
        known = told.get(operation, _Told(operation, "", None, None, back.get(operation)))
        if row.kind == "Declared":
            images = body.get("images")
            first = images[0] if isinstance(images, list) and images else None
            known = known._replace(found=_identity(first.get("identity") if isinstance(first, dict) else None))
        elif row.kind == PARTICIPATED:
            kind = OUTCOME_KINDS.get(str(body.get("outcome")), "")
            known = known._replace(kind=kind, found=_identity(body.get("found")))
        elif row.kind in OUTCOME_KINDS.values():
            known = known._replace(kind=row.kind)
        look = _look(row)
        told[operation] = known if look is None else known._replace(look=look.identity)
    return list(told.values())


def lost(rows: Sequence[EventRow]) -> str:
    """Why the operation of these rows cannot be undone, as was noted when it ended; empty if it could be then."""
    for row in reversed(rows):
        if row.kind in (SETTLED, PARTICIPATED):
            return str(_body(row).get("lost") or "")
    return ""


def undone(rows: Sequence[EventRow]) -> dict[str, str]:
    """The operations that were taken back, and by which."""
    found = {}
    targets: dict[str, str] = {}
    undoing = set()
    for row in rows:
        body = _body(row)
        if row.kind == "Declared" and body.get("command") == UNDO:
            undoing.add(row.operation)
        settings = body.get("settings")
        if row.kind == "Started" and row.operation in undoing and isinstance(settings, dict):
            targets[row.operation] = str(settings.get(UNDOES))
        if row.kind == OUTCOME_KINDS["completed"] and row.operation in targets:
            found[targets[row.operation]] = row.operation
        if row.kind == PARTICIPATED and body.get("outcome") == "completed" and isinstance(body.get(UNDOES), str):
            found[body[UNDOES]] = row.operation
    return found


def _look(row: EventRow) -> Look | None:
    body = _body(row)
    if row.kind == SETTLED:
        pairs = body.get("identities")
        first = pairs[0] if isinstance(pairs, list) and pairs else None
        if isinstance(first, list) and len(first) == 2 and first[0] == 0:
            return _made(row, body.get("time"), first[1])
    if row.kind == PARTICIPATED:
        return _made(row, body.get("settled"), body.get("look"))
    return None


def _made(row: EventRow, when: Any, value: Any) -> Look | None:
    identity = _identity(value)
    return None if identity is None or not isinstance(when, int | float) else Look(row.operation, when, identity)


def _identity(value: Any) -> Identity | None:
    match value:
        case {
            "device": int(device), "inode": int(inode), "size": int(size), "mtime_ns": int(mtime),
            "ctime_ns": int(ctime), "tag": (str() | None) as tag,
        }:  # fmt: skip
            return Identity(device, inode, size, mtime, ctime, tag)
    return None


def _body(row: EventRow) -> dict[str, Any]:
    try:
        body = json.loads(row.body)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
