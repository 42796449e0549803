"""recover: settles what was interrupted, without a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safeimg.cli.common import print_json, print_text
from safeimg.cli.errors import CommandError
from safeimg.cli.options import Argument, Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import display
from safeimg.cli.running import run_stoppable
from safeimg.cli.settle import FENCED
from safeimg.cli.shared import HELP, LONG_PROGRESS, OBJECT, OUTPUT, PROGRESS, QUIET
from safeimg.cli.status import ALL, PENDING, SCAN, pending
from safeimg.cli.values import output_format, policy

if TYPE_CHECKING:
    from safeimg.ops.launch import Environment
    from safeimg.recovery.recover import Recovered

POLICY = Option(
    "policy", None, "policy", "resume|rollback|report", "Instead of what each was started with.", policy
)

COMMANDS = (
    Command(
        "recover",
        "Settle what was interrupted, each as it was started (--on-crash).",
        (Argument("path", "Images, or folders to look into.", False, True),),
        (
            HELP,
            OUTPUT,
            PROGRESS,
            LONG_PROGRESS,
            QUIET,
            ALL,
            SCAN,
            POLICY,
            FENCED,
            OBJECT,
        ),
        (
            ("After a reboot, before virtual machines are started", "recover --all"),
            ("Finish whatever was interrupted in a folder", "recover --policy resume --scan /srv/images"),
            ("What would have to be decided", "recover --policy report --all --output json"),
        ),
        "An operation started with --on-crash=resume or rollback (or SAFEIMG_ON_CRASH in its environment) is settled "
        "so; others are reported and left alone. What never began, or is done but for tidying up, is tidied up in any "
        "case. Running ones are left alone. Exit code 0: nothing interrupted is left; 3: something is, as its policy "
        "wants; else that of the first failure.",
        True,
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    output = output_format(arguments.last("output"))
    paths, scan = arguments.positional, arguments.all("scan")
    if not (paths or scan or arguments.flag("all")):
        raise CommandError("Expecting images, folders, --scan or --all", code=2, hint=True)
    found = pending(paths, scan, everything=arguments.flag("all"))
    settled: list[Recovered] = []

    async def work(environment: Environment) -> None:
        from safeimg.recovery.recover import recover

        fenced, chosen = arguments.flag("fenced"), arguments.last("policy")
        for status in found:
            each = await recover(status, environment, policy=chosen, fenced=fenced)
            settled.append(each)
            if output == "human" and not (arguments.flag("quiet") and each.outcome in ("done", "running")):
                print_text(f"{each.status.image}: {each.message}")

    if found:
        with display(arguments) as shown:
            run_stoppable(arguments, shown, work, image=found[0].image, own=True)
    if output == "json":
        print_json([_members(each) for each in settled])
    elif not settled and not arguments.flag("quiet"):
        print_text("nothing is pending")
    code = next((each.code for each in settled if each.outcome == "failed"), 0)
    return code or (PENDING if any(each.outcome == "left" for each in settled) else 0)


def _members(each: Recovered) -> dict[str, Any]:
    return {
        "image": each.status.image, "operation": each.status.operation, "command": each.status.command,
        "condition": each.status.condition, "on-crash": each.status.on_crash, "action": each.action,
        "outcome": each.outcome, "message": each.message,
    }  # fmt: skip
