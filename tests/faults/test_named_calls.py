"""Calls that do less than they were asked to, are interrupted or kill; signals, races and clocks: on real processes."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.injecting import READS, SYNCS, WRITES, Injected
from faults.running import COMMIT, PROGRAM, SLOW, Folder
from safeimg.journal.events import Declared, Paused, StepPrepared

Folders = Callable[..., Folder]
needs_qemu_io = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")

# A kernel that never does more than some odd number of bytes at once, and less the next time.
SHORT = """
import itertools, os
sizes = itertools.cycle((511, 4097, 65535, 1, 300001))
def cut(call):
    def less(fd, data, *rest):
        size = next(sizes)
        if isinstance(data, list):
            return call(fd, [memoryview(data[0])[:size]], *rest)
        return call(fd, data[:size], *rest)
    return less
"""
SHORT_WRITES = SHORT + "os.pwrite = cut(os.pwrite)\n" + PROGRAM
SHORT_READS = (
    SHORT + "os.preadv = cut(os.preadv); whole = os.pread\n"
    "os.pread = lambda fd, length, offset: whole(fd, min(length, next(sizes)), offset)\n" + PROGRAM
)


def test_short_writes(folder: Folder) -> None:
    folder.killed(program=SHORT_WRITES)
    folder.settles_both_ways(program=SHORT_WRITES)


def test_short_reads(folders: Folders, tmp_path: Path) -> None:
    folder = folders(tmp_path, "base.qcow2")
    folder.killed(program=SHORT_READS)
    folder.settles_both_ways(program=SHORT_READS)


def test_interrupted_calls(folders: Folders, tmp_path: Path) -> None:
    """EINTR, every second time, of everything that reads, writes, syncs and locks."""
    folder = folders(tmp_path, "base.qcow2")
    files = [tmp_path / name for name in ("top.qcow2", "base.qcow2", "base.qcow2.safeimg", "base.qcow2.safeimg-undo")]
    fault = Injected(tmp_path, f"{READS},{WRITES},{SYNCS},flock,openat", "error=EINTR", on=files, when="1+2")
    assert folder.done(*COMMIT, under=fault.under) == "Image committed.\n"
    assert fault.hits > 50
    assert folder.shown(folder.base) == folder.shown(folder.top) == folder.new and folder.left() == []


@pytest.mark.parametrize(
    ("file", "calls", "when"), [("base.qcow2.safeimg", SYNCS, "5"), ("top.qcow2", "pwrite64", "2")]
)
def test_sigkill_within_a_call(folders: Folders, tmp_path: Path, file: str, calls: str, when: str) -> None:
    folder = folders(tmp_path, "base.qcow2")
    fault = Injected(tmp_path, calls, "signal=KILL", on=[tmp_path / file], when=when)
    code, out, err = folder.ends(*COMMIT, under=fault.under)
    assert (code, out, err) == (-signal.SIGKILL, "", "")
    folder.settles_both_ways()


def test_sighup(folder: Folder) -> None:
    """Pauses at the end of a step, as SIGINT and SIGTERM do, and says how to go on."""
    process = folder.begun(*SLOW)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    ways = "go on with 'safeimg resume top.qcow2', or take it back with 'safeimg rollback top.qcow2'"
    assert (process.returncode, out) == (128 + signal.SIGHUP, b"")
    assert err.decode() == f"safeimg: top.qcow2: stopped by SIGHUP; {ways}\n"
    assert isinstance(folder.events()[-1], Paused)
    folder.settles_both_ways()


def test_a_terminal_that_hangs_up(folder: Folder) -> None:
    """SIGHUP, and nobody who could read what is printed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder.path)
        os.environ["SAFEIMG_STATE_DIR"] = str(folder.state)
        os.execv(sys.executable, [sys.executable, "-c", PROGRAM, "commit", "-p", "-r", "4M", "top.qcow2"])
    while sum(isinstance(event, StepPrepared) for event in folder.events()) < 3:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.02)
    os.close(terminal)
    status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    assert isinstance(folder.events()[-1], Paused)
    folder.settles_both_ways()


