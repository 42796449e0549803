"""Real kills: SIGKILL at random moments of real operations, then recovery by real processes, judged by qemu-img.

    python -m kills.soak --operation all --kills 200 --seed 1 --size 1G --dir DIR        (with tests/ on the path)

`--operation` is commit if not given; `--size` is of the commit's images. Of other operations: rounds.py. Each round
of commit: fresh images | safeimg commit, killed | as it is: only leaks, and the top shows what it showed (G1) |
resume or rollback, sometimes killed itself and repeated | qemu-img check, compare and info, audit verify, nothing
left beside the images. The first failure ends the soak; images, log and a copy of the state that the kill left
stay in DIR.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from kills import images, rounds
from kills.images import Wrong
from kills.operations import OPERATIONS
from kills.processes import PLAIN, Processes, Timing, read_log

# The same program with small steps, so that a kill meets every kind of step many times.
STEPPED = (
    "-c",
    "from safeimg.cli.main import main; from safeimg.ops.commit_job import commit\n"
    "commit.__kwdefaults__['step_bytes'] = {step}; main()",
)
STEPS = 24  # about as many data steps has a commit with small ones


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
            self.processes.finish(self.processes.start(self.commit(stepped)))
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

    @property
    def processes(self) -> Processes:
        return Processes(self.work, self.folder / "state", self.rng)

    # ---- a round

    def round(self, number: int, action: str) -> str:
        """Kills a commit and settles what is left. A line about it."""
        stepped = number % 2 == 0
        while True:
            images.copy(self.pristine, self.work)
            moment = self.processes.killed(self.commit(stepped), self.commits[stepped])
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
        return read_log(self.work / "base.qcow2.safeimg")

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
            if self.processes.killed(words, self.recovery) is None:
                break
            kills += 1
        return first, kills

    def settle(self, action: str, command: list[str]) -> None:
        """Resumes (with "again": by the identical command) or rolls back, where that can still be done."""
        started = time.monotonic()
        if action == "again":
            self.processes.finish(self.processes.start(command))
        else:
            image = self.image()
            said = self.processes.finish(self.processes.start([*PLAIN, action, image]), (0, 6))
            if "point of no return" in said:
                said = self.processes.finish(self.processes.start([*PLAIN, "resume", image]))
            if "nothing is pending" in said:  # killed before the overlay had its pointer, or when it had lost it
                self.processes.finish(self.processes.start([*PLAIN, "resume", "base.qcow2"]))
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
            self.processes.finish(self.processes.start([*PLAIN, "audit", "verify", image]))


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
    parser.add_argument("--operation", choices=("commit", *OPERATIONS, "all"), default="commit")
    parser.add_argument("--kills", type=int, default=200, help="of each operation")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--size", type=bytes_of, default=1 << 30, help="of the virtual disk: bytes, or 64M, 1G"
    )
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    options.dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="kills-", dir=options.dir))
    names = ("commit", *OPERATIONS) if options.operation == "all" else (options.operation,)
    failures = 0
    for name in names:
        started = time.monotonic()
        done: Soak | rounds.Rounds
        try:
            if name == "commit":
                done = run(folder, options.kills, options.size, options.seed)
            else:
                print(f"{name}:", flush=True)
                done = rounds.run(folder, OPERATIONS[name], options.kills, options.seed)
        except (Wrong, subprocess.CalledProcessError) as error:
            print(f"FAILED: {name}: {error}\nthe evidence is in {folder}", flush=True)
            failures += 1
            continue
        print(summary(name, done, options.kills, time.monotonic() - started), flush=True)
    if not failures:
        shutil.rmtree(folder)
    return min(failures, 1)


def summary(name: str, soak: Soak | rounds.Rounds, kills: int, seconds: float) -> str:
    """The closing lines."""
    lines = [
        f"{name}: {kills} kills in {seconds:.0f} s, {soak.recovery_kills} more of recoveries, no failure; "
        f"{soak.early} commands ended before their kill and were not counted",
        *(f"{count:6}  {outcome}" for outcome, count in sorted(soak.outcomes.items())),
        "the last event in the log when the kill came:",
        *(f"{count:6}  {phase}" for phase, count in soak.phases.most_common()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
