"""resume, rollback and abandon: settling what is pending."""

from __future__ import annotations

from collections.abc import Callable

from safeimg.cli.common import filesystem, print_json, print_text
from safeimg.cli.errors import CommandError
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import display
from safeimg.cli.running import run_stoppable
from safeimg.cli.shared import HELP, LONG_PROGRESS, OBJECT, OUTPUT, PROGRESS, QUIET, WAIT
from safeimg.cli.values import output_format

OUTCOMES = {1: "error", 3: "pending", 4: "conflict", 5: "owner", 6: "impossible"}

PENDING_IMAGE = Argument("image", "The image with something pending, or any image that takes part in it.")
FENCED = Option(
    "fenced", None, "fenced", None, "Assert that the owner is dead (it runs on another machine, say)."
)
ADOPT = Option(
    "adopt", None, "adopt", None, "The image and its log were copied or restored together: bind them anew."
)
IF_PENDING = Option(
    "if-pending", None, "if-pending", "OPERATION",
    "Only if it is this operation that is pending (its id, or its beginning)."
)
REASON = Option("reason", None, "reason", "TEXT", "Why; kept in the history.")

COMMANDS = (
    Command(
        "resume",
        "Finish a pending operation.",
        (PENDING_IMAGE,),
        (HELP, OUTPUT, PROGRESS, LONG_PROGRESS, QUIET, IF_PENDING, FENCED, ADOPT, OBJECT, WAIT),
        (("Go on where it stopped", "resume base.qcow2"), ("With progress", "resume -p base.qcow2")),
        "Everything is checked before anything is written. Exit code 0: done, or nothing to do; 4: an "
        "image was changed meanwhile, nothing was written; 5: its owner is alive, or on another machine "
        "(--fenced); 6: impossible.",
        True,
    ),
    Command(
        "rollback",
        "Take a pending operation back.",
        (PENDING_IMAGE,),
        (HELP, OUTPUT, PROGRESS, LONG_PROGRESS, QUIET, IF_PENDING, FENCED, ADOPT, OBJECT, WAIT),
        (("Restore every image it touched", "rollback base.qcow2"),),
        "Everything is checked before anything is written. Exit codes as of resume; 6 behind the point of no "
        "return.",
        True,
    ),
    Command(
        "abandon",
        "Give a pending operation up: images stay as they are.",
        (PENDING_IMAGE,),
        (HELP, OUTPUT, QUIET, IF_PENDING, FENCED, REASON),
        (("After restoring the images from a backup", "abandon base.qcow2 --reason 'restored from backup'"),),
        "For when neither resume nor rollback is possible or wanted. What was done so far stays, and nothing "
        "can take it back.",
        True,
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    if len(arguments.positional) != 1:
        raise CommandError("Expecting one image file name", code=2, hint=True)
    image = arguments.positional[0]
    from safeimg.journal.place import SUFFIX
    from safeimg.recovery.pending import NothingPending

    def work() -> tuple[str, str]:
        fs = filesystem()
        if fs.stat(image) is None and fs.stat(image + SUFFIX) is None and command.name != "abandon":
            raise CommandError(f"{image}: No such file or directory")
        try:
            return _settle(command.name, image, arguments), "done"
        except NothingPending as error:
            return str(error), "nothing"

    return told(image, command.name, arguments, work)


def told(image: str, action: str, arguments: Arguments, work: Callable[[], tuple[str, str]]) -> int:
    """Does `work` and prints what it says was done, and the outcome, or what went wrong. The exit code."""
    output = output_format(arguments.last("output"))
    from safeimg.drivers.errors import DriverError
    from safeimg.journal.errors import JournalError
    from safeimg.ops.errors import OperationError

    try:
        done, outcome = work()
    except (CommandError, OperationError, JournalError, DriverError) as error:
        code = error.code if isinstance(error, CommandError) else getattr(error, "exit_code", 1)
        if output == "json":
            _print_json(image, action, OUTCOMES.get(code, "error"), str(error))
        if isinstance(error, CommandError):
            raise
        raise CommandError(str(error), code=code) from error
    if output == "json":
        _print_json(image, action, outcome, done)
    elif not arguments.flag("quiet"):
        print_text(done if done.startswith(image) else f"{image}: {done}")
    return 0


def _settle(action: str, image: str, arguments: Arguments) -> str:
    from safeimg.ops.launch import Environment
    from safeimg.recovery import settle

    operation = arguments.last("if-pending", "").lower()

    async def work(environment: Environment) -> str:
        if action == "abandon":
            return settle.abandon(image, environment, reason=arguments.last("reason", ""), operation=operation)
        verb = settle.resume if action == "resume" else settle.rollback
        fenced, adopt = arguments.flag("fenced"), arguments.flag("adopt")
        return await verb(image, environment, fenced=fenced, adopt=adopt, operation=operation)

    with display(arguments) as shown:
        return run_stoppable(arguments, shown, work, image=image, own=True)


def _print_json(image: str, action: str, outcome: str, message: str) -> None:
    print_json({"image": image, "action": action, "outcome": outcome, "message": message})