def test_progress_that_nobody_reads_stops_nothing(folder: Folder) -> None:
    process = folder.start("commit", "-p", "-r", "8M", "top.qcow2")
    assert process.stdout is not None
    process.stdout.read(8)
    process.stdout.close()
    process.stdout = None
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == 0
    assert folder.base.read_bytes() == folder.new and folder.left() == []


def test_nohup(folder: Folder) -> None:
    process = folder.begun(*SLOW, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, b"Image committed.\n", b"")
    assert folder.base.read_bytes() == folder.new


def test_two_processes_race_for_one_image(folder: Folder) -> None:
    """Six different commands at once, again and again: each is done or is refused in one line, nothing is lost."""
    words = [("commit", "top.qcow2"), ("rebase", "-u", "-b", "base.raw", "-F", "raw", "top.qcow2")] * 3
    for _ in range(2):
        racing = [folder.start(*each) for each in words]
        for process in racing:
            err = process.communicate(timeout=120)[1]
            assert process.returncode in (0, 1, 3, 5), err
            assert b"internal error" not in err and (process.returncode == 0) == (err == b""), err
            assert len(err.splitlines()) <= 2
    folder.ends("resume", "top.qcow2")  # whatever one of them saw when another one was about to begin
    folder.done(*COMMIT)
    assert folder.base.read_bytes() == folder.shown(folder.top) == folder.new and folder.left() == []


@needs_qemu_io
def test_safeimg_races_qemu_io(folder: Folder) -> None:
    """What qemu-io wrote stays, and what it could not write it was told: never something between."""
    expected = bytearray(folder.new)
    written = 0
    process = folder.start("commit", "-r", "16M", "top.qcow2")
    number = 0
    while process.poll() is None:
        number = number % 250 + 1
        at = number * 4096
        done = subprocess.run(
            ["qemu-io", "-c", f"write -P {number} {at} 4096", "top.qcow2"],
            cwd=folder.path, capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            expected[at : at + 4096] = bytes([number]) * 4096
            written += 1
        else:
            refusals = (b'Failed to get "write" lock', b"Image is corrupt; cannot be opened read/write")
            assert any(words in done.stderr for words in refusals), done
    err = process.communicate(timeout=60)[1]
    if process.returncode:  # qemu-io had it
        assert b"lock" in err, err
        assert b"nothing is pending" in folder.start("status", "top.qcow2").communicate(timeout=60)[0]
    assert folder.shown(folder.top) == expected
    folder.done(*COMMIT)
    assert folder.base.read_bytes() == expected


BACKWARDS = """
import itertools, time
jumps = itertools.count(1)
time.time = lambda: 2e9 - 86400.0 * next(jumps)
"""


def test_a_clock_that_jumps_back(folder: Folder) -> None:
    """A day earlier with every look at it: between events, between the command, its death and its recovery."""
    folder.killed(program=BACKWARDS + PROGRAM)
    times = [event.time for event in folder.events() if isinstance(event, Declared | StepPrepared)]
    assert len(times) > 3 and times == sorted(times, reverse=True)
    (declared,) = (event for event in folder.events() if isinstance(event, Declared))
    assert "interrupted" in folder.ends("status", "base.raw")[1]
    folder.settles_both_ways(program=BACKWARDS.replace("2e9", "1e9") + PROGRAM)
    earlier = BACKWARDS.replace("2e9", "5e8") + PROGRAM
    folder.done("rebase", "-u", "-b", "base.raw", "-F", "raw", "top.qcow2", program=earlier)
    order = [line.split()[3] for line in folder.done("log", "top.qcow2").splitlines()]
    assert order == ["commit", "rebase"], "as they were done, whatever the clock said"
    assert "-" not in folder.done("log", "top.qcow2").split()[5]
    folder.done("audit", "verify", "base.raw")
    assert declared.owner.started < time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")


def test_a_clock_before_the_epoch(folder: Folder) -> None:
    early = "import time; time.time = lambda: -5.0\n" + PROGRAM
    assert folder.done(*COMMIT, program=early) == "Image committed.\n"
    assert "commit" in folder.done("log", "base.raw", program=early)
