"""gc: gives back the space of what is kept for undo."""

from __future__ import annotations

import re
import time
from typing import Any

from safeimg.cli.common import print_json, print_text
from safeimg.cli.errors import CommandError
from safeimg.cli.options import Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.running import environment
from safeimg.cli.shared import HELP, OUTPUT, QUIET
from safeimg.cli.values import kept_size, output_format

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def age(text: str) -> float:
    """Seconds from a number and a unit."""
    match = re.fullmatch(r"([0-9]{1,9})([smhdw])", text)
    if match is None:
        raise CommandError(f"'{text}' is no age: it may be a number with one of s, m, h, d, w, such as 30d", code=2)
    return float(match[1]) * UNITS[match[2]]


COMMANDS = (
    Command(
        "gc",
        "Drop what is kept for undo.",
        (),
        (
            HELP,
            OUTPUT,
            QUIET,
            Option("older-than", None, "older-than", "AGE", "What was kept for longer (30d; s, m, h, d, w).", age),
            Option("keep", None, "keep", "SIZE", "The oldest, until no more than so much is left.", kept_size),
            Option("dry-run", None, "dry-run", None, "Only show what would be dropped."),
        ),
        (
            ("Down to the limit, and what crashes left", "gc"),
            ("All that is older than a month", "gc --older-than 30d"),
            ("Everything: nothing can be undone then", "gc --keep 0"),
        ),
        "Each command does so too, down to the limit (keep-undo-total in /etc/safeimg.conf). Images, logs of pending "
        "operations and the history are not touched.",
        True,
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    if arguments.positional:
        raise CommandError("Expecting no file names", code=2, hint=True)
    output = output_format(arguments.last("output"))
    from safeimg.ops.sizes import human_size
    from safeimg.recovery.gc import collect

    around = environment()
    assert around.keeping is not None
    dry = arguments.flag("dry-run")
    collected = collect(
        around, total=arguments.last("keep", around.keeping.total), older_than=arguments.last("older-than"), dry=dry
    )
    size = sum(each.size for each in collected.dropped)
    if output == "json":
        print_json({
            "dropped": [_members(each) for each in collected.dropped], "size": size, "left": collected.left,
            "dry-run": dry, "time": time.time(),
        })  # fmt: skip
    elif not arguments.flag("quiet"):
        what = "would be dropped" if dry else "dropped"
        for each in collected.dropped:
            name = each.operation[:12] or each.paths[0]
            print_text(f"{name}: {human_size(each.size)} {what} ({each.reason})")
        print_text(f"{human_size(size)} {what}, {human_size(collected.left)} kept")
    return 0


def _members(each: Any) -> dict[str, Any]:
    return {"operation": each.operation or None, "paths": list(each.paths), "size": each.size, "reason": each.reason}
