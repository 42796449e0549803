"""Deliberate faults in the protocol, each of which the simulation has to catch: `python -m powercut.mutations`.

Every entry breaks one rule by replacing one function for a while. A simulation that stays silent about any of them
would not be worth believing when it stays silent about the real thing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from faults.faulting import rollback_syncs_fail
from powercut.catalogue import SCENARIOS
from powercut.judge import Judge, Scenario, Violation
from safeimg.drivers.errors import DriverError
from safeimg.drivers.formats.api import Changes
from safeimg.drivers.formats.metadata import Phase
from safeimg.drivers.formats.qcow2.driver import Qcow2Driver
from safeimg.drivers.formats.qcow2.planner import Qcow2Planner
from safeimg.drivers.formats.qcow2.shadow import Shadow
from safeimg.drivers.formats.vdi.planner import VdiPlanner
from safeimg.drivers.storage.api import File
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.journal.errors import JournalError
from safeimg.journal.events import (
    Completed,
    FinishRecord,
    Identity,
    PatchRecord,
    PointOfNoReturn,
    StepPrepared,
)
from safeimg.journal.identity import identify
from safeimg.journal.log import Log
from safeimg.journal.undo import UndoFile
from safeimg.ops import engine, launch, rebase_safe, session, tidy
from safeimg.ops.engine import Engine
from safeimg.ops.errors import OperationError
from safeimg.ops.filling import Filler
from safeimg.ops.session import Session
from safeimg.ops.steps import Step
from safeimg.ops.undo import Undo
from safeimg.recovery import settle, takeback


@dataclass(frozen=True)
class Mutation:
    """One broken rule, and the scenario whose crash states show it."""

    name: str
    scenario: str
    apply: Callable[[ExitStack], None]
    failing_syncs: bool = False  # shown where a sync of a rollback fails once


def _replace(target: object, name: str, function: Any) -> Callable[[ExitStack], None]:
    return lambda stack: stack.enter_context(patch.object(target, name, function))  # type: ignore[func-returns-value]


def _no_sync_of(target: type) -> Callable[[ExitStack], None]:
    return _replace(target, "sync", lambda self: None)


def _log_never_synced(stack: ExitStack) -> None:
    def sync(self: Log) -> None:
        self._scan.durable, self._synced_end = self._scan.sequence, self._scan.end

    stack.enter_context(patch.object(Log, "sync", sync))


def _images_not_synced_before_links(self: Engine) -> None:
    self._dirty.clear()
    if self._unconfirmed is not None and self._session is not None:
        self._session.record(self._unconfirmed)
    self._unconfirmed = None


_take = Qcow2Planner.take


def _links_first(self: Qcow2Planner) -> Changes:
    changes = _take(self)
    return changes._replace(allocate=changes.link, link=changes.allocate)


_take_vdi = VdiPlanner.take


def _linked_before_counted(self: VdiPlanner) -> Changes:
    changes = _take_vdi(self)
    return changes._replace(allocate=changes.link, link=changes.allocate)


async def _nothing_kept(transfer: Any, moves: Any, files: Any, undo: Any) -> tuple[()]:
    return ()


_unlink = Qcow2Planner.unlink_clusters


def _freed_at_once(self: Qcow2Planner, first: int, count: int) -> None:
    """Refcounts go down, and the space may be used again, in the step that unlinks it."""
    self.refcounts.lower_run(first, count, Phase.ALLOCATE)
    self.allocator._next_free = 0  # type: ignore[attr-defined]


def _restore_only_what_differs(files: Mapping[int, File], patches: Sequence[PatchRecord]) -> None:
    for record in reversed(patches):
        file = files[record.image]
        if record.before is not None and file.pread(record.offset, len(record.before)) != record.before:
            file.pwrite(record.offset, record.before)


def _no_sync(files: Mapping[int, File], step: StepPrepared) -> None:
    """Taking back without a sync between links, allocations and the record of it."""


_record = Session.record


def _not_recorded(kind: type) -> Callable[[ExitStack], None]:
    def record(self: Session, event: Any) -> None:
        if not isinstance(event, kind):
            _record(self, event)

    return _replace(Session, "record", record)


def _completed_before_the_last_sync(self: Engine) -> None:
    """`barrier` that records, and leaves the sync to later."""
    if self._unconfirmed is not None and self._session is not None:
        self._session.record(self._unconfirmed)
        self._session.sync()
    self._unconfirmed = None


def _truncated_before_the_switch_is_durable(self: Engine, step: Step) -> None:
    if self._unconfirmed is not None and self._session is not None:
        self._session.record(self._unconfirmed)
    self._unconfirmed = None
    self._dirty.clear()
    if self._session is not None and not self._no_return:
        self._session.record(PointOfNoReturn(self._number, time.time()))
        self._no_return = True


def _fence_down_first(stack: ExitStack) -> None:
    def complete(active: Any, files: Any, finish: Any, discards: Any) -> None:
        records = [FinishRecord(image, item.offset, item.before or b"", item.after) for image, item in finish]
        tidy.finish_images(files, records)
        if active is not None:
            active.record(Completed((), time.time()))
            active.settle(files)

    stack.enter_context(patch.object(launch, "complete", complete))


def _log_removed_first(self: Session, files: Mapping[int, File]) -> None:
    self.log.remove()
    self._remove_pointers()
    if self.undo is not None:
        self.undo.close()
    session.remove_durably(self.fs, self.log.path + "-undo")


def _refcounts_before_tables(self: Shadow, **fields: int) -> Iterator[Changes]:
    *before, last = _SWITCH(self, **fields)
    yield from before
    (link,) = last.link
    assert link.before is not None
    low, high = 48 - link.offset, 60 - link.offset  # the refcount table's place and length
    half = link.before[:low] + link.after[low:high] + link.before[high:]
    yield last._replace(link=(link._replace(after=half),))
    yield last._replace(link=(link._replace(before=half),), fresh=(), length=None)


_SWITCH = Shadow.switch


def _prepared_without_a_sync(stack: ExitStack) -> None:
    """A step begins while the record of it may still be lost."""
    last: list[object] = [None]

    def record(self: Session, event: Any) -> None:
        last[0] = event
        _record(self, event)

    def sync(self: Session) -> None:
        if not isinstance(last[0], StepPrepared):
            _sync(self)

    stack.enter_context(patch.object(Session, "record", record))
    stack.enter_context(patch.object(Session, "sync", sync))


_sync = Session.sync
_prepare = Engine._prepare


async def _kept_after_the_write(self: Engine, step: Step, active: Session) -> None:
    """In-place data is written, and then what lies there is kept as what had lain there."""
    await self._move(step)
    await _prepare(self, step, active)


_take_back = takeback.take_back


def _taken_back_on_a_log_that_was_not_synced(active: Session, *rest: Any, **named: Any) -> None:
    with patch.object(Session, "sync", lambda self: None):
        _take_back(active, *rest, **named)
    active.sync()


def _cut_before_the_links_are_back(active: Session, files: Mapping[int, File], wanted: Any, **named: Any) -> None:
    started = active.state.started
    if wanted is settle._any and started is not None:
        for image, length in enumerate(started.lengths):
            if image in files and files[image].length() > length:
                files[image].truncate(length)
                files[image].sync()
    _take_back(active, files, wanted, **named)


def _observed_without_a_sync(self: Session, files: Sequence[File]) -> tuple[tuple[int, Identity], ...]:
    return tuple((index, identify(file)) for index, file in enumerate(files) if index)


def _pointers_last(stack: ExitStack) -> None:
    """The operation is started, and changes images, before the participants point to it."""
    point = Session._point
    late: dict[int, tuple[Session, Any]] = {}

    def settled(self: Session, files: Mapping[int, File]) -> None:
        late.pop(id(self), None)
        _settle(self, files)

    def pointed(self: Engine) -> None:
        if self._session is not None and id(self._session) in late and self._number > 2:
            active, images = late.pop(id(self._session))
            point(active, images)
        _sync_images(self)

    stack.enter_context(patch.object(Session, "_point", lambda self, images: late.update({id(self): (self, images)})))
    stack.enter_context(patch.object(Session, "settle", settled))
    stack.enter_context(patch.object(Engine, "_sync_images", pointed))


_settle = Session.settle
_sync_images = Engine._sync_images


def _undo_file_removed_first(active: Session | None, *rest: Any) -> None:
    if active is not None and active.undo is not None:
        session.remove_durably(active.fs, active.log.path + "-undo")
    tidy.complete(active, *rest)


_parts = Undo._parts


def _links_back_last(self: Undo) -> list[Any]:
    """An undo puts content and allocations back first, and the links away from them afterwards."""
    first, *parts = _parts(self)
    return [first, *(part for pair in zip(parts[1::2], parts[::2], strict=True) for part in pair)]


MUTATIONS = [
    Mutation("the log is never synced", "commit", _log_never_synced),
    Mutation("before-images are not synced before the event that names them", "commit into raw", _no_sync_of(UndoFile)),
    Mutation("no before-images of live data", "commit into raw", _replace(
        engine, "save_before", _nothing_kept)),
    Mutation("no sync between allocations and links", "commit", _replace(
        Engine, "_sync_images", _images_not_synced_before_links)),
    Mutation("links before allocations", "commit", _replace(Qcow2Planner, "take", _links_first)),
    Mutation("VDI blocks are linked before they are counted", "commit into vdi", _replace(
        VdiPlanner, "take", _linked_before_counted)),
    Mutation("refcounts are switched before the tables with the COPIED flags", "snapshot -c third", _replace(
        Shadow, "switch", _refcounts_before_tables)),
    Mutation("freed clusters are free at once", "commit, compressed", _replace(
        Qcow2Planner, "unlink_clusters", _freed_at_once)),
    Mutation("taking back skips bytes that look right", "commit", _replace(
        takeback, "_restore_patches", _restore_only_what_differs), failing_syncs=True),
    Mutation("no syncs while taking back", "commit", _replace(takeback, "_sync", _no_sync)),
    Mutation("completed before the last sync", "commit -d", _replace(
        Engine, "barrier", _completed_before_the_last_sync)),
    Mutation("the file is cut before the switch is durable", "commit", _replace(
        Engine, "_pass_no_return", _truncated_before_the_switch_is_durable)),
    Mutation("the fence comes down before the outcome is durable", "commit", _fence_down_first),
    Mutation("no fence", "commit", _replace(
        Qcow2Driver, "fence", lambda self, image: Changes())),
    Mutation("no pointers beside participants", "commit", _replace(Session, "_point", lambda self, images: None)),
    Mutation("the log is removed before the pointers and the history", "commit", _replace(
        Session, "settle", _log_removed_first)),
    Mutation("a step begins before the record of it is durable", "commit into raw", _prepared_without_a_sync),
    Mutation("before-images are taken after the write", "commit into raw", _replace(
        Engine, "_prepare", _kept_after_the_write)),
    Mutation("the point of no return is not on record", "commit", _not_recorded(PointOfNoReturn)),
    Mutation("names are not made durable", "commit", _replace(
        SimulatedFileSystem, "sync_directory", lambda self, path: None)),
    Mutation("times are on record that are not durable", "commit -d", _replace(
        Session, "observe", _observed_without_a_sync)),
    Mutation("taking back relies on a log that was not synced", "commit into raw", _replace(
        settle, "take_back", _taken_back_on_a_log_that_was_not_synced)),
    Mutation("rollback cuts a file before its links are back", "commit, growing base", _replace(
        settle, "take_back", _cut_before_the_links_are_back)),
    Mutation("pointers are written after the first steps", "commit", _pointers_last),
    Mutation("undo writes over what is still linked to", "undo of commit", _replace(Undo, "_parts", _links_back_last)),
    Mutation("what is given up behind the point of no return is not kept", "undo of commit", _replace(
        engine, "lost_by", lambda step, files: [])),
    Mutation("a rebase syncs another file than the data file", "rebase onto nothing, data file", _replace(
        rebase_safe, "Filler", lambda images, *rest, **options: Filler(images[:1], *rest, **options))),
    Mutation("the undo file goes before the outcome is durable", "commit into raw", _replace(
        launch, "complete", _undo_file_removed_first)),
]


@contextmanager
def broken(mutation: Mutation) -> Iterator[None]:
    with ExitStack() as stack:
        mutation.apply(stack)
        yield


PREFIXES = 24  # of a trace, sampled anew with each seed


def caught(mutation: Mutation, *, seeds: Sequence[int] = (1, 2, 3, 4, 5, 6)) -> tuple[int, str | None]:
    """How many crash states were judged, and what the first violation was."""
    scenario: Scenario = next(each for each in SCENARIOS if each.name == mutation.scenario)
    judged = 0
    with broken(mutation):
        try:
            judge = Judge(scenario)
            if mutation.failing_syncs:
                for fs in rollback_syncs_fail(judge):
                    judge.lasts(judge.settles(fs, "rollback"), "before")
                    judged += 1
                return judged, None
            for seed in seeds:
                for state in judge.states(seed=seed, prefixes=PREFIXES, subsets_per_prefix=3, singles_per_prefix=3):
                    judge.judge(state)
                    judged += 1
                    if judged % 6 == 0:
                        judge.crash_again(state, seed=seed, count=6)
        except (Violation, DriverError, JournalError, OperationError) as error:
            return judged, f"{type(error).__name__}: {error}"
    return judged, None


def _caught(number: int) -> tuple[int, str | None]:
    return caught(MUTATIONS[number])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="those whose name contains this")
    options = parser.parse_args()
    chosen = [number for number, each in enumerate(MUTATIONS) if options.only in each.name]
    missed = 0
    # A process of its own for each: what a broken rule leaves in memory is not the next one's.
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=1) as pool:
        for number, (judged, violation) in zip(chosen, pool.imap(_caught, chosen, chunksize=1), strict=True):
            missed += violation is None
            what = "MISSED" if violation is None else violation.replace("\n", " ")[-110:]
            print(f"{MUTATIONS[number].name:<72} {judged:>5} states  {what}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
