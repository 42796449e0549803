"""Running what changes images: the environment, the event loop, and signals that pause at a step boundary."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from safeimg.cli.common import filesystem
from safeimg.cli.config import KEEP_UNDO, KEEP_UNDO_TOTAL, setting
from safeimg.cli.errors import CommandError
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import Display
from safeimg.cli.values import warn
from safeimg.drivers.formats.naming import Blockdev, local_name
from safeimg.drivers.secrets import NO_SECRETS

if TYPE_CHECKING:
    from safeimg.drivers.errors import StorageError
    from safeimg.drivers.transfer.core import Settings
    from safeimg.journal.kept import Keeping
    from safeimg.ops.launch import Environment

Result = TypeVar("Result")
Failure = TypeVar("Failure", bound=Exception)

PAUSED = 3  # exit code of safeimg's own commands: something is pending
WAIT_STEP = 0.25  # seconds between two tries of --wait


class Stop:
    """Whether a signal asked to stop. The second one does not wait for the end of the step, only for what worker
    threads are at; the third one for nothing."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.over = False  # nothing is left to be stopped
        self.cancel: Callable[[], bool] = lambda: False  # whether there was something to be cancelled

    def reason(self) -> str | None:
        return None if self.signal is None else signal.Signals(self.signal).name

    def ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            return
        if self.over:
            return
        cancel, self.cancel = self.cancel, lambda: False
        if not cancel():
            raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[Stop]:
    """SIGINT, SIGTERM and SIGHUP only take a note while the body runs."""
    stop = Stop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        if handler is not signal.SIG_IGN:  # what nohup and shells' background jobs ask for
            signal.signal(number, stop.ask)
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def run_stoppable(
    arguments: Arguments,
    shown: Display,
    work: Callable[[Environment], Awaitable[Result]],
    *,
    image: str | Blockdev,
    settings: Settings | None = None,
    own: bool = False,
    io_error: Callable[[StorageError], str] = str,
) -> Result:
    """Runs `work` with progress shown. If a signal pauses it, or it fails with something pending, says how to go on
    with `image`.

    `own`: one of safeimg's own commands, whose exit codes tell that something is pending. `io_error`: what qemu-img
    says when a read or write fails."""
    from safeimg.drivers.errors import DriverError
    from safeimg.drivers.transfer.loop import run_alone
    from safeimg.journal.errors import HistoryError
    from safeimg.ops.errors import OperationPaused

    path = local_name(image)
    with stoppable() as stop:
        try:
            try:
                around = environment(arguments, settings, stop)
                with shown.watching(around.transfer.progress):
                    stop.cancel = around.transfer.cancel
                    return run_alone(partial(patient(work, arguments.last("wait", 0.0)), around))
            finally:
                stop.over = True  # how to go on is told whatever comes
        except (OperationPaused, KeyboardInterrupt) as error:
            raise paused(path, error, stop, own) from error
        except (DriverError, HistoryError) as error:
            told = failure(path, error, io_error)
            if told is None:
                raise
            raise told from error


def patient(
    work: Callable[[Environment], Awaitable[Result]], seconds: float
) -> Callable[[Environment], Awaitable[Result]]:
    """`work`, tried again for so long while others use its images or work on them."""

    async def tried(around: Environment) -> Result:
        from safeimg.drivers.errors import LockError
        from safeimg.drivers.transfer.loop import blocking
        from safeimg.ops.errors import OwnerAlive, SomethingPending

        until = time.monotonic() + seconds
        while True:
            try:
                return await work(around)
            except (LockError, OwnerAlive, SomethingPending) as error:
                if time.monotonic() >= until or around.stop() or not _will_end(error):
                    raise
            await blocking(time.sleep, min(WAIT_STEP, max(0.0, until - time.monotonic())))

    return tried


def _will_end(error: Exception) -> bool:
    """Whether it is somebody alive who is in the way: what was interrupted does not end by itself."""
    from safeimg.drivers.errors import DriverError
    from safeimg.journal import find
    from safeimg.journal.errors import JournalError
    from safeimg.journal.owner import liveness
    from safeimg.ops.errors import SomethingPending

    if not isinstance(error, SomethingPending):
        return True
    try:
        log = find.follow(filesystem(), find.find(filesystem(), error.home))
    except (DriverError, JournalError):
        return False
    return log is None or liveness(log.owner) == "alive"


