"""Judges crash states of operations against the promises G1 to G4 of the design.

For each state: as it is (G1), after `resume` (G2), after `rollback` (G3); recovery itself can be crashed again, from a
state that only a killed process left (its writes not synced) as well as after a power cut.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio
from blake3 import blake3
from powercut import guest
from safeimg.drivers.errors import DriverError
from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.chain import close_chain
from safeimg.drivers.formats.features import BitmapState
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.formats.snapshots import entries, load
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.powercut import CrashState, crash_states, power_cut
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.drivers.transfer.core import Settings, Transfer
from safeimg.drivers.transfer.view import View
from safeimg.journal import find
from safeimg.journal.errors import JournalError
from safeimg.journal.history import MemoryHistory
from safeimg.journal.log import read_events
from safeimg.journal.state import fold
from safeimg.ops.bitmap_plan import listed
from safeimg.ops.errors import Impossible, OperationError, SomethingPending
from safeimg.ops.info import snapshot_members
from safeimg.ops.launch import Environment
from safeimg.ops.session import refuse_pending_on
from safeimg.recovery.pending import NothingPending
from safeimg.recovery.settle import resume, rollback

NO_CHECKS = 63  # qemu-img check's exit code for an image that opens, and whose format has none
STEP_BYTES = 16384  # of guest data: several steps even where images are small


class Violation(AssertionError):
    """A promise that a crash state breaks; the message replays it."""


def environment(fs: SimulatedFileSystem, secrets: Secrets = guest.SECRETS) -> Environment:
    return Environment(fs, MemoryHistory(), Transfer(Settings(workers=1)), arguments=("test",), secrets=secrets)


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
    broken: bool = False  # the images are damaged, and the operation repairs them
    kept: bool = True  # what is overwritten is, so that rollback is possible

    def prepare(self) -> SimulatedFileSystem:
        fs = SimulatedFileSystem()
        self.build(fs)
        return power_cut(fs, "all")

    def execute(self, fs: SimulatedFileSystem) -> None:
        async def main() -> None:
            await self.run(environment(fs))

        trio.run(main)


@dataclass(frozen=True)
class Look:
    """What a user can tell of an image: all that a rollback restores and a resume reaches."""

    content: bytes
    size: int
    backing: tuple[str | None, str | None]
    leaks: int
    bitmaps: tuple[tuple[BitmapState, bytes], ...]
    details: object
    snapshots: object  # what is listed of each, and its content
    mistakes: int  # in the metadata; none is allowed but of images that were `broken` before

    @classmethod
    def at(cls, fs: SimulatedFileSystem, path: str, fmt: str, *, broken: bool = False) -> Look:
        """What `path` shows; remembered, since many crash states share their images."""
        hasher = blake3(path.encode() + bytes([broken]))
        for name in sorted(fs.list_directory("/")):
            if "." in name and ".safeimg" not in name:
                hasher.update(name.encode() + b"\0" + fs.read_file("/" + name))
        key = hasher.digest()
        if key not in _LOOKS:
            _LOOKS[key] = cls._at(fs, path, fmt, broken)
        return _LOOKS[key]

    @classmethod
    def _at(cls, fs: SimulatedFileSystem, path: str, fmt: str, broken: bool) -> Look:
        chain = guest.opened(fs, path, fmt)
        try:
            data = cls._content(chain)
            driver = lookup(fmt)
            leaks = mistakes = 0
            found = driver.check(chain[0])
            if found is not None:
                lost = _lost_blocks(fmt, "\n".join(found.messages))
                leaks = found.leaks + lost
                if broken:
                    mistakes = found.corruptions + found.check_errors
                elif found.corruptions != bool(lost) or found.check_errors:
                    raise Violation(f"{path}: {found.messages}")
            backing = chain[0].backing_file, chain[0].backing_format
            snapshots = [
                (snapshot_members(entry), entry.disk_size, cls._content(load(chain, f"snapshot.id={entry.id}")))
                for entry in entries(chain[0])
            ]
            bitmaps = tuple((state, _bits(chain[0], state)) for state in listed(chain[0]))
            details = driver.specific_info(chain[0])
            return cls(data, chain[0].size, backing, leaks, bitmaps, details, snapshots, mistakes)
        finally:
            close_chain(chain)

    @staticmethod
    def _content(chain: Sequence[Image]) -> bytes:
        view = View(chain)
        data = bytearray(view.size)
        view.read_into(0, memoryview(data))
        return bytes(data)


_LOOKS: dict[bytes, Look] = {}


def _lost_blocks(fmt: str, messages: str) -> int:
    """Blocks that a VDI image counts and does not refer to, if that is all that is wrong: what a leak is elsewhere is
    an error in the words of its check."""
    found = re.fullmatch(r"ERROR: allocated blocks mismatch, is (\d+), should be (\d+)\n?", messages)
    return 0 if fmt != "vdi" or found is None else max(0, int(found[2]) - int(found[1]))


def _bits(image: Image, state: BitmapState) -> bytes:
    """All bits of a bitmap; of an inconsistent one they mean nothing."""
    feature = lookup(image.format).bitmaps
    if feature is None or state.inconsistent:
        return b""
    return feature.bits(image, state.name).read(0, -(-image.size // (8 * state.granularity)))


@dataclass
class Counter:
    """How much was judged."""

    states: int = 0
    resumed: int = 0
    rolled_back: int = 0
    refused: int = 0
    nothing: int = 0
    second: int = 0
    qemu: int = 0

    def add(self, other: Counter) -> None:
        for name in ("states", "resumed", "rolled_back", "refused", "nothing", "second", "qemu"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        return (
            f"{self.states} states: {self.resumed} resumed, {self.rolled_back} rolled back, "
            f"{self.refused} past return, {self.nothing} nothing pending; "
            f"{self.second} of crashed recoveries; {self.qemu} by qemu-img"
        )


@dataclass
class Judge:
    """Holds what is expected: `before` and `after` by path, from an uninterrupted run."""

    scenario: Scenario
    initial: SimulatedFileSystem = field(init=False)
    before: dict[str, Look | None] = field(init=False)
    after: dict[str, Look] = field(init=False)
    trace_of: SimulatedFileSystem = field(init=False)
    counter: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        fs = self.scenario.prepare()
        self.before = {
            path: self._look(fs, path, fmt) if fs.stat(path) is not None and not self.scenario.created else None
            for path, fmt in self.scenario.images
        }
        self.initial = fs.begin_trace()
        self.scenario.execute(fs)
        self.trace_of = fs
        self.after = {path: Look.at(fs, path, fmt) for path, fmt in self.scenario.images}
        leftovers = sidecars(fs)
        if leftovers:
            raise Violation(f"an uninterrupted run left {leftovers}")

    def _look(self, fs: SimulatedFileSystem, path: str, fmt: str) -> Look:
        return Look.at(fs, path, fmt, broken=self.scenario.broken)

    def states(self, **options: object) -> Iterator[CrashState]:
        return crash_states(self.initial, self.trace_of.trace, **options)  # type: ignore[arg-type]

    def judge(self, state: CrashState, *, qemu: Path | None = None) -> None:
        """Raises `Violation`."""
        self.counter.states += 1
        try:
            self._as_it_is(state.fs.clone())
            self.settles(state.fs, "resume")
            self.settles(state.fs, "rollback")
            if qemu is not None:
                self._qemu(state.fs, qemu)
        except (Violation, DriverError, JournalError, OperationError) as error:
            raise Violation(f"{self.scenario.name}: {state.description}\n  {type(error).__name__}: {error}") from error

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

    def _is_guarded(self, fs: SimulatedFileSystem) -> None:
        """G4: while the operation is pending every image that it changes is refused, here and by QEMU's rules."""
        found = find.find(fs, self.scenario.home)
        if not isinstance(found, find.LogFound) or not found.started or found.outcome is not None:
            return
        live = fold(read_events(fs, found.path)).steps
        for path, fmt in self.scenario.images:
            try:
                refuse_pending_on(fs.clone(), path)
            except SomethingPending:
                pass
            else:
                raise Violation(f"G4: a change of {path} is not refused")
            changed = any(step.prepared.name not in ("fence", "reserve") for step in live)
            if changed and not self._is_fenced(fs, path, fmt):
                raise Violation(f"G4: {path} is half-changed and not fenced")

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
        """G2 or G3 on a copy of `fs`, which is returned with the trace of the recovery."""
        fs = fs.clone()
        act = resume if action == "resume" else rollback
        secrets = guest.SECRETS if action == "resume" else NO_SECRETS  # taking back needs none

        async def main() -> str:
            return await act(self.scenario.home, environment(fs, secrets))

        fs.begin_trace()
        try:
            done = trio.run(main)
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
        if not (self.scenario.created and "had not begun" in done and self._unfinished(fs)):
            self._settled(fs, "after" if "finished" in done or "completed" in done else "before", action)
        return fs

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

    def crash_again(self, state: CrashState, *, seed: int, count: int) -> None:
        """Recovery itself is crashed: whatever it leaves can be settled again, as by the first crash."""
        for action in ("resume", "rollback"):
            fs = state.fs.clone()
            initial = fs.clone()
            try:
                recovery = self.settles(fs, action)
            except (Violation, DriverError, JournalError, OperationError) as error:
                raise Violation(f"{self.scenario.name}: {state.description}, {action}: {error}") from error
            again = crash_states(
                initial, recovery.trace, seed=seed, prefixes=count, subsets_per_prefix=1, singles_per_prefix=1
            )
            for second in again:
                self.counter.second += 1
                try:
                    self._as_it_is(second.fs.clone())
                    self._settle_somehow(second.fs, action)
                except (Violation, DriverError, JournalError, OperationError) as error:
                    raise Violation(
                        f"{self.scenario.name}: {state.description}\n  then {action}: {second.description}\n"
                        f"  {type(error).__name__}: {error}"
                    ) from error

    def _settle_somehow(self, fs: SimulatedFileSystem, action: str) -> None:
        """A resume that was crashed can be resumed or rolled back; a rollback that was crashed, rolled back."""
        self.settles(fs, "rollback")
        if action == "resume":
            self.settles(fs, "resume")

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
            if fmt == "raw":
                continue
            named = f"driver={fmt},file.filename={folder / path[1:]}"
            named += _beside(fs, path, "", folder)
            if path == "/top.qcow2":
                named += "".join(_beside(fs, f"/base.{name}", "backing.", folder) for name in ("qcow2", "luks"))
            words = ["--object", "secret,id=s0,data=hunter2", "--image-opts", named]
            result = subprocess.run(["qemu-img", "check", "-U", *words], capture_output=True, text=True, check=False)
            allowed = (0, 1, 2, 3) if self.scenario.broken else (0, 3, NO_CHECKS)
            if result.returncode not in allowed and not _lost_blocks(fmt, result.stderr):
                raise Violation(f"G1: qemu-img check {path}: {result.stdout}{result.stderr}")


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


def sidecars(fs: SimulatedFileSystem) -> Sequence[str]:
    return [name for name in fs.list_directory("/") if ".safeimg" in name]
