"""undo: takes a completed operation back."""

from __future__ import annotations

from safeimg.cli.common import filesystem
from safeimg.cli.errors import CommandError
from safeimg.cli.options import Argument, Command
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import display
from safeimg.cli.running import run_stoppable
from safeimg.cli.settle import told
from safeimg.cli.shared import HELP, IMAGE, JOURNALING, LONG_PROGRESS, OUTPUT, PROGRESS, QUIET

WANTED = ("journal", "on-crash", "wait")  # an undo is always journaled, and not undone

COMMANDS = (
    Command(
        "undo",
        "Take a completed operation back.",
        (IMAGE, Argument("operation", "Its id, or the beginning of it (the newest one if not given).", False)),
        (HELP, OUTPUT, PROGRESS, LONG_PROGRESS, QUIET, *(each for each in JOURNALING if each.name in WANTED)),
        (
            ("Take back what was done last", "undo disk.qcow2"),
            ("What could be taken back", "log disk.qcow2"),
            ("One operation of several", "undo disk.qcow2 4f1c"),
        ),
        "Possible while nobody has changed the images of the operation since, and if what it takes was small enough to "
        "be kept (--keep-undo of the command). All of it is checked before anything is written. Interrupted, it is "
        "finished with `safeimg resume` or taken back itself with `safeimg rollback`. Exit code 0: done; 3: something "
        "is pending; 4: an image was changed since, nothing was written; 5: somebody is working on it; 6: impossible.",
        True,
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    words = arguments.positional
    if len(words) not in (1, 2):
        raise CommandError("Expecting one image file name, and an operation if it is not the newest", code=2, hint=True)
    image, operation = words[0], words[1] if len(words) == 2 else ""

    def work() -> tuple[str, str]:
        if filesystem().stat(image) is None:
            raise CommandError(f"{image}: No such file or directory")
        return _undo(image, operation, arguments), "done"

    return told(image, "undo", arguments, work)


def _undo(image: str, operation: str, arguments: Arguments) -> str:
    from safeimg.ops.launch import Environment

    async def work(environment: Environment) -> str:
        from safeimg.recovery.gate import begin_or_resume
        from safeimg.recovery.undo import undo

        done = "undo finished"

        async def begin() -> None:
            nonlocal done
            done = await undo(image, environment, operation)

        await begin_or_resume(image, environment, "undo", begin)
        return done

    with display(arguments) as shown:
        return run_stoppable(arguments, shown, work, image=image, own=True)
