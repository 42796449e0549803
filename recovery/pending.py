"""A pending operation opened for settling: its journal, its images, and the right to change them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import TracebackType

from safeimg.drivers.errors import DriverError, NoLocks
from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.storage.api import File, FileSystem
from safeimg.drivers.storage.locks import try_lock
from safeimg.journal import find
from safeimg.journal.errors import LogBusy, LogDamaged, LogLost
from safeimg.journal.events import Abandoned, Completed, FinishRecord, RolledBack
from safeimg.journal.files import remove_durably
from safeimg.journal.identity import identify, same_file
from safeimg.journal.owner import current_owner, liveness
from safeimg.journal.state import OperationState
from safeimg.journal.undo import SUFFIX
from safeimg.ops.errors import Conflict, Impossible, OperationError, OwnerAlive
from safeimg.ops.launch import Environment, Job
from safeimg.ops.registry import reopener, reparse
from safeimg.ops.session import Session
from safeimg.ops.tidy import finish_images

DAMAGED = "-damaged"  # what the names of files end with that were given up unread


class NothingPending(OperationError):
    """There is nothing to settle: no error for who was asked to settle it, who says so."""


class Pending:
    """Close it by leaving the `with` block: images are closed and the log's lock is given back."""

    def __init__(self, session: Session, environment: Environment, files: Mapping[int, File], job: Job | None) -> None:
        """Private: see `open_pending`."""
        self.session = session
        self.files = files
        self._environment = environment
        self._job = job

    def __enter__(self) -> Pending:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for opened in self._job.layers if self._job is not None else self.files.values():
            opened.close()
        self.session.close()

    @property
    def job(self) -> Job:
        if self._job is None:
            raise Impossible(f"{self.session.home}: the operation cannot go on")
        return self._job

    def fresh_job(self) -> Job:
        """The job on images as they are after steps were taken back."""
        state = self.session.state
        layers = reparse(list(self.job.layers))
        self._job = reopener(self.session.home, state).make_job(layers, state, self._environment)
        return self._job

    def used_end(self, image: int, length: int) -> int | None:
        """Where the last byte ends that anything in the image refers to, as it is on disk now.

        `length`: of the file when the operation started. QEMU leaves files that end within their last cluster; what
        filled it since counts only if there is something in it. None: there is no telling."""
        if self._job is not None and self._job.damaged:
            return None
        driver = lookup(self.session.state.declared.images[image].format)
        opened = driver.open(self.files[image], repair=True)
        end = driver.used_end(opened)
        if end is not None and length < end < length + opened.cluster_size:
            behind = self.files[image].pread(length, end - length)
            return end if behind.strip(b"\0") else length
        return end

    def fences(self) -> tuple[FinishRecord, ...]:
        """What it takes to take the fences of all images down, from what is on disk now. An image that was marked as
        corrupt by somebody else stays so."""
        fenced = {
            patch.image
            for step in self.session.state.steps
            if step.prepared.name == "fence"
            for patch in step.prepared.link
        }
        found = []
        for index, record in enumerate(self.session.state.declared.images):
            if index not in self.files or not record.writes:
                continue
            try:
                driver = lookup(record.format)
                image: Image = driver.open(self.files[index], repair=True)
                marked = driver.repairing is not None and driver.repairing.is_marked(image)
                patches = driver.unfence(image) if index in fenced or not marked else ()
            except DriverError:  # not even readable: there is nothing to take down
                continue
            found += [FinishRecord(index, patch.offset, patch.before or b"", patch.after) for patch in patches]
        return tuple(found)

    def finish_outcome(self) -> str | None:
        """If the outcome is on record: does what remains to be done after it, and says which it was.

        An operation that was declared and never started has touched nothing: its log goes."""
        state = self.session.state
        command = state.declared.command
        if state.started is None:
            self.session.settle({})
            return f"{command} had not begun; nothing was changed"
        if isinstance(state.outcome, Completed | Abandoned):
            finish_images(self.files, state.outcome.finish)
        if state.outcome is None:
            return None
        self.session.settle(self.files)
        names = {Completed: "completed", RolledBack: "rolled back", Abandoned: "given up"}
        return f"{command} had been {names[type(state.outcome)]} before"


def open_pending(
    path: str,
    environment: Environment,
    *,
    fenced: bool = False,
    adopt: bool = False,
    operation: str = "",
    bare: Callable[[OperationState], bool] = lambda state: False,
    undo: bool = True,
) -> Pending:
    """What is pending on the image at `path`, its home or a participant, opened and locked.

    `fenced`: an owner that nobody here can see is known to be dead. `adopt`: the images are copies, bound to the log
    by their paths alone. `operation`: how the id of the one that is meant begins; another one counts as nothing.
    `bare`: when only the files are wanted, whatever they hold, if they are there. `undo`: whether the before-images
    are needed. Participants without a pointer to
    this operation are never written (hazard 13). Raises `NothingPending`, `OwnerAlive`, `Conflict`, `LogForeign`,
    `LogDamaged`."""
    home, log_path = _locate(path, environment)
    try:
        session = Session.reopen(
            environment.fs, environment.history, home, log_path, undo=undo, keeping=environment.keeping
        )
    except LogBusy:
        raise OwnerAlive(f"{path}: another safeimg process is working on it") from None
    try:
        state = session.state
        if not state.declared.operation.startswith(operation):
            raise NothingPending(f"{path}: operation {operation} is not pending; another one is")
        _check_owner(path, session, fenced)
        alone = state.outcome is not None or state.started is None or bare(state)
        if not alone and environment.fs.stat(home) is None:
            raise Impossible(
                f"{home}: the image is not there, only the log of the {state.declared.command} that is pending on it: "
                f"put it back, or give the operation up with 'safeimg abandon {path}'"
            )
        job = None if alone else _open_job(session, environment)
        files = _open_files(session) if job is None else dict(enumerate(job.files))
        pending = Pending(session, environment, files, job)
    except BaseException:
        session.close()
        raise
    if not adopt:
        try:
            _check_identities(session, files)
        except BaseException:
            pending.__exit__(None, None, None)
            raise
    return pending


