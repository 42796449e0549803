"""Plays the engine for planner tests: applies steps in protocol order to a real file, makes crash states of
them, and has qemu-img judge each. All files are small; the guest disk is modelled as a bytearray."""

from __future__ import annotations

import random
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from safeimg.drivers.formats.api import Changes, Placement
from safeimg.drivers.formats.qcow2.driver import driver
from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.planner import Qcow2Planner
from safeimg.drivers.storage.file import LocalFileSystem

SECTOR = 512
needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="needs qemu-img and qemu-io"
)


def run(*command: str | Path, ok: Sequence[int] = (0,)) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    output = result.stdout + result.stderr
    assert result.returncode in ok, f"{command}: {result.returncode}\n{output[-2000:]}"
    return output


def qemu_io(path: Path, *commands: str) -> None:
    """Plays the guest. QEMU refuses to compress over an allocated cluster, and goes on with the next
    command."""
    arguments = [part for command in commands for part in ("-c", command)]
    run("qemu-io", "-f", "qcow2", *arguments, path, ok=(0, 1))


def check(path: Path, *, leaks: bool) -> None:
    """`qemu-img check`: clean, or with `leaks` at worst leaked clusters."""
    run("qemu-img", "check", "-U", "-f", "qcow2", path, ok=(0, 3) if leaks else (0,))


def guest(path: Path) -> bytearray:
    """The guest disk through the whole chain, as QEMU reads it."""
    out = path.with_suffix(".guest")
    run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path, out)
    data = bytearray(out.read_bytes())
    out.unlink()
    return data


def snapshot_guest(path: Path, name: str) -> bytes:
    out = path.with_suffix(".snapshot")
    run("qemu-img", "convert", "-U", "-f", "qcow2", "-l", name, "-O", "raw", path, out)
    data = out.read_bytes()
    out.unlink()
    return data


class Write(NamedTuple):
    offset: int
    before: bytes | None  # None: nobody's bytes
    after: bytes


@dataclass
class Step:
    """What the engine would write, in its two phases."""

    first: list[Write]
    second: list[Write]
    length: int
    old_length: int


