"""status: what is pending or running."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from safeimg.cli.common import filesystem, print_json, print_text
from safeimg.cli.errors import CommandError
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.shared import HELP, OUTPUT
from safeimg.cli.values import output_format

if TYPE_CHECKING:
    from safeimg.recovery.status import Status

PENDING = 3

ALL = Option("all", None, "all", None, "Every pending operation that this host knows of.")
SCAN = Option("scan", None, "scan", "DIR", "Look for logs in a folder and those below it (repeatable).")

COMMANDS = (
    Command(
        "status",
        "Show pending and running operations.",
        (Argument("path", "Images, or folders to look into.", False, True),),
        (HELP, OUTPUT, ALL, SCAN),
        (
            ("Is something pending on this image?", "status disk.qcow2"),
            ("On this host, after a reboot", "status --all"),
            ("In a folder whose images came from elsewhere", "status --scan /srv/images"),
        ),
        "Exit code 0: nothing pending; 3: something is.",
        True,
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    output = output_format(arguments.last("output"))
    paths, scan = arguments.positional, arguments.all("scan")
    found = pending(paths, scan, everything=arguments.flag("all") or not (paths or scan))
    if output == "json":
        print_json([_members(each) for each in found])
    elif found:
        print_text("\n\n".join("\n".join(_lines(each)) for each in found))
    else:
        print_text("nothing is pending")
    return PENDING if found else 0


def pending(paths: Sequence[str], scan: Sequence[str], *, everything: bool) -> list[Status]:
    """What is not settled on these images, in these folders and those below `scan`, or on this host."""
    from safeimg.journal.sqlite import SqliteHistory
    from safeimg.recovery.status import status

    fs = filesystem()
    for path in [*paths, *scan]:
        if fs.stat(path) is None and fs.stat(path + ".safeimg") is None:
            raise CommandError(f"{path}: No such file or directory")
    return status(fs, SqliteHistory(), paths, everything=everything, scan=scan)


def _members(each: Status) -> dict[str, Any]:
    return {
        "image": each.image, "log": each.log, "condition": each.condition, "problem": each.problem,
        "operation": each.operation, "command": each.command, "arguments": list(each.arguments),
        "started": each.started, "done": each.done, "total": each.total, "pid": each.pid, "host": each.host,
        "images": list(each.images), "rolling-back": each.rolling_back, "past-return": each.past_return,
        "undo": each.undo, "restored-by-rollback": each.restored, "on-crash": each.on_crash,
    }  # fmt: skip


def _lines(each: Status) -> Iterator[str]:
    from safeimg.ops.sizes import human_size

    if each.condition == "unreadable":
        yield f"{each.image}: {each.problem}"
        return
    if not each.operation:
        yield f"{each.image}: an operation that never began left {each.log}; any command clears it away"
        return
    yield f"{each.image}: {each.command} {_condition(each)}"
    yield f"    command:   {shlex.join(each.arguments)}"
    yield f"    started:   {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(each.started))}"
    if each.total:
        percent = min(100.0, each.done * 100 / each.total)
        yield f"    progress:  {percent:.1f}% ({human_size(each.done)} of {human_size(each.total)})"
    yield f"    owner:     process {each.pid} on {each.host}"
    for other in each.images[1:]:
        yield f"    with:      {other}"
    if each.condition == "running":
        return
    name = shlex.quote(each.image)
    left = max(0, each.total - each.done)
    if each.condition == "orphaned":
        yield f"    abandon:   safeimg abandon {name}  (or put the image back)"
    elif each.rolling_back:
        yield f"    rollback:  safeimg rollback {name}  (has begun; nothing else settles it)"
    elif each.condition in ("finishing", "unbegun"):
        yield f"    resume:    safeimg resume {name}  (tidies up)"
    else:
        yield f"    resume:    safeimg resume {name}  ({human_size(left)} to go)"
        yield f"    rollback:  {_rollback(each, name)}"


def _rollback(each: Status, name: str) -> str:
    from safeimg.ops.sizes import human_size

    if each.past_return:
        return "not any more: it is past its point of no return"
    if not each.undo and not each.removes:
        return "no: what was overwritten is not kept"
    what = f"{human_size(each.restored)} to put back" if each.undo else "removes what was begun"
    return f"safeimg rollback {name}  ({what})"


def _condition(each: Status) -> str:
    return {
        "running": "is running",
        "unknown": "is pending; its owner cannot be seen from here (--fenced, if it is certainly dead)",
        "interrupted": "was interrupted",
        "paused": f"is paused ({each.problem})",
        "finishing": "is done but for tidying up",
        "unbegun": "was about to begin; nothing was changed",
        "orphaned": "was interrupted; the image is not there, only its log",
    }[each.condition]
