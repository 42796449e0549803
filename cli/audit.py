"""audit: is an image's history what safeimg recorded? What to keep elsewhere, so that this can be told for certain."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safeimg.cli.common import filesystem, print_json, print_text
from safeimg.cli.errors import CommandError
from safeimg.cli.history import date, event_members, identity_of
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.shared import HELP, IMAGE, OUTPUT
from safeimg.cli.values import output_format

if TYPE_CHECKING:
    from safeimg.journal.audit import Finding
    from safeimg.journal.chain import EventRow
    from safeimg.journal.story import Shown

CONFLICT = 4
CONTENTS = {
    "same": "shows what its newest operation left: its content has the digest that is on record",
    "different": "shows something else than its newest operation left",
    "unknown": "there is a digest of its content on record, but it cannot be read now (see safeimg info)",
}
COLUMNS = ("position", "operation", "sequence", "kind", "body", "previous", "hash")

ANCHOR = Option(
    "anchor", None, "anchor", "HASH", "With verify: what `audit anchor` printed before. Was the history cut since?"
)
FORM = Option("format", None, "format", "jsonl|csv", "With export: one event a line, as JSON (the default) or CSV.")

COMMANDS = (
    Command(
        "audit",
        "Verify, export or anchor an image's history, or move it beside the image.",
        (Argument("action", "verify, export, anchor, enable or disable."), IMAGE),
        (HELP, OUTPUT, ANCHOR, FORM),
        (
            ("Is the history as it was recorded?", "audit verify disk.qcow2"),
            ("What covers all of it: to be kept elsewhere", "audit anchor disk.qcow2"),
            ("Did it only grow since then?", "audit verify --anchor 8c1f… disk.qcow2"),
            ("For another program", "audit export --format csv disk.qcow2"),
            ("Keep it in a file beside the image (and back: disable)", "audit enable disk.qcow2"),
        ),
        "Exit code of verify 0: it verifies; 4: an event was edited, removed or swapped. Whoever can write to the "
        "history can make it anew, or cut its end off: only an anchor that is kept elsewhere tells. That something "
        "else changed the image since, as guests do, is told and is no error. IMAGE.safeimg-history is to be copied "
        "with the image.",
        True,
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    output = output_format(arguments.last("output"))
    words = arguments.positional
    if len(words) != 2 or words[0] not in ("verify", "export", "anchor", "enable", "disable"):
        raise CommandError(
            "Expecting verify, export, anchor, enable or disable, and one image file name", code=2, hint=True
        )
    action, image = words
    if action in ("enable", "disable"):
        return _move(action, image, output)
    if action == "verify":
        return _verify(image, output, arguments.last("anchor"))
    if action == "anchor":
        return _anchor(image, output)
    return _export(image, arguments.last("format", "jsonl"))


def _chain(image: str) -> list[EventRow]:
    from safeimg.journal.sqlite import SqliteHistory

    return SqliteHistory().at(image).chain(identity_of(image))


def _move(action: str, image: str, output: str) -> int:
    """Keeps the history beside the image, or in the state directory."""
    from safeimg.journal import beside
    from safeimg.journal.sqlite import BESIDE, SqliteHistory
    from safeimg.ops.session import refuse_pending_on

    identity = identity_of(image)
    refuse_pending_on(filesystem(), image)
    moved = (beside.enable if action == "enable" else beside.disable)(SqliteHistory(), image, identity)
    where = f"beside it, in {image}{BESIDE}" if action == "enable" else "in the state directory"
    if output == "json":
        print_json({"image": image, "action": action, "outcome": "done" if moved else "nothing"})
    else:
        print_text(f"{image}: its history is {'now' if moved else 'already'} {where}")
    return 0


def _head(rows: Sequence[EventRow]) -> str | None:
    from safeimg.journal.audit import head

    found = head(rows)
    return None if found is None else found.hex()


def _anchor(image: str, output: str) -> int:
    rows = _chain(image)
    head = _head(rows)
    if output == "json":
        print_json({"image": image, "events": len(rows), "head": head})
    elif head is None:
        raise CommandError(f"{image}: nothing on record, so there is nothing to anchor")
    else:
        print_text(head)
    return 0


def _export(image: str, form: str) -> int:
    rows = _chain(image)
    if form == "jsonl":
        lines = [json.dumps({**event_members(row), "previous": row.previous.hex()}) for row in rows]
    elif form == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            values = [getattr(row, name) for name in COLUMNS]
            writer.writerow([value.hex() if isinstance(value, bytes) else value for value in values])
        lines = text.getvalue().splitlines()
    else:
        raise CommandError("--format must be used with jsonl or csv as argument.", code=2)
    if lines:
        print_text("\n".join(lines))
    return 0


def _verify(image: str, output: str, anchor: str | None) -> int:
    from safeimg.journal import audit
    from safeimg.journal.sqlite import SqliteHistory
    from safeimg.journal.story import changed_since, last_content

    expected = None
    if anchor is not None:
        try:
            expected = bytes.fromhex(anchor)
        except ValueError:
            raise CommandError("--anchor takes the hash that `audit anchor` printed", code=2) from None
    history, identity = SqliteHistory().at(image), identity_of(image)
    findings = audit.verify(history, identity, anchor=expected)
    rows = history.chain(identity)
    operations = len({row.operation for row in rows})
    head, since = _head(rows), changed_since(history, identity)
    content = _compared(image, last_content(history, identity))
    if content == "different" and since is None:
        message = "its content is not what its newest operation left, though nothing else tells of a change"
        findings.append(audit.Finding("content", len(rows), rows[-1].operation, message))
    if output == "json":
        print_json({
            "image": image, "verified": not findings, "events": len(rows), "operations": operations,
            "head": head, "changed-since": since, "content": content, "findings": [_finding(each) for each in findings],
        })  # fmt: skip
    elif not findings:
        what = f"{len(rows)} events of {operations} operations verify" if rows else "nothing on record"
        print_text(f"{image}: {what}" + (f"; head {head}" if head is not None else ""))
        if since is not None:
            print_text(f"{image}: changed outside of this record, after {date(since)} (by a guest, say)")
        if content is not None:
            print_text(f"{image}: {CONTENTS[content]}")
    if findings:
        raise CommandError(*(f"{image}: {finding.message}" for finding in findings), code=CONFLICT)
    return 0


def _compared(image: str, shown: Shown | None) -> str | None:
    """What the image shows against what its newest operation left; None if that is not on record."""
    from safeimg.drivers.errors import DriverError
    from safeimg.drivers.transfer.loop import run_alone
    from safeimg.ops.content import digest_at

    if shown is None:
        return None
    try:
        digest = run_alone(lambda: digest_at(filesystem(), image, shown.format))
    except DriverError:  # in use, encrypted, …
        return "unknown"
    return "same" if digest == shown.digest else "different"


def _finding(finding: Finding) -> dict[str, Any]:
    return {"kind": finding.kind, "position": finding.position, "operation": finding.operation,
            "message": finding.message}  # fmt: skip