def clear_unreadable(path: str, environment: Environment, problem: LogDamaged | LogLost) -> str:
    """Gives up what nobody can tell anything of any more, since the log is damaged or gone: it is out of the image's
    way afterwards, kept under another name. What was done, in one line. Raises `OwnerAlive`."""
    fs = environment.fs
    kept = []
    for sidecar in (problem.path, problem.path + SUFFIX):
        if fs.stat(sidecar) is None:
            continue
        file = fs.open(sidecar, write=True)
        try:
            if not try_lock(file):
                raise OwnerAlive(f"{path}: another safeimg process is working on it")
            fs.rename(sidecar, sidecar + DAMAGED)
        finally:
            file.close()
        kept.append(sidecar + DAMAGED)
    fs.sync_directory(os.path.dirname(problem.path) or ".")
    return (
        f"what was pending is given up, and kept as {' and '.join(kept)}; the images stay as they are: one that is "
        f"marked as corrupt opens again after 'safeimg check -r leaks'"
    )


def _locate(path: str, environment: Environment) -> tuple[str, str]:
    """The home image and the log of what is pending on the image at `path`."""
    found = find.find(environment.fs, path)
    if found is None:
        known = find.indexed(environment.fs, environment.history.pending(), path)
        if known is None:
            raise NothingPending(f"{path}: nothing is pending")
        return known[0], known[1].path
    if isinstance(found, find.VoidFound):
        find.clear_void(environment.fs, found)
        raise NothingPending(f"{path}: nothing is pending (an operation that never began was cleared away)")
    if isinstance(found, find.LogFound):
        return _unlinked(environment.fs, path), found.path
    resolved = find.resolve_pointer(environment.fs, found)
    if resolved.log is None:
        remove_durably(environment.fs, found.path)
        raise NothingPending(f"{path}: nothing is pending (a pointer to a settled operation was cleared away)")
    return resolved.home, resolved.log.path


def _unlinked(fs: FileSystem, path: str) -> str:
    """Where the file at `path` lies if that is a symbolic link: the other images are found from there."""
    resolved = fs.resolve(path)
    beside = os.path.join(fs.resolve(os.path.dirname(path) or "."), os.path.basename(path))
    return path if resolved == beside else resolved


def _check_owner(path: str, session: Session, fenced: bool) -> None:
    state = session.state
    owner = state.declared.owner if state.recovery is None else state.recovery.owner
    alive = liveness(owner)
    if alive == "dead" or (alive == "unknown" and fenced) or owner == current_owner():
        return
    if alive == "alive":
        raise OwnerAlive(f"{path}: process {owner.pid} is working on it; wait for it, or stop it with SIGINT")
    raise OwnerAlive(
        f"{path}: process {owner.pid} on host {owner.host} worked on it and cannot be seen from here; if it is "
        f"certainly dead, add --fenced"
    )


def _open_job(session: Session, environment: Environment) -> Job:
    for index, image in enumerate(session.state.declared.images):
        if image.writes and not session.owns(index):
            raise Conflict(
                f"{session.path_of(image)}: has no pointer to the operation pending on {session.home}, so nothing is "
                f"written to it; put both back together, or give the operation up with 'safeimg abandon'"
            )
    module = reopener(session.home, session.state)
    try:
        layers = module.open_layers(session.fs, session.home, session.state, environment.secrets)
    except DriverError as error:
        names = map(session.path_of, session.state.declared.images)
        missing = [name for name in names if session.fs.stat(name) is None]
        if not missing:
            raise
        raise Impossible(
            f"{missing[0]}: not there: put it back under that name, or give the {session.state.declared.command} up "
            f"with 'safeimg abandon {session.home}'"
        ) from error
    try:
        return module.make_job(layers, session.state, environment)
    except BaseException:
        for layer in layers:
            layer.close()
        raise


def _open_files(session: Session) -> dict[int, File]:
    """The images that are written and still there, by index."""
    files: dict[int, File] = {}
    try:
        for index, image in enumerate(session.state.declared.images):
            path = session.home if index == 0 else session.path_of(image)
            if image.writes and session.fs.stat(path) is not None and session.owns(index):
                files[index] = _open_locked(session.fs, path)
    except BaseException:
        for file in files.values():
            file.close()
        raise
    return files


def _open_locked(fs: FileSystem, path: str) -> File:
    """Where there are no locks, the log's owner is what tells that nobody else is at work."""
    try:
        return fs.open(path, write=True, locking=True)
    except NoLocks:
        return fs.open(path, write=True)


def _check_identities(session: Session, files: Mapping[int, File]) -> None:
    for index, file in files.items():
        recorded = session.state.identities[index]
        if not same_file(recorded, identify(file)):
            raise Conflict(
                f"{file.path}: not the file that the pending {session.state.declared.command} was about (a copy, or "
                f"restored from a backup); if log and images belong together, add --adopt"
            )
