"""Real kills: SIGKILL at random moments of real commits, then recovery by real processes, judged by qemu-img.

    python -m kills.soak --kills 200 --seed 1 --size 1G --dir DIR        (with tests/ on the path)

Each round: fresh images | safeimg commit, killed | as it is: only leaks, and the top shows what it showed (G1) |
resume or rollback, sometimes killed itself and repeated | qemu-img check, compare and info, audit verify, nothing
left beside the images. The first failure ends the soak; images, log and a copy of the state that the kill left
stay in DIR.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kills import images
from kills.images import Wrong
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.journal.errors import LogVoid
from safeimg.journal.events import (
    Completed,
    Event,
    StepApplied,
    StepPrepared,
    TakenBack,
    TakingBack,
)
from safeimg.journal.log import read_events
from safeimg.journal.state import fold

PLAIN = ("-m", "safeimg.cli.main")
# The same program with small steps, so that a kill meets every kind of step many times.
STEPPED = (
    "-c",
    "from safeimg.cli.main import main; from safeimg.ops.commit_job import commit\n"
    "commit.__kwdefaults__['step_bytes'] = {step}; main()",
)
STEPS = 24  # about as many data steps has a commit with small ones


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
class Soak:
    """One soak, in `folder`: `pristine` holds the chain as built, `work` that of the round."""

    folder: Path
    size: int
    rng: random.Random
    phases: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    recovery_kills: int = 0
    early: int = 0  # commits that ended before the kill
    commits: dict[bool, Timing] = field(default_factory=dict)  # by whether steps are small
    recovery: Timing = field(default_factory=lambda: Timing(2.0))

    @property
    def pristine(self) -> Path:
        return self.folder / "pristine"

    @property
    def work(self) -> Path:
        return self.folder / "work"

    def prepare(self, seed: int) -> None:
        images.build(self.pristine, self.size, seed)
        for stepped in (False, True):
            images.copy(self.pristine, self.work)
            started = time.monotonic()
            self.finish(self.start(self.commit(stepped)))
            self.commits[stepped] = Timing(time.monotonic() - started)
            self.settled_as("after")

    # ---- processes

    def commit(self, stepped: bool) -> list[str]:
        program = (
            PLAIN
            if not stepped
            else (STEPPED[0], STEPPED[1].format(step=max(self.size // 3 // STEPS, 65536)))
        )
        return [*program, "commit", "-q", "top.qcow2"]

    def start(self, words: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=self.work,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SAFEIMG_STATE_DIR": str(self.folder / "state")},
        )

    def finish(self, process: subprocess.Popen[str], accept: tuple[int, ...] = (0,)) -> str:
        out, err = process.communicate()
        if process.returncode not in accept or (process.returncode and len(err.splitlines()) != 1):
            raise Wrong(f"{process.args!r}: exit code {process.returncode}: {out.strip()} {err.strip()}")
        return err if process.returncode else out

    def killed(self, words: Sequence[str], timing: Timing) -> float | None:
        """Starts a command and kills it: when, in seconds after its start; None if it ended before that."""
        moment = timing.moment(self.rng)
        started = time.monotonic()
        process = self.start(words)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        self_ended = process.wait() != -signal.SIGKILL
        if self_ended:
            self.finish(process, (0, 6))
            timing.learn(time.monotonic() - started)
            return None
        process.communicate()
        return moment

    # ---- a round

    def round(self, number: int, action: str) -> str:
        """Kills a commit and settles what is left. A line about it."""
        stepped = number % 2 == 0
        while True:
            images.copy(self.pristine, self.work)
            moment = self.killed(self.commit(stepped), self.commits[stepped])
            if moment is not None:
                break
            self.early += 1
        phase, expected = self.read_log()
        images.copy(self.work, self.folder / "crashed", durable=False)
        self.as_it_is()
        first, kills = self.recover_and_kill(action, self.commit(stepped))
        if first != action and expected == "undecided":  # a resume, to its end or to the point of no return
            expected = self.read_log()[1]
        self.settle(action, self.commit(stepped))
        if action == "again":
            expected = "after"
        elif expected == "undecided":
            expected = "after" if action == "resume" else "before"
        elif expected == "either":
            after = images.same(self.work / "base.qcow2", self.pristine / "top.qcow2")
            expected = "after" if after else "before"
            phase += " (settled)" if after and phase == "no log" else ""
        self.settled_as(expected)
        self.phases[phase] += 1
        self.outcomes[f"{action}: {expected}"] += 1
        self.recovery_kills += kills
        again = f", killed {kills} times" if kills else ""
        return (
            f"{moment:7.3f} s  {'small' if stepped else 'plain'}  {phase:<40} {action}{again}: as {expected}"
        )

    def read_log(self) -> tuple[str, str]:
        """The phase that the kill hit, by the log's last event, and what recovery has to reach."""
        path = self.work / "base.qcow2.safeimg"
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

    def as_it_is(self) -> None:
        """G1, while the images lie as the kill left them."""
        for name in images.NAMES:
            images.check(self.work / name, leaks=True)
        images.expect_same(self.work / "top.qcow2", self.pristine / "top.qcow2")

    def recover_and_kill(self, action: str, command: list[str]) -> tuple[str, int]:
        """Begins to settle, and kills that a few times (or never). With what it began, and how often it was killed.

        A resume that was killed may be followed by a rollback, never the other way round."""
        first = "resume" if action == "rollback" and self.rng.random() < 0.2 else action
        kills = 0
        for _ in range(self.rng.choice((0, 0, 1, 2))):
            words = command if first == "again" else [*PLAIN, first, self.image()]
            if self.killed(words, self.recovery) is None:
                break
            kills += 1
        return first, kills

    def settle(self, action: str, command: list[str]) -> None:
        """Resumes (with "again": by the identical command) or rolls back, where that can still be done."""
        started = time.monotonic()
        if action == "again":
            self.finish(self.start(command))
        else:
            image = self.image()
            said = self.finish(self.start([*PLAIN, action, image]), (0, 6))
            if "point of no return" in said:
                said = self.finish(self.start([*PLAIN, "resume", image]))
            if "nothing is pending" in said:  # killed before the overlay had its pointer, or when it had lost it
                self.finish(self.start([*PLAIN, "resume", "base.qcow2"]))
        self.recovery.learn(time.monotonic() - started)

    def image(self) -> str:
        return self.rng.choice(images.NAMES)

    def settled_as(self, expected: str) -> None:
        """Everything is as before the commit, or as behind one that nobody killed."""
        base, top = (self.work / name for name in images.NAMES)
        old_base, old_top = (self.pristine / name for name in images.NAMES)
        left = sorted(path.name for path in self.work.iterdir() if path.name not in images.NAMES)
        if left:
            raise Wrong(f"left beside the images: {left}")
        for new, old in ((base, old_base), (top, old_top)):
            images.check(new)
            if images.features(new) != images.features(old):
                raise Wrong(f"{new}: {images.features(new)}, and it was {images.features(old)}")
        images.expect_same(base, old_base if expected == "before" else old_top)
        images.expect_same(top, old_top)
        if expected == "before" and base.stat().st_size != old_base.stat().st_size:
            raise Wrong(f"{base}: {base.stat().st_size} bytes long, it had {old_base.stat().st_size}")
        if expected == "after" and images.own_data(top):
            raise Wrong(f"{top} is not empty")
        for image in images.NAMES:
            self.finish(self.start([*PLAIN, "audit", "verify", image]))