@dataclass
class Engine:
    """One image, its planner, and the model of its guest disk."""

    path: Path
    rng: random.Random
    model: bytearray = field(init=False)
    steps: list[Step] = field(default_factory=list)
    states: int = 0
    image: Qcow2Image = field(init=False)
    planner: Qcow2Planner = field(init=False)

    def __post_init__(self) -> None:
        self.model = guest(self.path)
        self.older = self.previous = bytearray(self.model)  # before the last step, and after it
        self.original = bytes(self.model)
        self.durable = bytearray(self.path.read_bytes())
        self.unsynced: list[Write] = []
        self.unlinked: list[tuple[int, int]] = []
        self.fresh: list[Write] = []
        self.in_place: list[Write] = []
        self.reopen()

    def reopen(self) -> None:
        """As after a crash: a new planner on what is on disk."""
        if self.steps:
            self.image.close()
        self.image = driver.open(LocalFileSystem().open(str(self.path), write=True), write=True, repair=True)
        self.planner = Qcow2Planner(self.image)
        self.planner.recall(self.unlinked)

    # What the operation does

    def write(self, start: int, data: bytes) -> None:
        self.model[start:start + len(data)] = data
        self._fill(self.planner.place(start, len(data)))

    def zero(self, start: int, length: int) -> None:
        visible = max(0, min(length, len(self.model) - start))
        self.model[start:start + visible] = bytes(visible)
        self._fill(self.planner.zero(start, length))

    def write_compressed(self, cluster: int, data: bytes) -> bool:
        size = self.planner.cluster_size
        data = data.ljust(size, b"\0")
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        stored = packer.compress(data) + packer.flush()
        if len(stored) >= size:
            return False
        start = cluster * size
        end = min(start + size, len(self.model))
        (offset,) = self.planner.place_compressed(start, [len(stored)])
        self.model[start:end] = data[:end - start]
        self.fresh.append(Write(offset, None, stored))
        return True

    def _fill(self, placements: Sequence[Placement]) -> None:
        for place in placements:
            data = bytes(self.model[place.start:place.start + place.length]).ljust(place.length, b"\0")
            if place.fresh:
                self.fresh.append(Write(place.offset, None, data))
            else:
                before = self._current(place.offset, place.length)
                self.in_place.append(Write(place.offset, before, data))

    def _current(self, offset: int, length: int) -> bytes:
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length).ljust(length, b"\0")

    # What the engine does

    def reserve(self, clusters: int, crashes: int = 1) -> None:
        changes = self.planner.reserve(clusters)
        if changes:
            self.apply(changes, crashes)

    def apply(self, changes: Changes, crashes: int = 1) -> None:
        """Makes a step durable, looking at crash states of both phases on the way."""
        self.unlinked += changes.unlinked
        first = [*map(Write._make, changes.allocate), *self.fresh]
        second = [*map(Write._make, changes.link), *self.in_place]
        self.fresh, self.in_place = [], []
        old_length = len(self.durable)
        length = max(old_length, changes.length or 0, *(w.offset + len(w.after) for w in (*first, *second)))
        for write in (*changes.allocate, *changes.link):
            if write.before is not None:
                there = self._current(write.offset, len(write.before))
                assert there == write.before, "before is not what is there"
        for _ in range(crashes):
            self.judge([*self.unsynced, *first], (self.older, self.previous), length)
        self.durable.extend(bytes(length - old_length))
        _write(self.durable, [*self.unsynced, *first])
        self.unsynced = second
        with self.path.open("r+b") as file:
            if length > old_length:
                file.truncate(length)
            for write in (*first, *second):
                file.seek(write.offset)
                file.write(write.after)
        for _ in range(crashes):
            self.judge(second, (self.previous, self.model), length)
        self.steps.append(Step(first, second, length, old_length))
        self.older, self.previous = self.previous, bytearray(self.model)

    def sync(self) -> None:
        """Everything up to here is durable, as it is before a step that cannot be taken back."""
        _write(self.durable, self.unsynced)
        self.unsynced = []
        self.older = self.previous

    def judge(self, unsynced: Sequence[Write], visible: Sequence[bytearray], length: int) -> None:
        """A power cut: any subset of the unsynced sectors is there."""
        self.states += 1
        disk = bytearray(self.durable)
        if len(disk) < length and self.rng.random() < 0.8:
            disk.extend(bytes(length - len(disk)))
        share = self.rng.choice((0.1, 0.5, 0.9))
        for write in unsynced:
            for start, end in _sectors(write):
                if self.rng.random() < share:
                    at = write.offset + start
                    if len(disk) < at + end - start:
                        disk.extend(bytes(at + end - start - len(disk)))
                    disk[at:at + end - start] = write.after[start:end]
        crashed = self.path.with_name("crashed.qcow2")
        crashed.write_bytes(disk)
        check(crashed, leaks=True)
        seen = guest(crashed)
        if seen in visible:
            return
        for start in range(0, len(seen), SECTOR):
            piece = seen[start:start + SECTOR]
            allowed = [disk[start:start + SECTOR] for disk in visible]
            assert piece in allowed, f"guest sector at {start:#x} is neither old nor new"

    def apply_all(self, steps: Sequence[Changes], crashes: int = 2) -> None:
        for changes in steps:
            self.apply(changes, crashes)

    def roll_back(self) -> None:
        """Every step, the last first: its second phase, then its first, then the length."""
        disk = bytearray(self.path.read_bytes())
        for step in reversed(self.steps):
            for phase in (step.second, step.first):
                undo = [(write.offset, write.before) for write in reversed(phase)]
                _write(disk, [Write(offset, None, before) for offset, before in undo if before is not None])
            del disk[step.old_length:]
        self.path.write_bytes(disk)


def _write(disk: bytearray, writes: Sequence[Write]) -> None:
    for write in writes:
        disk[write.offset:write.offset + len(write.after)] = write.after


def _sectors(write: Write) -> list[tuple[int, int]]:
    """The write cut at sector boundaries of the disk: (start, end) within it."""
    cuts = [0]
    first = SECTOR - write.offset % SECTOR
    cuts += range(first, len(write.after), SECTOR)
    return [(start, end) for start, end in pairwise([*cuts, len(write.after)])]
