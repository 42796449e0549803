"""The state of an operation: a fold over its events.

A step is *solid* once `StepApplied` says that all of it is durable; it is *in flux* while it may be on disk wholly,
partly or not at all: prepared and not yet applied, or being taken back. Steps that were taken back are gone. The
steps in flux are always the newest ones, since steps are applied in order and taken back in reverse.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from safeimg.journal.errors import JournalError
from safeimg.journal.events import (
    Abandoned,
    BeforeRecord,
    ChangedOutside,
    Completed,
    Declared,
    Digested,
    Event,
    GivenUp,
    Observed,
    Paused,
    PointOfNoReturn,
    RecoveryStarted,
    RolledBack,
    Settled,
    Started,
    StepApplied,
    StepPrepared,
    TakenBack,
    TakingBack,
)


class UnlikelyEvents(JournalError):
    """The events of a log contradict each other: it was not written by safeimg, or was changed since."""

    def __init__(self, sequence: int, problem: str) -> None:
        super().__init__(f"event {sequence} of the log: {problem}")


class LiveStep:
    """A step that has not been taken back."""

    __slots__ = ("applied", "digests", "prepared", "taking_back")

    def __init__(self, prepared: StepPrepared, *, applied: bool = False, taking_back: bool = False) -> None:
        self.prepared = prepared
        self.applied = applied
        self.taking_back = taking_back
        self.digests: tuple[bytes, ...] = ()  # of the in-place moves that are `digested`; empty until applied

    @property
    def in_flux(self) -> bool:
        return self.taking_back or not self.applied

    @property
    def settled(self) -> bool:
        """A resumed operation can go on from here; steps behind the newest such step have to be taken back first."""
        return not self.in_flux and self.prepared.cursor is not None


class OperationState:
    """What the log says of an operation so far."""

    def __init__(self, declared: Declared) -> None:
        self.declared = declared
        self.events = 1
        self.started: Started | None = None
        # by image index; as declared or observed later
        self.identities = {index: image.identity for index, image in enumerate(declared.images)}
        self.observed: set[int] = set()  # images observed since the operation last wrote to them
        self.steps: list[LiveStep] = []  # oldest first
        self.last_number = 0
        self.longest: dict[int, int] = {}  # by image: the greatest file length any step asked for
        self.cut: dict[int, int] = {}  # by image: the least file length any step has cut it to
        self.no_return: int | None = None
        self.paused: str | None = None
        self.recovery: RecoveryStarted | None = None
        self.given_up: dict[int, tuple[BeforeRecord, ...]] = {}  # by step: kept for `undo`
        self.outcome: Completed | RolledBack | Abandoned | None = None
        self.settled: Settled | None = None

    def apply(self, event: Event) -> None:
        """One more event. Raises `UnlikelyEvents` if it cannot follow."""
        self.events += 1
        problem = _apply(self, event)
        if problem:
            raise UnlikelyEvents(self.events, problem)

    @property
    def cursor(self) -> Any:
        """Where a resumed operation starts: behind its newest step that is `settled`."""
        for step in reversed(self.steps):
            if step.settled:
                return step.prepared.cursor
        return None if self.started is None else self.started.settings.get("cursor")

    @property
    def done(self) -> int:
        """Guest bytes processed by the solid steps."""
        return max((step.prepared.done for step in self.steps if not step.in_flux), default=0)

    @property
    def rolling_back(self) -> bool:
        """A rollback has begun: nothing else settles the operation any more."""
        return self.recovery is not None and self.recovery.action == "rollback"

    @property
    def past_return(self) -> bool:
        return self.no_return is not None


def fold(events: Iterable[Event]) -> OperationState:
    """The state after `events`. Raises `UnlikelyEvents` where an event cannot follow those before it."""
    iterator = iter(events)
    first = next(iterator, None)
    if not isinstance(first, Declared):
        raise UnlikelyEvents(1, "the first event does not declare an operation")
    state = OperationState(first)
    for event in iterator:
        state.apply(event)
    return state


def _apply(state: OperationState, event: Event) -> str | None:
    """Applies one event to `state`; the problem if it cannot follow."""
    if isinstance(event, Settled):
        if state.outcome is None or state.settled is not None:
            return "it does not follow the operation's outcome"
        state.settled = event
        return None
    if state.outcome is not None:
        return "it follows the operation's outcome"
    if isinstance(event, Declared):
        return "a second operation is declared"
    if isinstance(event, Started):
        if state.started is not None:
            return "the operation is started twice"
        if len(event.lengths) != len(state.declared.images):
            return "it does not give the length of every image"
        state.started = event
        return None
    if isinstance(event, RecoveryStarted):
        if state.rolling_back and event.action != "rollback":
            return "a resume follows a rollback that had begun"
        state.recovery, state.paused = event, None
        return None
    if isinstance(event, RolledBack | Abandoned):
        state.outcome = event
        return None
    if state.started is None:
        return "it comes before the operation is started"
    return _apply_started(state, event)


def _apply_started(
    state: OperationState,
    event: ChangedOutside | Observed | StepPrepared | StepApplied | PointOfNoReturn | GivenUp | Paused | TakingBack
    | TakenBack | Digested | Completed,
) -> str | None:
    if isinstance(event, ChangedOutside | Digested):
        return None
    if isinstance(event, Observed):
        state.identities.update(event.identities)
        state.observed.update(index for index, _ in event.identities)
        return None
    if isinstance(event, StepPrepared):
        if state.rolling_back:
            return "a step is prepared during a rollback"
        if event.number <= state.last_number:
            return f"step {event.number} is prepared after step {state.last_number}"
        state.last_number = event.number
        for record in event.lengths:
            state.longest[record.image] = max(state.longest.get(record.image, 0), record.after)
            if record.after < record.before:
                state.cut[record.image] = min(state.cut.get(record.image, record.after), record.after)
        state.steps.append(LiveStep(event))
        state.observed -= step_images(event)
        return None
    if isinstance(event, PointOfNoReturn):
        state.no_return = event.number
        return None
    if isinstance(event, GivenUp):
        state.given_up[event.number] = event.before
        return None
    if isinstance(event, Paused):
        state.paused = event.reason
        return None
    if isinstance(event, Completed):
        if any(step.in_flux for step in state.steps):
            return "the operation is completed with a step in flight"
        state.outcome = event
        return None
    return _apply_to_step(state, event)


def _apply_to_step(state: OperationState, event: StepApplied | TakingBack | TakenBack) -> str | None:
    step = next((live for live in state.steps if live.prepared.number == event.number), None)
    if step is None:
        return f"step {event.number} is not there"
    if isinstance(event, StepApplied):
        if any(live.in_flux for live in state.steps if live.prepared.number < event.number):
            return f"step {event.number} is applied before the ones it builds on"
        step.applied, step.digests = True, event.digests
        return None
    if step is not state.steps[-1]:
        return f"step {event.number} is taken back before the ones that build on it"
    if isinstance(event, TakingBack):
        step.taking_back = True
        state.observed -= step_images(step.prepared)
        return None
    if not step.taking_back:
        return f"step {event.number} is taken back without notice"
    state.steps.pop()
    return None


def step_images(step: StepPrepared) -> set[int]:
    """The images that a step writes to."""
    groups = (step.allocate, step.link, step.moves, step.fresh, step.lengths)
    return {record.image for group in groups for record in group}