def environment(
    arguments: Arguments | None = None, settings: Settings | None = None, stop: Stop | None = None
) -> Environment:
    """What an operation needs from the command line."""
    from safeimg.drivers.transfer.core import Transfer
    from safeimg.journal.sqlite import SqliteHistory
    from safeimg.ops.launch import Environment

    return Environment(
        filesystem(),
        SqliteHistory(),
        Transfer(settings, warn=(lambda message: None) if arguments is not None and arguments.flag("quiet") else warn),
        arguments=recorded(sys.argv[1:]),
        journal="auto" if arguments is None else _journal(arguments),
        on_crash="report" if arguments is None else _on_crash(arguments),
        stop=Stop().reason if stop is None else stop.reason,
        secrets=NO_SECRETS if arguments is None else arguments.secrets,
        notice=lambda line: print(line, file=sys.stderr),
        keeping=keeping(arguments),
        digest=arguments is not None and arguments.flag("digest"),
    )


def failure(image: str, error: Exception, io_error: Callable[[StorageError], str]) -> CommandError | None:
    """What to print if an error has left something pending on `image`: it, and the ways out."""
    from safeimg.cli.main import program_name
    from safeimg.drivers.errors import StorageError

    if isinstance(error, StorageError) and program_name() == "qemu-img":
        return CommandError(io_error(error))
    rest = ways_out(image)
    return CommandError(f"{error}; {rest}") if rest else None


def paused(image: str, error: BaseException, stop: Stop, own: bool) -> CommandError:
    """What to print, and the exit code: that of a program which the signal ended."""
    from safeimg.cli.main import program_name

    if stop.signal is None:
        why = getattr(error, "reason", "interrupted")
        code = PAUSED if own else 1
    else:
        why = f"stopped by {stop.reason()}"
        code = PAUSED if own else 128 + stop.signal
    if program_name() == "qemu-img" and stop.signal is not None:  # which says nothing then
        return CommandError(code=code)
    return CommandError(f"{image}: {why}; {ways_out(image) or 'no journal was kept: begin again'}", code=code)


def ways_out(image: str) -> str:
    """The commands that settle what is pending on `image`, for the end of a message; nothing if nothing is. Called as
    qemu-img, nothing is said of it."""
    from safeimg.cli.main import program_name
    from safeimg.drivers.errors import DriverError
    from safeimg.journal.errors import JournalError
    from safeimg.journal.sqlite import SqliteHistory
    from safeimg.recovery.status import status

    if program_name() == "qemu-img":
        return ""
    try:
        found = status(filesystem(), SqliteHistory(), [image])
    except (DriverError, JournalError):
        return ""
    if not found or found[0].condition == "unreadable" or not found[0].operation:
        return ""
    pending, name = found[0], shlex.quote(image)
    if pending.condition == "finishing":
        return f"the {pending.command} is done but for tidying up: 'safeimg resume {name}'"
    if pending.rolling_back:
        return f"go on with 'safeimg rollback {name}'"
    if pending.past_return or not (pending.undo or pending.removes):
        return f"go on with 'safeimg resume {name}'"
    return f"go on with 'safeimg resume {name}', or take it back with 'safeimg rollback {name}'"


def recorded(words: Sequence[str]) -> tuple[str, ...]:
    """The command line as it is put on record: without `--object`, which may carry passwords.

    Abbreviations count: in commands that have no other option like it, `--o` will do."""
    kept: list[str] = []
    skip = False
    for word in words:
        name, given, _ = word.partition("=")
        is_object = len(name) > 2 and "--object".startswith(name)
        if not skip and not is_object:
            kept.append(word)
        skip = is_object and not given and not skip
    return tuple(kept)


def _on_crash(arguments: Arguments) -> str:
    """`resume`, `rollback` or `report`."""
    return str(arguments.last("on-crash") or setting("on-crash", "report"))


def _journal(arguments: Arguments) -> str:
    """`auto`, `require`, `off`, or the path of the log."""
    if arguments.flag("no-journal"):
        return "off"
    return str(arguments.last("journal") or setting("journal", "auto"))


def keeping(arguments: Arguments | None = None) -> Keeping:
    """How much is kept for `undo`."""
    from safeimg.journal.kept import Keeping
    from safeimg.ops.sizes import parse_size

    given = None if arguments is None else arguments.last("keep-undo")
    each = parse_size(setting("keep-undo", KEEP_UNDO)) if given is None else given
    return Keeping(each or 0, parse_size(setting("keep-undo-total", KEEP_UNDO_TOTAL)) or 0)
