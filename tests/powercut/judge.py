"""Judges crash states of operations against the promises G1 to G4 of the design.

For each state: as it is (G1), after `resume` (G2), after `rollback` (G3), each of which has to outlive a power cut.
Recovery itself can be crashed again, from a state that only a killed process left (its writes not synced) as well as
after a power cut. States that are the same, to the last byte, time and unsynced change, are judged once.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from powercut import guest, straight
from powercut.look import SIDECAR, Look, Violation, lost_blocks, sidecars, state_digest, unsynced_digest
from safeimg.drivers.errors import DriverError
from safeimg.drivers.formats.chain import close_chain
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.powercut import CrashState, crash_states, power_cut
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.drivers.transfer.core import Settings
from safeimg.journal import find
from safeimg.journal.errors import JournalError
from safeimg.journal.history import MemoryHistory
from safeimg.journal.log import read_events
from safeimg.journal.state import fold
from safeimg.ops.errors import Impossible, OperationError, SomethingPending
from safeimg.ops.launch import Environment
from safeimg.ops.session import refuse_pending_on
from safeimg.recovery.pending import NothingPending
from safeimg.recovery.settle import resume, rollback

NO_CHECKS = 63  # qemu-img check's exit code for an image that opens, and whose format has none
STEP_BYTES = 16384  # of guest data: several steps even where images are small
CLEAN = (DriverError, JournalError, OperationError)  # what an operation or a recovery may end with


def environment(fs: SimulatedFileSystem, secrets: Secrets = guest.SECRETS) -> Environment:
    transfer = straight.StraightTransfer(Settings(workers=1))
    return Environment(fs, MemoryHistory(), transfer, arguments=("test",), secrets=secrets)


@dataclass(frozen=True)
class Scenario:
    """An operation on images in a simulated file system."""

    name: str
    build: Callable[[SimulatedFileSystem], None]
    run: Callable[[Environment], Awaitable[None]]
    home: str  # the image that recovery is called for
    top: str | None  # the image whose guest content is at any time that before or that after (G1), if there is one
    images: tuple[tuple[str, str], ...]  # path and format of all images written
    created: bool = False  # the home image is made by the operation
    bare: bool = False  # it keeps no journal: begun again, it comes to the same
    broken: bool = False  # the images are damaged, and the operation repairs them
    breaks: bool = False  # …and are damaged afterwards, still or again
    kept: bool = True  # what is overwritten is, so that rollback is possible
    shows: bool = False  # what `top` shows is meant to become another

    def prepare(self) -> SimulatedFileSystem:
        fs = SimulatedFileSystem()
        with straight.alone():
            self.build(fs)
        return power_cut(fs, "all")

    def execute(self, fs: SimulatedFileSystem) -> None:
        async def main() -> None:
            await self.run(environment(fs))

        straight.run(main)


@dataclass
class Counter:
    """How much was judged: crash states of the operation, and of its recoveries; each counts once."""

    states: int = 0
    second: int = 0  # of recoveries that were crashed
    deeper: int = 0  # of recoveries that were crashed again and again until they finished
    failed: int = 0  # after a sync that failed, in the operation or in a recovery
    repeated: int = 0  # the same as one judged before, and not counted
    resumed: int = 0
    rolled_back: int = 0
    refused: int = 0
    nothing: int = 0
    qemu: int = 0

    @property
    def total(self) -> int:
        return self.states + self.second + self.deeper + self.failed

    def add(self, other: Counter) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def __str__(self) -> str:
        return (
            f"{self.total} states ({self.states} of the operation, {self.second} of crashed recoveries, "
            f"{self.deeper} crashed until they finish, {self.failed} after failed syncs; {self.repeated} repeated): "
            f"{self.resumed} resumed, {self.rolled_back} rolled back, {self.refused} past return, "
            f"{self.nothing} nothing pending; {self.qemu} by qemu-img"
        )


class Leg(NamedTuple):
    """Part of how a state came about: what ran, and the crash that ended it."""

    action: str  # "run", "resume", "rollback"
    failing: int  # which of its syncs failed; 0: none
    crash: str  # the crash state, as `powercut.replay` takes it

    def __str__(self) -> str:
        action = self.action + (f"!{self.failing}" if self.failing else "")  # as `explore.parse` reads it
        return self.crash if action == "run" else f"{action}: {self.crash}"


@dataclass
class Judge:
    """Holds what is expected: `before` and `after` by path, from an uninterrupted run."""

    scenario: Scenario
    initial: SimulatedFileSystem = field(init=False)
    before: dict[str, Look | None] = field(init=False)
    after: dict[str, Look] = field(init=False)
    trace_of: SimulatedFileSystem = field(init=False)
    counter: Counter = field(default_factory=Counter)
    seen: set[bytes] = field(default_factory=set)  # digests of the states judged
    _replaced: dict[str, Look] = field(default_factory=dict)  # what is there and makes room for a new image
    _pending: dict[bytes, bool | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fs = self.scenario.prepare()
        self.before = {
            path: self._look(fs, path, fmt) if fs.stat(path) is not None and not self.scenario.created else None
            for path, fmt in self.scenario.images
        }
        if self.scenario.bare:
            there = [each for each in self.scenario.images if fs.stat(each[0]) is not None]
            self._replaced = {path: self._look(fs, path, fmt) for path, fmt in there}
        self.initial = fs.begin_trace()
        self.scenario.execute(fs)
        self.trace_of = fs
        broken = self.scenario.breaks
        self.after = {path: Look.at(fs, path, fmt, broken=broken) for path, fmt in self.scenario.images}
        leftovers = sidecars(fs)
        if leftovers:
            raise Violation(f"an uninterrupted run left {leftovers}")
        top = self.scenario.top
        before = None if top is None else self.before[top]
        if before is not None and (before.content == self.after[top or ""].content) == self.scenario.shows:
            raise Violation(f"an uninterrupted run changes what {top} shows, or should and does not")

    def _look(self, fs: SimulatedFileSystem, path: str, fmt: str) -> Look:
        return Look.at(fs, path, fmt, broken=self.scenario.broken)

    def states(self, **options: object) -> Iterator[CrashState]:
        return crash_states(self.initial, self.trace_of.trace, **options)  # type: ignore[arg-type]

    def judge(self, state: CrashState, *, qemu: Path | None = None) -> None:
        """Judges a crash state of the operation. Raises `Violation`."""
        self.counter.states += self.judged(state.fs, [Leg("run", 0, state.description)], qemu=qemu)

    def judged(self, fs: SimulatedFileSystem, legs: Sequence[Leg], *, qemu: Path | None = None) -> bool:
        """Judges a state, unless one like it was. `legs`: how it came about. Raises `Violation`.

        What a resume was crashed in can be resumed or rolled back; once a rollback has begun, only a rollback
        settles."""
        back = any(leg.action == "rollback" for leg in legs)
        key = state_digest(fs) + unsynced_digest(fs)
        full, half = (hashlib.blake2b(key + end, digest_size=8).digest() for end in (b"", b"back"))
        if full in self.seen or (back and half in self.seen):
            self.counter.repeated += 1
            return False
        self.seen.add(half if back else full)
        try:
            if self.scenario.bare:
                self._begins_again(fs)
            else:
                self._as_it_is(fs.clone())
                self.settles(fs, "rollback")
                if not back:
                    self.settles(fs, "resume")
            if qemu is not None:
                self._qemu(fs, qemu)
        except (Violation, *CLEAN) as error:
            raise self.violation(legs, error) from error
        return True

    def violation(self, legs: Sequence[Leg], error: Exception) -> Violation:
        return Violation(f"{self.name_of(legs)}\n  {type(error).__name__}: {error}", tuple(legs))

    def name_of(self, legs: Sequence[Leg]) -> str:
        return f"{self.scenario.name}: " + "\n  > ".join(map(str, legs))

    def _as_it_is(self, fs: SimulatedFileSystem) -> None:
        """G1: everything opens, nothing is wrong but leaks, and the top shows what it did before or will afterwards."""
        for path, fmt in self.scenario.images:
            if self.scenario.created:
                continue  # fenced, or refused, until it is finished
            look = self._look(fs, path, fmt)
            if path == self.scenario.top:
                expected = self.before[path]
                if expected is not None and look.content not in (expected.content, self.after[path].content):
                    raise Violation(f"G1: {path} shows other content")
        self._is_guarded(fs)

    def _begins_again(self, fs: SimulatedFileSystem) -> None:
        """What an operation without a journal leaves is no image, the whole one or that before, or (where it changes
        one) one that opens; the same command completes it."""
        fs = fs.clone()
        for path, fmt in self.scenario.images:
            if fs.stat(path) is None or fmt == "raw":
                continue
            try:
                look = self._look(fs, path, fmt)
            except DriverError:
                if self.scenario.created:
                    continue
                raise
            if self.scenario.created and look not in (self.after[path], self._replaced.get(path)):
                raise Violation(f"{path} is not finished and taken for an image")
        self.scenario.execute(fs)
        if self.scenario.created:
            self._settled(fs, "after", "the same command")
            self.lasts(fs, "after")
        else:  # space that nobody refers to may be left
            path, fmt = self.scenario.images[0]
            look = self._look(power_cut(fs, "none"), path, fmt)
            if (look.content, look.size) != (self.after[path].content, self.after[path].size):
                raise Violation(f"after the same command: {path} shows something else")

    def _is_guarded(self, fs: SimulatedFileSystem) -> None:
        """G4: while the operation is pending every image that it changes is refused, here and by QEMU's rules."""
        key = state_digest(fs, lambda path: SIDECAR in path, times=False)  # images change, the log mostly not
        key += repr([fs.stat(path) is not None for path, _ in self.scenario.images]).encode()
        if key not in self._pending:
            self._pending[key] = self._refuses(fs)
        if self._pending[key]:
            for path, fmt in self.scenario.images:
                if not self._is_fenced(fs, path, fmt):
                    raise Violation(f"G4: {path} is half-changed and not fenced")

    def _refuses(self, fs: SimulatedFileSystem) -> bool:
        """Whether an operation is pending that has changed images. `Violation` if one of them would be taken."""
        found = find.find(fs, self.scenario.home)
        if not isinstance(found, find.LogFound) or not found.started or found.outcome is not None:
            return False
        for path, _ in self.scenario.images:
            try:
                with straight.alone():
                    refuse_pending_on(fs.clone(), path)
            except SomethingPending:
                pass
            else:
                raise Violation(f"G4: a change of {path} is not refused")
        live = fold(read_events(fs, found.path)).steps
        return any(step.prepared.name not in ("fence", "reserve") for step in live)

    def _is_fenced(self, fs: SimulatedFileSystem, path: str, fmt: str) -> bool:
        if fs.stat(path) is None:
            return True  # a rollback has removed it and was stopped
        if fmt != "qcow2" or fs.read_file(path)[4:8] == bytes([0, 0, 0, 2]):
            return True  # there is no fence in this format
        try:
            close_chain(guest.opened(fs, path, fmt, backing=False, write=True))
        except DriverError:
            return True
        return False

    def settles(self, fs: SimulatedFileSystem, action: str) -> SimulatedFileSystem:
        """G2 or G3 on a copy of `fs`, which is returned with the trace of the recovery. What is settled has to last."""
        fs = fs.clone()
        fs.begin_trace()
        try:
            done = self.attempt(fs, action)
        except NothingPending:
            self.counter.nothing += 1
            if not (self.scenario.created and self._unfinished(fs)):
                self._settled(fs, self._side(fs, action), action)
            return fs
        except Impossible:
            if action == "resume":
                raise
            self.counter.refused += 1
            return fs
        if action == "resume":
            self.counter.resumed += 1
        else:
            self.counter.rolled_back += 1
        self.acknowledged(fs, action, done)
        return fs

    def acknowledged(self, fs: SimulatedFileSystem, action: str, done: str) -> None:
        """What an operation or a recovery reports, in the words of `done`, is so, and lasts."""
        if not (self.scenario.created and "had not begun" in done and self._unfinished(fs)):
            side = "after" if "finished" in done or "completed" in done else "before"
            self._settled(fs, side, action)
            self.lasts(fs, side)

    def attempt(self, fs: SimulatedFileSystem, action: str) -> str:
        """Settles what is pending on `fs` itself; what was done."""
        act = resume if action == "resume" else rollback
        secrets = guest.SECRETS if action == "resume" else NO_SECRETS  # taking back needs none

        async def main() -> str:
            return await act(self.scenario.home, environment(fs, secrets))

        return straight.run(main)

    def lasts(self, fs: SimulatedFileSystem, side: str) -> None:
        """What was settled is there after a power cut too."""
        self._settled(power_cut(fs, "none"), side, "a power cut")

    def _unfinished(self, fs: SimulatedFileSystem) -> bool:
        """Before its journal begins, an operation that makes an image leaves what nobody takes for one: QEMU's tools
        refuse it (its feature bit or version says so), unless it is raw, which has no such thing."""
        path, fmt = self.scenario.images[0]
        if fs.stat(path) is None or fmt == "raw":
            return True
        try:
            close_chain(guest.opened(fs, path, fmt))
        except DriverError:
            return True
        return False

    def crash_again(self, state: CrashState, *, seed: int, count: int | Sequence[int]) -> None:
        """Recovery itself is crashed: whatever it leaves can be settled again, as by the first crash. `count`: after
        how many of its calls, or which."""
        for action in ("resume", "rollback"):
            first = Leg("run", 0, state.description)
            try:
                recovery = self.settles(state.fs, action)
            except (Violation, *CLEAN) as error:
                raise self.violation([first], error) from error
            again = crash_states(
                state.fs, recovery.trace, seed=seed, prefixes=count, subsets_per_prefix=1, singles_per_prefix=1
            )
            for second in again:
                self.counter.second += self.judged(second.fs, [first, Leg(action, 0, second.description)])

    def _side(self, fs: SimulatedFileSystem, action: str) -> str:
        """Whether the images are as before, or as after."""
        for side in ("before", "after"):
            if all(self._fits(fs, path, fmt, side) for path, fmt in self.scenario.images):
                return side
        raise Violation(f"{action}: the images are neither as before nor as after")

    def _settled(self, fs: SimulatedFileSystem, side: str, action: str) -> None:
        """Every image is as it should be, and nothing is left beside them."""
        leftovers = sidecars(fs)
        if leftovers:
            raise Violation(f"after {action}: {leftovers} left")
        for path, fmt in self.scenario.images:
            if not self._fits(fs, path, fmt, side):
                raise Violation(f"after {action}: {path} is not as {side}")

    def _fits(self, fs: SimulatedFileSystem, path: str, fmt: str, side: str) -> bool:
        if side == "before" and self.scenario.created:
            return fs.stat(path) is None
        expected = self.before[path] if side == "before" else self.after[path]
        return fs.stat(path) is not None and self._look(fs, path, fmt) == expected

    def _qemu(self, fs: SimulatedFileSystem, folder: Path) -> None:
        """The second opinion on the state as it is."""
        if self.scenario.created or shutil.which("qemu-img") is None:
            return
        self.counter.qemu += 1
        for name in fs.list_directory("/"):
            if "." in name and not name.endswith((".safeimg", "-undo", "-new")):
                fs.export_file("/" + name, str(folder / name))
        for path, fmt in self.scenario.images:
            if fmt == "raw" or _leads_elsewhere(fs, path):
                continue
            named = f"driver={fmt},file.filename={folder / path[1:]}"
            named += _beside(fs, path, "", folder)
            if path == "/top.qcow2":
                named += "".join(_beside(fs, f"/base.{name}", "backing.", folder) for name in ("qcow2", "luks"))
            words = ["--object", "secret,id=s0,data=hunter2", "--image-opts", named]
            result = subprocess.run(["qemu-img", "check", "-U", *words], capture_output=True, text=True, check=False)
            allowed = (0, 1, 2, 3) if self.scenario.broken else (0, 3, NO_CHECKS)
            if result.returncode not in allowed and not lost_blocks(fmt, [result.stderr]):
                raise Violation(f"G1: qemu-img check {path}: {result.stdout}{result.stderr}")


def _leads_elsewhere(fs: SimulatedFileSystem, path: str) -> bool:
    """Whether a qcow2 image names its backing image absolutely: exported, it would not find it."""
    head = fs.read_file(path)[:4096] if fs.stat(path) is not None else b""
    at = int.from_bytes(head[8:16], "big")
    return head[:4] == b"QFI\xfb" and 0 < at < len(head) and head[at : at + 1] == b"/"


def _beside(fs: SimulatedFileSystem, path: str, prefix: str, folder: Path) -> str:
    """The options that an image takes to be opened: its secret, and where its data file was exported to."""
    head = fs.read_file(path)[:80] if fs.stat(path) is not None else b""
    if head[:4] == b"LUKS":
        return f",{prefix}key-secret=s0"
    if head[:4] != b"QFI\xfb":
        return ""
    key = f",{prefix}encrypt.key-secret=s0" if head[32:36].strip(b"\0") else ""
    outside = head[4:8] == bytes([0, 0, 0, 3]) and head[79] & 4
    return key + (f",{prefix}data-file.filename={folder / 'data.bin'}" if outside else "")