def _phase(events: Sequence[Event]) -> str:
    """What the process was at, in words: its last event."""
    names = {event.number: event.name for event in events if isinstance(event, StepPrepared)}
    last = events[-1]
    if isinstance(last, StepPrepared | StepApplied | TakingBack | TakenBack):
        return f"{type(last).__name__} {names[last.number]}"
    return type(last).__name__


def run(folder: Path, kills: int, size: int, seed: int, *, quiet: bool = False) -> Soak:
    """Raises `Wrong` at the first failure."""
    soak = Soak(folder, size, random.Random(seed))
    soak.prepare(seed)
    actions = (["resume", "rollback", "again", "rollback"] * (kills // 4 + 1))[:kills]
    soak.rng.shuffle(actions)
    for number, action in enumerate(actions, 1):
        started = time.monotonic()
        line = soak.round(number, action)
        if not quiet:
            print(f"{number:4}  {line}  ({time.monotonic() - started:.1f} s)", flush=True)
    return soak


def bytes_of(text: str) -> int:
    units = {"M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--size", type=bytes_of, default=1 << 30, help="of the virtual disk: bytes, or 64M, 1G"
    )
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="kills-", dir=options.dir))
    started = time.monotonic()
    try:
        soak = run(folder, options.kills, options.size, options.seed)
    except (Wrong, subprocess.CalledProcessError) as error:
        print(f"FAILED: {error}\nthe evidence is in {folder}", flush=True)
        return 1
    shutil.rmtree(folder)
    print(summary(soak, options.kills, time.monotonic() - started))
    return 0


def summary(soak: Soak, kills: int, seconds: float) -> str:
    """The closing lines."""
    lines = [
        f"{kills} kills in {seconds:.0f} s, {soak.recovery_kills} more of recoveries, no failure; "
        f"{soak.early} commits ended before their kill and were not counted",
        *(f"{count:6}  {outcome}" for outcome, count in sorted(soak.outcomes.items())),
        "the last event in the log when the kill came:",
        *(f"{count:6}  {phase}" for phase, count in soak.phases.most_common()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
