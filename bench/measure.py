"""Measuring one work: both programs in turns, on images made anew, the results compared."""

from __future__ import annotations

import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sets import UNTIMED, Set
from works import Work

WARM = 3 << 30  # bytes of memory that are used and given back before each run; the size of the disk if that is more
SYNCS = "fsync,fdatasync,sync_file_range,syncfs"
KILL_AT = 0.9


class Failed(Exception):
    """A program failed, or what it made is wrong."""


@dataclass
class Runs:
    """What one program took, a number for each run. Seconds and bytes."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # at its peak
    size: int = 0  # that the result takes on disk
    syncs: int | None = None  # None: strace is not installed
    whole: float = 0.0  # what an unharmed run takes, where killed ones are measured


@dataclass
class Measured:
    work: Work
    theirs: Runs
    ours: Runs

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours.wall) / statistics.median(self.theirs.wall)

    @property
    def good(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        work = self.work
        sized = work.size_target is None or self.ours.size <= work.size_target * self.theirs.size
        return None if work.target is None else self.ratio <= work.target and sized


def measure(work: Work, made: Set, programs: Mapping[str, str], runs: int) -> Measured:
    """Raises `Failed`."""
    made.need(*work.images, *work.changes, *([work.same[1]] if work.same else []))
    results = {name: Runs() for name in programs}
    with tempfile.TemporaryDirectory(prefix="run-", dir=made.folder) as name:
        folder = Path(name)
        for number in range(runs):
            for program in sorted(programs, reverse=bool(number % 2)):
                prepare(work, made, folder)
                _time(work, made, folder, programs[program], program == "safeimg", results[program])
        for program, run in results.items():
            prepare(work, made, folder)
            run.syncs = _syncs(_words(work, programs[program], program == "safeimg"), folder)
    return Measured(work, results["qemu-img"], results["safeimg"])


def prepare(work: Work, made: Set, folder: Path) -> None:
    """The folder holds links to what is read and copies of what is changed, all of it on disk; the machine's memory is
    at hand: a virtual one has given what was free back to its host, and gets it again much more slowly."""
    for path in folder.iterdir():
        path.unlink()
    for name in work.images:
        (folder / name).symlink_to(made.folder / name)
    for name in work.changes:
        subprocess.run(["cp", "--sparse=always", made.folder / name, folder / name], check=True)
    os.sync()
    for name in (*work.images, *work.changes):  # into the page cache
        with (folder / name).open("rb") as file:
            _read(file.fileno())
    warm = max(WARM, made.size)
    touched = f"import mmap; mmap.mmap(-1, {warm})[::4096] = bytes({warm // 4096})"
    subprocess.run([sys.executable, "-c", touched], check=True)


def _read(file: int) -> None:
    buffer, at = bytearray(1 << 20), 0
    end = os.fstat(file).st_size
    while at < end:
        try:
            at = os.lseek(file, at, os.SEEK_DATA)
        except OSError:
            return
        stop = os.lseek(file, at, os.SEEK_HOLE)
        while at < stop:
            at += os.preadv(file, [buffer], at)


def _words(work: Work, program: str, own: bool) -> list[str]:
    return [program, work.words[0], *(work.ours if own else ()), *work.words[1:]]


def _time(work: Work, made: Set, folder: Path, program: str, own: bool, run: Runs) -> None:
    words = _words(work, program, own)
    if own and work.killed:
        if not run.whole:
            run.whole = _run(words, folder)[0]
            prepare(work, made, folder)
        after = run.whole * KILL_AT
        while not _killed(words, folder, after):  # this one was faster
            prepare(work, made, folder)
            after *= KILL_AT
    took, cpu, memory = _run(words, folder)
    run.wall.append(took)
    run.cpu.append(cpu)
    run.memory.append(memory)
    if work.same is not None:
        result, image = work.same
        _must_be_same(words, folder / result, made.folder / image)
        run.size = (folder / result).stat().st_blocks * 512


def _run(words: Sequence[str], folder: Path) -> tuple[float, float, int]:
    """Seconds of the clock and of processors, bytes of memory."""
    with tempfile.TemporaryFile() as told:
        began = time.perf_counter()
        child = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=told)
        _, status, used = os.wait4(child.pid, 0)
        took = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            told.seek(0)
            problem = told.read()
            if UNTIMED in problem:
                return _run(words, folder)
            raise Failed(f"{' '.join(words)}: {problem.decode().strip()}")
    return took, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def _killed(words: Sequence[str], folder: Path, after: float) -> bool:
    """Whether it was killed: not if it was done before."""
    child = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        child.wait(after)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
    code = child.wait()
    if code not in (0, -signal.SIGKILL):
        raise Failed(f"{' '.join(words)}: exit code {code}")
    return code != 0


def _must_be_same(words: Sequence[str], result: Path, image: Path) -> None:
    done = subprocess.run(["qemu-img", "compare", "-q", result, image], check=False)
    if done.returncode:
        raise Failed(f"{' '.join(words)}: {result.name} does not show what {image.name} does")


def _syncs(words: Sequence[str], folder: Path) -> int | None:
    """How often the program waits for disks, in a run of its own."""
    if shutil.which("strace") is None:
        return None
    counts = folder / "strace"
    traced = ["strace", "-f", "-c", "-o", counts, "-e", f"trace={SYNCS}", *words]
    done = subprocess.run(traced, cwd=folder, capture_output=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(words)}: {done.stderr.decode().strip()}")
    rows = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+) .*?(?:sync\w*|sync_file_range)$", counts.read_text(), re.M)
    return sum(map(int, rows))
