"""Faults that the kernel reports to real processes: calls that strace makes fail, full disks, dying ones."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path

import pytest

WRITES = "pwrite64,fallocate,ftruncate"
READS = "pread64,preadv,preadv2"
SYNCS = "fdatasync,fsync"


@cache
def _why_no_strace() -> str:
    if shutil.which("strace") is None:
        return "strace is not installed"
    harmless = ["strace", "-qq", "-o", "/dev/null", "-e", "inject=fdatasync:error=EIO", "true"]
    tried = subprocess.run(harmless, capture_output=True, check=False)
    return "" if tried.returncode == 0 else "strace may not trace here"


class Injected:
    """Calls of a process that fail, or that kill it: `under` it, `hits` says how often that happened."""

    def __init__(self, folder: Path, calls: str, what: str, *, on: Sequence[Path] = (), when: str = "1+") -> None:
        """`calls`, `what` and `when` are strace's: names of system calls, `error=EIO` or `signal=KILL`, and which of
        them, counted for each thread. `on`: only those on these files. `folder`: for the trace."""
        if _why_no_strace():
            pytest.skip(_why_no_strace())
        self._trace = folder / "trace"
        self.under = [
            "strace", "-f", "-qq", "-o", str(self._trace), "-e", f"trace={calls}",
            "-e", f"inject={calls}:{what}:when={when}", *(word for path in on for word in ("-P", str(path))),
        ]  # fmt: skip

    @property
    def hits(self) -> int:
        return self._trace.read_text(errors="replace").count("(INJECTED)")


def _run(*words: str | Path) -> str:
    """What went wrong, or nothing."""
    if shutil.which(str(words[0])) is None:
        return f"{words[0]} is not installed"
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"{' '.join(map(str, words))}: {' '.join(done.stderr.split())}"


@contextmanager
def mounted(folder: Path, *words: str) -> Iterator[Path]:
    """A folder of that path with a file system of its own, as `mount` takes it. Skips the test where nothing may be
    mounted."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount")
    if not folder.exists():
        folder.mkdir()
    problem = _run("mount", *words, folder)
    if problem:
        pytest.skip(problem)
    try:
        yield folder
    finally:
        _run("umount", "-l", folder)


def small_disk(folder: Path, size: int) -> AbstractContextManager[Path]:
    """A disk of `size` bytes."""
    return mounted(folder, "-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs")


def fill(disk: Path, room: int) -> Path:
    """Leaves so many bytes of room on the disk; the file that takes the rest."""
    filler = disk / "filler"
    filler.touch()
    found = os.statvfs(disk)
    with filler.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, max(found.f_bavail * found.f_frsize - room, 1))
    return filler


@contextmanager
def dying_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """A disk of `size` bytes with a file system in `folder`, and what makes it read-only from one moment to the next,
    as the kernel does where a disk fails; called again, it works again."""
    image = folder.with_name("disk.img")
    image.touch()
    os.truncate(image, size)
    problem = _run("mkfs.ext4", "-q", image)
    if problem:
        pytest.skip(problem)
    dead = False

    def change() -> None:
        nonlocal dead
        words = ("umount", folder) if dead else ("mount", "-o", "remount,abort", folder)
        problem = _run(*words) or (_run("mount", "-o", "loop", image, folder) if dead else "")
        dead = not dead
        assert not problem, problem

    with mounted(folder, "-o", "loop", str(image)):
        yield change
