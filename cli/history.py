"""log and show: what safeimg did to an image, from the history."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from safeimg.cli.common import filesystem, print_json, print_text
from safeimg.cli.errors import CommandError
from safeimg.cli.options import Argument, Command
from safeimg.cli.parser import Arguments
from safeimg.cli.shared import HELP, IMAGE, OUTPUT
from safeimg.cli.values import output_format

if TYPE_CHECKING:
    from safeimg.journal.chain import EventRow, OperationRow
    from safeimg.journal.events import Identity

COMMANDS = (
    Command(
        "log",
        "Show what safeimg did to an image.",
        (IMAGE,),
        (HELP, OUTPUT),
        (("The operations, newest last", "log disk.qcow2"),),
        "",
        True,
    ),
    Command(
        "show",
        "Show the events of one operation.",
        (IMAGE, Argument("operation", "Its id, or the beginning of it.")),
        (HELP, OUTPUT),
        (("All events of an operation", "show disk.qcow2 4f1c"),),
        "",
        True,
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    output = output_format(arguments.last("output"))
    words = arguments.positional
    if command.name == "show":
        if len(words) != 2:
            raise CommandError("Expecting an image file name and an operation", code=2, hint=True)
        return _show(words[0], words[1], output)
    if len(words) != 1:
        raise CommandError("Expecting one image file name", code=2, hint=True)
    return _log(words[0], output)


def identity_of(image: str) -> Identity:
    """Which file the image is now."""
    from safeimg.drivers.errors import StorageError
    from safeimg.journal.identity import identify_at

    try:
        return identify_at(filesystem(), image)
    except StorageError as error:
        raise CommandError(f"Could not open '{image}': {error.strerror}") from error


def _log(image: str, output: str) -> int:
    from safeimg.journal import story
    from safeimg.journal.sqlite import SqliteHistory

    history, identity = SqliteHistory().at(image), identity_of(image)
    rows, events = history.log(identity), history.chain(identity, story.KINDS)
    back, before = story.undone(events), story.changed_before(events)
    if output == "json":
        print_json([
            {**_operation(row), "undone-by": back.get(row.operation), "changed-since": before.get(row.operation)}
            for row in rows
        ])  # fmt: skip
    elif rows:
        for row in rows:
            if row.operation in before:
                print_text(_outside(before[row.operation]))
            print_text(_line(row, back.get(row.operation)))
        since = story.changed_since(history, identity)
        if since is not None:
            print_text(_outside(since))
    else:
        print_text(f"{image}: nothing on record")
    return 0


def _line(row: OperationRow, undone_by: str | None) -> str:
    took = f"{max(0.0, row.settled - row.started):.1f} s"
    back = "" if undone_by is None else f"  [undone by {undone_by[:12]}]"
    return (
        f"{row.operation[:12]}  {date(row.started)}  {row.command:<8}  {row.outcome:<11}  "
        f"{row.role:<8}  {took:>9}  {' '.join(row.arguments)}{back}"
    ).rstrip()


def _outside(since: float) -> str:
    """A line for what is not on record."""
    return f"{'-' * 12}  changed outside of this record, after {date(since)}"


def _operation(row: OperationRow) -> dict[str, Any]:
    return {
        "operation": row.operation, "command": row.command, "arguments": list(row.arguments),
        "version": row.version, "outcome": row.outcome, "started": row.started, "settled": row.settled,
        "uid": row.uid, "host": row.host, "home": row.home, "role": row.role,
    }  # fmt: skip


def _show(image: str, operation: str, output: str) -> int:
    from safeimg.journal.sqlite import SqliteHistory

    rows = SqliteHistory().at(image).show(identity_of(image), operation)
    if output == "json":
        print_json([event_members(row) for row in rows])
    else:
        print_text("\n".join(_event_line(row) for row in rows))
    return 0


def event_members(row: EventRow) -> dict[str, Any]:
    """An event as JSON shows it."""
    return {
        "position": row.position, "operation": row.operation, "sequence": row.sequence, "kind": row.kind,
        "body": _parsed(row.body), "hash": row.hash.hex(),
    }  # fmt: skip


def _parsed(body: str) -> Any:
    """The event's fields; the text itself if somebody made it something else."""
    try:
        return json.loads(body)
    except ValueError:
        return body


def _event_line(row: EventRow) -> str:
    body = _parsed(row.body)
    members = body if isinstance(body, dict) else {"body": body}
    when = f"{date(members['time'])}  " if isinstance(members.get("time"), (int, float)) else " " * 21
    parts = [
        f"{name}={_short(value)}"
        for name, value in members.items()
        if name != "time" and value not in ([], None)
    ]
    return f"{row.sequence:>5}  {when}{row.kind:<16}  {' '.join(parts)}".rstrip()


def _short(value: Any) -> str:
    """A value in a few words: long lists by their number, long text cut."""
    if isinstance(value, list) and len(value) > 3:
        return f"[{len(value)} items]"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "-" * 19
