"""Starting an operation, and ending one: what every command that changes images goes through.

A `Job` is an operation with its images open; commands make one from their arguments, recovery makes the same one
from the log (`registry.py`). From there on nothing depends on the command any more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safeimg.drivers.errors import DriverError, UnsupportedError
from safeimg.drivers.formats.api import Image
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import File, FileSystem
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.loop import blocking
from safeimg.drivers.transfer.target import Target
from safeimg.drivers.transfer.view import Content
from safeimg.journal import find
from safeimg.journal.errors import JournalError
from safeimg.journal.events import ContentRecord, Digested
from safeimg.journal.history import History
from safeimg.journal.kept import Keeping
from safeimg.ops.engine import Engine
from safeimg.ops.errors import OperationPaused
from safeimg.ops.session import Session, Touched, refuse_pending
from safeimg.ops.steps import Operation
from safeimg.ops.tidy import complete

_REPEATABLE = ("convert", "dd")  # raw images are written in place from sources that stay: interrupted, begun again


class Environment(NamedTuple):
    """What the caller decides for any operation."""

    fs: FileSystem
    history: History
    transfer: Transfer
    arguments: tuple[str, ...] = ()  # the command line, without secrets: the identical one resumes
    journal: str = "auto"  # "auto", "require", "off", or the path of the log
    on_crash: str = "report"  # what `recover` does if this is interrupted: "resume", "rollback" or "report"
    stop: Callable[[], str | None] = lambda: None  # why to pause, if at all
    secrets: Secrets = NO_SECRETS  # what encrypted images are opened with
    notice: Callable[[str], None] = lambda line: None  # shows a line of a report, as it is
    keeping: Keeping | None = None  # what is kept of completed operations, for `undo`
    digest: bool = False  # what the images show in the end goes on record


ON_CRASH, DIGEST = "on_crash", "digest"  # the settings that keep them


class Job(NamedTuple):
    """An operation ready to run on open images."""

    command: str
    operation: Operation
    images: Sequence[Touched]  # by index; the home image first
    layers: Sequence[Image]  # everything that is open, to be closed
    view: Content | None  # what in-place moves copy from
    settings: Mapping[str, Any]  # what it takes to make this job again, JSON-like
    undo: bool = True
    defer: float = 0.0  # seconds of work after which the journal begins; only where nothing is lost by redoing them
    created: tuple[int, ...] = ()
    total: int = 0
    damaged: bool = False  # the images were broken before: what they refer to tells nothing

    @property
    def files(self) -> list[File]:
        return [image.file for image in self.images]

    @property
    def targets(self) -> list[Target]:
        return [Target(image.file, image.cipher) for image in self.images]

    def close(self) -> None:
        for layer in self.layers:
            layer.close()


async def launch(job: Job, environment: Environment) -> None:
    """Runs a new operation to its end. Refused while anything is pending on an image that it changes."""
    refuse_pending(environment.fs, environment.history, job.images)
    keeps_journal = _keeps_journal(job, environment.journal)
    opened: list[Session] = []
    started = time.monotonic()

    def begin(cursor: Any | None, now: bool) -> Session | None:
        if not keeps_journal or not (now or environment.digest or time.monotonic() - started >= job.defer):
            return None
        _sync(job)  # what was done without a journal is where the journal begins
        for index in job.created:
            environment.fs.sync_directory(os.path.dirname(job.images[index].path) or ".")
        opened.append(
            Session.begin(
                environment.fs, environment.history, command=job.command, arguments=environment.arguments,
                images=job.images, settings={**job.settings, "cursor": cursor, ON_CRASH: environment.on_crash,
                                             DIGEST: environment.digest},
                undo=job.undo, created=job.created, total=job.total, journal=environment.journal,
                keeping=environment.keeping,
            )
        )
        return opened[0]

    if not keeps_journal and not job.created:
        await blocking(_sync, job)  # what a killed program wrote is relied on, and not written again
    try:
        await _run(job, environment, await blocking(begin, None, False), None, begin)
    except BaseException:
        if not opened and not _is_started(environment.fs, job.images[0].path):  # nobody could go on with it
            for index in job.created:
                environment.fs.unlink(job.images[index].path)
        raise
    finally:
        for session in opened:
            session.close()


def _sync(job: Job) -> None:
    for file in job.files:
        if file.writable:
            file.sync()


def _is_started(fs: FileSystem, home: str) -> bool:
    """Whether a journal that could not be begun is there all the same: the sync of its last event failed."""
    try:
        found = find.find(fs, home)
    except (DriverError, JournalError):
        return True  # it may be
    return isinstance(found, find.LogFound) and found.started


def _keeps_journal(job: Job, wanted: str) -> bool:
    """Whether an operation has a journal. One whose images are not files of this machine would not be found again: it
    can do without if running it again comes to the same. `UnsupportedError` if it cannot."""
    if wanted == "off":
        return False
    elsewhere = [image for image in job.images if image.writes and not image.file.stat().is_here]
    if not elsewhere:
        return True
    if wanted != "auto" or job.undo or job.command not in _REPEATABLE or any(i.format != "raw" for i in elsewhere):
        raise UnsupportedError(
            f"{elsewhere[0].path}: there is no journal for an image that is no file of this machine, and {job.command} "
            "needs one to be safe; to do it all the same, add --no-journal"
        )
    return False


async def go_on(job: Job, environment: Environment, session: Session) -> None:
    """Runs a pending operation to its end, from its cursor on."""
    await _run(job, environment, session, session.state.cursor, lambda cursor, now: None)


async def _run(
    job: Job,
    environment: Environment,
    session: Session | None,
    cursor: Any | None,
    begin: Callable[[Any, bool], Session | None],
) -> None:
    """Applies the operation's steps from `cursor` on, and completes it."""
    environment.transfer.progress.set_total(job.total)
    engine = Engine(job.targets, job.view, environment.transfer, session, stop=environment.stop)
    await engine.run(job.operation, cursor, begin=begin)
    if engine.session is not None and _wants_digest(engine.session):
        await _digest(job, environment, engine, engine.session)
    await blocking(
        complete, engine.session, dict(enumerate(job.files)), job.operation.finish(), job.operation.discards()
    )


def _wants_digest(session: Session) -> bool:
    started = session.state.started
    return started is not None and started.settings.get(DIGEST) is True


async def _digest(job: Job, environment: Environment, engine: Engine, session: Session) -> None:
    """Records what the images show that were written. Raises `OperationPaused`; what it cannot open it says."""
    from safeimg.ops.content import digest_of

    def look_up() -> None:
        reason = environment.stop()
        if reason is not None:
            raise OperationPaused(reason)

    found: list[ContentRecord] = []
    for index, touched in enumerate(job.images):
        image = next((layer for layer in job.layers if layer.file is touched.file), None)
        if not touched.writes or image is None:
            continue
        try:
            digest = await digest_of(environment.fs, image, environment.secrets, environment.transfer, look_up)
        except OperationPaused as paused:
            await blocking(engine.pause, paused.reason)
        except DriverError as error:
            environment.notice(f"{touched.path}: no digest of its content: {error}")
            continue
        found.append(ContentRecord(index, image.format, digest.hex()))
    session.record(Digested(tuple(found)))
