"""recover: settles what was interrupted, as each operation asked for when it was started. Nobody is asked anything.

    condition (status.py)         what is done
    running                       nothing: it is none of ours
    unbegun, finishing            resume: it only tidies up
    interrupted, paused           by the policy: resume, rollback, or nothing but a report; a rollback that had begun is
                                  finished, and what is past its point of no return is never rolled back
    unknown                       the same with `fenced`, else nothing
    orphaned, unreadable          nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safeimg.drivers.errors import DriverError
from safeimg.journal.errors import JournalError
from safeimg.ops.errors import OperationError, OperationPaused
from safeimg.ops.launch import Environment
from safeimg.recovery import settle
from safeimg.recovery.pending import NothingPending
from safeimg.recovery.status import Status


@dataclass(frozen=True, slots=True)
class Recovered:
    """What became of an operation. `outcome`: *done*; *running*: its owner works on it; *left*: it is still pending,
    as its policy wants; *failed*: it is still pending, `message` says why."""

    status: Status
    action: Literal["resume", "rollback", "none"]
    outcome: Literal["done", "running", "left", "failed"]
    message: str
    code: int = 0  # exit code of the failure


async def recover(
    status: Status, environment: Environment, *, policy: str | None = None, fenced: bool = False
) -> Recovered:
    """Settles an operation. `policy`: instead of what it was started with. Raises `OperationPaused` alone."""
    plan = _plan(status, policy or status.on_crash, fenced)
    if isinstance(plan, Recovered):
        return plan
    verb = settle.resume if plan == "resume" else settle.rollback
    try:
        done = await verb(status.image, environment, fenced=fenced, operation=status.operation)
    except NothingPending as nothing:
        return Recovered(status, plan, "done", str(nothing))
    except OperationPaused:
        raise
    except (OperationError, JournalError, DriverError) as error:
        return Recovered(status, plan, "failed", str(error), getattr(error, "exit_code", 1))
    return Recovered(status, plan, "done", done)


def _plan(status: Status, policy: str, fenced: bool) -> Literal["resume", "rollback"] | Recovered:
    """What is to be done about an operation, or why nothing is."""
    if status.condition in ("unbegun", "finishing"):
        return "resume"
    if status.condition == "running":
        return Recovered(status, "none", "running", f"process {status.pid} is working on it")
    if status.condition == "unreadable":
        return Recovered(status, "none", "failed", status.problem, 1)
    if status.condition == "orphaned":
        why = "the image is not there, only its log: put it back, or give the operation up with 'safeimg abandon'"
        return Recovered(status, "none", "failed", why, 6)
    if status.condition == "unknown" and not fenced:
        owner = f"process {status.pid} on host {status.host}"
        why = f"{owner} cannot be seen from here; if it is certainly dead, add --fenced"
        return Recovered(status, "none", "failed", why, 5)
    if status.rolling_back:
        return "rollback"
    if policy == "resume":
        return "resume"
    if policy != "rollback":
        why = f"the {status.command} was neither resumed nor rolled back: nobody said which (--policy)"
        return Recovered(status, "none", "left", why)
    if status.past_return:
        return Recovered(status, "none", "failed", "it is past its point of no return: resume finishes it", 6)
    return "rollback"
