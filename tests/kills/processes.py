"""Commands as processes of their own, some of them killed, and what their logs then say."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kills.images import Wrong
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.journal.errors import LogVoid
from safeimg.journal.events import Completed, Event, StepApplied, StepPrepared, TakenBack, TakingBack
from safeimg.journal.log import read_events
from safeimg.journal.state import fold

PLAIN = ("-m", "safeimg.cli.main")


@dataclass
class Timing:
    """How long a command takes that nobody kills, seconds: kills spread over all of that."""

    seconds: float

    def moment(self, rng: random.Random) -> float:
        return rng.uniform(0, self.seconds)

    def learn(self, seconds: float) -> None:
        """A command ended by itself before it was to be killed."""
        self.seconds += (seconds - self.seconds) / 4


@dataclass
class Processes:
    """Starts commands in the folder `work`, with a history of their own in `state`."""

    work: Path
    state: Path
    rng: random.Random

    def start(self, words: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=self.work,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SAFEIMG_STATE_DIR": str(self.state)},
        )

    def finish(self, process: subprocess.Popen[str], accept: tuple[int, ...] = (0,)) -> str:
        out, err = process.communicate()
        if process.returncode not in accept or (process.returncode and len(err.splitlines()) != 1):
            raise Wrong(f"{process.args!r}: exit code {process.returncode}: {out.strip()} {err.strip()}")
        return err if process.returncode else out

    def killed(self, words: Sequence[str], timing: Timing, *, begun: Path | None = None) -> float | None:
        """Starts a command and kills it: when, in seconds after its start; None if it ended before that.

        `begun`: the file whose appearance the kill is counted from, where there is one."""
        moment = timing.moment(self.rng)
        started = counted = time.monotonic()
        process = self.start(words)
        while begun is not None and not begun.exists() and process.poll() is None:
            time.sleep(0.0005)
            counted = time.monotonic()
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        at = time.monotonic()
        if process.wait() != -signal.SIGKILL:
            self.finish(process, (0, 6))
            timing.learn(time.monotonic() - counted)
            return None
        process.communicate()
        return at - started


def read_log(path: Path) -> tuple[str, str]:
    """The phase that the kill hit, by the log's last event, and what recovery has to reach."""
    if not path.exists():
        return "no log", "either"
    try:
        events = read_events(LocalFileSystem(), str(path))
    except LogVoid:
        return "log without event", "before"
    state = fold(events)
    if isinstance(state.outcome, Completed):
        return _phase(events), "after"
    if state.started is None:
        return _phase(events), "before"
    return _phase(events), "after" if state.past_return else "undecided"


def _phase(events: Sequence[Event]) -> str:
    """What the process was at, in words: its last event."""
    names = {event.number: event.name for event in events if isinstance(event, StepPrepared)}
    last = events[-1]
    if isinstance(last, StepPrepared | StepApplied | TakingBack | TakenBack):
        return f"{type(last).__name__} {names[last.number]}"
    return type(last).__name__
