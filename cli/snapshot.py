"""snapshot: the snapshots inside an image."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from safeimg.cli.common import filesystem, image_name, print_text, warn_image
from safeimg.cli.errors import CommandError, usage
from safeimg.cli.options import Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.shared import FORCE_SHARE, HELP, IMAGE, IMAGE_OPTS, JOURNALING, OBJECT, QUIET

if TYPE_CHECKING:
    from safeimg.drivers.errors import RefusedError
    from safeimg.drivers.formats.naming import Blockdev

_ACTIONS = ("list", "apply", "create", "delete")

COMMANDS = (
    Command(
        "snapshot",
        "List, take, apply or delete the snapshots inside an image.",
        (IMAGE,),
        (
            HELP,
            Option("list", "l", None, None, "List them."),
            Option("apply", "a", None, "snapshot", "Go back to a snapshot, by its id or name."),
            Option("create", "c", None, "name", "Take a snapshot."),
            Option("delete", "d", None, "name", "Delete a snapshot."),
            QUIET,
            FORCE_SHARE,
            OBJECT,
            IMAGE_OPTS,
            *JOURNALING,
        ),
        (
            ("What snapshots there are", "snapshot -l disk.qcow2"),
            ("Take one, and go back to it", "snapshot -c before-upgrade disk.qcow2"),
            ("", "snapshot -a before-upgrade disk.qcow2"),
        ),
        "Each change is one switch of the image's header: killed, `safeimg resume IMAGE` finishes it and "
        "`safeimg rollback IMAGE` takes it back.",
        alone="lacd",
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    chosen = [name for name in _ACTIONS for _ in arguments.all(name)]
    if len(arguments.positional) != 1:
        raise usage("Expecting one image file name")
    words = arguments.positional
    name, _ = image_name(arguments, words[0], None)
    from safeimg.drivers.formats.chain import try_open
    from safeimg.ops.info import snapshot_members
    from safeimg.ops.snapshot import list_snapshots

    share = arguments.flag("force-share")
    if not chosen or (share and chosen[0] != "list"):
        try_open(filesystem(), name, force_share=share, secrets=arguments.secrets, warn=warn_image)
        return 0
    if chosen[0] != "list":
        _change(arguments, chosen[0], name)
        return 0
    found = list_snapshots(filesystem(), name, force_share=share, secrets=arguments.secrets)
    if found:
        from safeimg.cli.info import snapshot_list

        print_text("\n".join(snapshot_list([snapshot_members(entry) for entry in found])))
    return 0


def _change(arguments: Arguments, action: str, name: str | Blockdev) -> None:
    from safeimg.cli.progress import display
    from safeimg.cli.running import run_stoppable
    from safeimg.drivers.errors import RefusedError
    from safeimg.ops import snapshot
    from safeimg.ops.launch import Environment
    from safeimg.recovery.gate import begin_or_resume

    which = arguments.last(action)
    warned: list[str] = []

    def warn(message: str) -> None:
        warned.append(message)
        warn_image(message)

    async def work(environment: Environment) -> None:
        async def begin() -> None:
            if action == "create":
                date = time.time_ns() // 1000 * 1000  # QEMU's clock has microseconds
                await snapshot.create(environment, name, which, date, warn=warn)
            else:
                change = snapshot.apply if action == "apply" else snapshot.delete
                await change(environment, name, which, warn=warn)

        try:
            await begin_or_resume(name, environment, "snapshot", begin)
        except RefusedError as error:
            if action == "apply" and error.errno is None:
                for message in warned:  # QEMU has opened the image a second time by now
                    warn_image(message)
            raise CommandError(*_refusal(action, which, error)) from error

    with display(arguments) as shown:
        run_stoppable(arguments, shown, work, image=name)


def _refusal(action: str, which: str, error: RefusedError) -> list[str]:
    """qemu-img's words for what an image does not allow; where that is damaged, qemu-img does not say how."""
    from safeimg.cli.main import program_name
    from safeimg.drivers.errors import FormatError

    reason = error.problem if error.errno is None else os.strerror(error.errno)
    if action == "create":
        reason = f"Could not create snapshot '{which}': -{error.errno} ({reason})"
    elif action == "apply" and error.errno is not None:
        reason = f"Could not apply snapshot '{which}': Failed to load snapshot: {reason}"
    else:
        reason = f"Could not {action} snapshot '{which}': {reason}"
    explain = error.explain and not (program_name() == "qemu-img" and isinstance(error.__cause__, FormatError))
    return [error.problem, reason] if explain else [reason]
