"""Audit: is an image's history what safeimg recorded?

Editing, removing or swapping events breaks the chain and is found. Cutting the newest events off, or
computing the whole chain anew, can only be told with an anchor: a head hash that was kept elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from safeimg.journal.chain import (
    GENESIS,
    OUTCOME_KINDS,
    PARTICIPATED,
    SETTLED,
    EventRow,
    OperationRow,
    row_hash,
)
from safeimg.journal.events import Identity
from safeimg.journal.history import History

_OPERATION = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong with a chain."""

    kind: Literal["edited", "removed", "swapped", "replaced", "anchor", "content"]
    position: int  # in the image's chain, from 1; of the event concerned (the first one removed)
    operation: str  # as the row says; empty where there is no row
    message: str  # one line


def head(chain: Sequence[EventRow]) -> bytes | None:
    """The hash that covers an image's whole history (keep it elsewhere as an anchor); None if there is none."""
    return chain[-1].hash if chain else None


def verify(history: History, image: Identity, *, anchor: bytes | None = None) -> list[Finding]:
    """What is wrong with the image's chain; empty if nothing is. `anchor`: a head that it had at some
    time."""
    rows = history.chain(image)
    by_hash = {row.hash: row for row in rows}
    findings: list[Finding] = []
    previous, expected = GENESIS, 1
    for row in rows:
        finding = _judge(row, previous, expected, by_hash)
        if finding is not None:
            findings.append(finding)
        previous, expected = row.hash, row.position + 1
    findings += _compare(history.log(image), rows)
    if anchor is not None and anchor not in by_hash:
        findings.append(
            Finding(
                "anchor",
                expected - 1,
                "",
                (
                    f"the anchor {anchor.hex()[:16]}… is not in this history: it was cut short or made anew"
                ),
            )
        )
    return findings


def _judge(row: EventRow, previous: bytes, expected: int, by_hash: dict[bytes, EventRow]) -> Finding | None:
    name = f"event {row.position} ({row.kind[:40]} of operation {row.operation[:8]})"
    if not _intact(row):
        return Finding("edited", row.position, row.operation, f"{name} was edited: its hash does not fit it")
    if row.position != expected:
        gone = (
            f"event {expected}"
            if row.position == expected + 1
            else f"events {expected} to {row.position - 1}"
        )
        return Finding("removed", expected, row.operation, f"{gone} removed, before {name}")
    if row.previous == previous:
        return None
    before = by_hash.get(row.previous)
    if before is not None or (row.previous == GENESIS and expected > 1):
        place = 1 if before is None else before.position + 1
        return Finding("swapped", row.position, row.operation, f"{name} was moved: it belongs at {place}")
    return Finding(
        "replaced",
        row.position,
        row.operation,
        f"{name} does not follow the event before it: one was removed or replaced",
    )


def _compare(operations: Sequence[OperationRow], rows: Sequence[EventRow]) -> list[Finding]:
    """Whether the list of operations tells of the same operations as the chain."""
    listed = {row.operation: row for row in operations}
    findings: list[Finding] = []
    outcomes: dict[str, EventRow] = {}
    for row in rows:
        if row.kind != SETTLED:
            outcomes[row.operation] = row
    for operation in listed.keys() - outcomes.keys():
        message = f"operation {operation[:8]} is listed, and none of its events is there"
        findings.append(Finding("removed", len(rows) + 1, operation, message))
    for operation, row in outcomes.items():
        entry = listed.get(operation)
        if entry is None:
            message = f"operation {operation[:8]} has events, and was removed from the list of operations"
            findings.append(Finding("removed", row.position, operation, message))
        elif row.kind not in (PARTICIPATED, OUTCOME_KINDS.get(entry.outcome)):
            told = f"is listed as {entry.outcome[:40]!r}, its last event is {row.kind[:40]}"
            message = f"operation {operation[:8]} {told}"
            findings.append(Finding("edited", row.position, operation, message))
    return findings


def _intact(row: EventRow) -> bool:
    if not _OPERATION.fullmatch(row.operation) or len(row.previous) != len(GENESIS):
        return False
    return row_hash(row.previous, row.operation, row.sequence, row.kind, row.body) == row.hash
