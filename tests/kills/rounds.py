"""Real kills of one operation after another, recovered by real processes; qemu-img says what is right.

Each round: the images as built | the command, killed | as it is: nothing is worse than before, and a guest sees what
it saw, or what it will | resume, rollback or the identical command, sometimes killed too | everything that qemu-img
shows of the images is as it was, or as qemu-img's own run of the command makes it; nothing is left beside them.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kills import images
from kills.images import Wrong, img
from kills.operations import Operation
from kills.processes import PLAIN, Processes, Timing, read_log

# The same program with small steps, so that a kill meets many of them.
SMALL = (
    "-c",
    """
from safeimg.cli.main import main
from safeimg.drivers.formats.qcow2 import pieces, repair, zeroes
from safeimg.ops import rebase, resize
for module in (pieces, repair, zeroes):
    module.STEP_BYTES = 64 << 10
for function in (rebase.rebase, resize.resize):
    function.__kwdefaults__["step_bytes"] = 1 << 20
main()
""",
)
ACTIONS = ("resume", "rollback", "again", "rollback")
MARGIN = 1.2  # some kills come when the journal is gone

Shown = dict[str, Any]  # by image and property


def shown(folder: Path) -> dict[str, Shown]:
    """All that qemu-img says of the images in a folder."""
    return {image.name: _image(image) for image in sorted(folder.glob("*.qcow2"))}


def _image(image: Path) -> Shown:
    try:
        info = json.loads(img("info", "--output=json", image))
    except Wrong:
        return {"opens": False}
    for name in ("actual-size", "filename", "full-backing-filename"):  # of the file and its folder
        info.pop(name, None)
    snapshots = info.get("snapshots", ())
    for snapshot in snapshots:
        if snapshot["name"] == "new":  # taken at another time
            del snapshot["date-sec"], snapshot["date-nsec"]
    checked = json.loads(img("check", "--output=json", image, accept=(0, 2, 3)))
    return {
        "opens": True,
        **{f"check: {name}": checked.get(name, 0) for name in ("corruptions", "leaks", "check-errors")},
        **{f"info: {name}": value for name, value in info.items()},
        "content": _content(image),
        **{f"snapshot {entry['id']}": _content(image, "-l", f"snapshot.id={entry['id']}") for entry in snapshots},
    }


def _content(image: Path, *options: str) -> str:
    """A digest of what a guest sees, its length included."""
    raw = image.parent.with_name("content.raw")
    img("convert", "-t", "unsafe", *options, "-O", "raw", image, raw)
    with raw.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{raw.stat().st_size} bytes: {digest}"


def difference(found: dict[str, Shown], expected: dict[str, Shown]) -> str:
    """In words; empty if there is none."""
    lines = []
    for image in sorted({*found, *expected}):
        one, other = found.get(image), expected.get(image)
        if one is None or other is None:
            lines.append(f"{image}: {'missing' if one is None else 'not expected'}")
            continue
        for name in [name for name in {**one, **other} if one.get(name) != other.get(name)]:
            lines.append(f"{image}, {name}: {one.get(name)} instead of {other.get(name)}")
    return "; ".join(lines)


@dataclass
class Rounds:
    """Kills of one operation, in `folder`: `pristine` and `done` hold the images before and after,
    `work` those of the round."""

    folder: Path
    operation: Operation
    rng: random.Random
    phases: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    recovery_kills: int = 0
    early: int = 0  # commands that ended before the kill
    lengths: dict[str, int] = field(init=False)  # before what is killed, of each image
    before: dict[str, Shown] = field(init=False)
    after: dict[str, Shown] = field(init=False)
    startup: Timing = field(init=False)  # until the journal begins
    working: Timing = field(init=False)  # while it is there
    recovery: Timing = field(default_factory=lambda: Timing(1.0))

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.pristine, self.work = self.folder / "pristine", self.folder / "work"
        self.processes = Processes(self.work, self.folder / "state", self.rng)
        self.log = self.work / f"{self.operation.home}.safeimg"

    def prepare(self) -> None:
        """Builds the images, and runs the command unharmed: as qemu-img, and as safeimg, which is timed."""
        self.pristine.mkdir()
        self.operation.build(self.pristine, self.rng)
        self.before = shown(self.pristine)
        done = self.folder / "done"
        images.copy(self.pristine, done)
        subprocess.run(["qemu-img", *self.operation.words], cwd=done, check=True, capture_output=True)
        self.after = shown(done)
        if self.operation.undone:
            self.before, self.after = self.after, self.before
        if self.before == self.after:
            raise Wrong(f"{self.operation.name} changes nothing that is seen")
        self.ready()
        started = time.monotonic()
        process = self.processes.start(self.command(True))
        seen = []  # when the journal was there
        while process.poll() is None:
            if self.log.exists():
                seen.append(time.monotonic())
            time.sleep(0.0005)
        self.processes.finish(process)
        if not seen:
            raise Wrong(f"{self.operation.name} has no journal")
        self.startup, self.working = Timing(seen[0] - started), Timing((seen[-1] - seen[0]) * MARGIN)
        self.settled_as("after")

    def ready(self) -> None:
        """The images as they are before what is killed, in `work`."""
        images.copy(self.pristine, self.work)
        if self.operation.undone:
            self.processes.finish(self.processes.start([*PLAIN, *self.operation.words]))
        self.lengths = {path.name: path.stat().st_size for path in self.work.glob("*.qcow2")}

    def command(self, small: bool) -> list[str]:
        words = ("undo", self.operation.home) if self.operation.undone else self.operation.words
        return [*(SMALL if small else PLAIN), *words]

    # ---- a round

    def round(self, number: int, action: str) -> str:
        """Kills the command and settles what is left. A line about it."""
        small = number % 4 != 0
        while True:
            self.ready()
            begun = number % 8 != 0  # the others are killed before, or at the very beginning
            moment = self.processes.killed(
                self.command(small), self.working if begun else self.startup, begun=self.log if begun else None
            )
            if moment is not None:
                break
            self.early += 1
        phase = read_log(self.log)[0]
        images.copy(self.work, self.folder / "crashed", durable=False)
        self.as_it_is()
        expected, kills = self.recover(action, small)
        self.settled_as(expected)
        self.phases[phase] += 1
        self.outcomes[f"{action}: {expected}"] += 1
        self.recovery_kills += kills
        again = f", killed {kills} times" if kills else ""
        return f"{moment:7.3f} s  {'small' if small else 'plain'}  {phase:<32} {action}{again}: as {expected}"

    def as_it_is(self) -> None:
        """G1, while the images lie as the kill left them."""
        now = shown(self.work)
        for image, old in self.before.items():
            new, done = now.get(image), self.after[image]
            if new is None or not new["opens"]:
                raise Wrong(f"as the kill left it, {image} cannot be opened")
            for name in ("check: corruptions", "check: check-errors"):
                if new[name] > old[name]:
                    raise Wrong(f"as the kill left it, {image}, {name}: {new[name]}")
            if image not in self.operation.through and new["content"] not in (old["content"], done["content"]):
                raise Wrong(f"as the kill left it, {image} shows neither what it did nor what it will")

    def recover(self, action: str, small: bool) -> tuple[str, int]:
        """Settles, after a few more kills. With what is to be expected, and how often recovery was killed.

        A resume that was killed may be followed by a rollback, never the other way round."""
        first = "resume" if action == "rollback" and self.rng.random() < 0.2 else action
        kills = 0
        for _ in range(self.rng.choice((0, 0, 1, 2))):
            if not self.log.exists() or self.decided():
                break
            if self.processes.killed(self.settling(first, small), self.recovery) is None:
                break
            kills += 1
        expected = self.decided()
        if not expected:
            expected = "before" if action == "rollback" else "after"
            if not self.log.exists():  # it never began
                expected = self.begin(small) if action == "again" else self.untouched(small)
                return expected, kills
        elif action == "again":
            if expected == "before":
                expected = "after"  # it had not begun: it begins anew
            else:
                action = "resume"  # done: the command would do it once more
        started = time.monotonic()
        said = self.processes.finish(self.processes.start(self.settling(action, small)), (0, 6))
        if "point of no return" in said:
            self.processes.finish(self.processes.start(self.settling("resume", small)))
        self.recovery.learn(time.monotonic() - started)
        return expected, kills

    def decided(self) -> str:
        """What alone can be reached: "before", "after", or "" if either can."""
        if not self.log.exists():
            now = shown(self.work)
            return "after" if not difference(now, self.after) else ""
        expected = read_log(self.log)[1]
        return "" if expected == "undecided" else expected

    def begin(self, small: bool) -> str:
        self.processes.finish(self.processes.start(self.command(small)))
        return "after"

    def untouched(self, small: bool) -> str:
        """Nothing began, and nothing is there to settle. A new image may be half there: it is made anew."""
        target = self.operation.target
        if target is not None and (self.work / target).exists():
            return self.begin(small)
        return "before"

    def settling(self, action: str, small: bool) -> list[str]:
        program = SMALL if small else PLAIN
        return self.command(small) if action == "again" else [*program, action, self.operation.home]

    def settled_as(self, expected: str) -> None:
        """Everything is as before the command, or as behind one that nobody killed."""
        left = sorted(path.name for path in self.work.iterdir() if path.suffix != ".qcow2")
        if left:
            raise Wrong(f"left beside the images: {left}")
        wrong = difference(shown(self.work), self.before if expected == "before" else self.after)
        if wrong:
            raise Wrong(f"not as {expected}: {wrong}")
        for image in self.before:
            length = (self.work / image).stat().st_size
            if expected == "before" and length != self.lengths[image]:
                raise Wrong(f"{image}: {length} bytes long, it had {self.lengths[image]}")
        for path in self.work.iterdir():
            self.processes.finish(self.processes.start([*PLAIN, "audit", "verify", path.name]))


def run(folder: Path, operation: Operation, kills: int, seed: int, *, quiet: bool = False) -> Rounds:
    """Raises `Wrong` at the first failure."""
    rounds = Rounds(folder / operation.name, operation, random.Random(f"{operation.name} {seed}"))
    rounds.prepare()
    actions = (list(ACTIONS) * (kills // len(ACTIONS) + 1))[:kills]
    rounds.rng.shuffle(actions)
    for number, action in enumerate(actions, 1):
        started = time.monotonic()
        line = rounds.round(number, action)
        if not quiet:
            print(f"{number:4}  {line}  ({time.monotonic() - started:.1f} s)", flush=True)
    return rounds
