"""A running commit as a process: signals pause it, QEMU and other safeimg processes are kept away."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time

import pytest
from faults.running import HELD, SIZE, SLOW, STEP, Folder
from safeimg.journal.events import Paused, StepPrepared

needs_qemu = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io is not installed")


def line_of(process: subprocess.Popen[bytes], code: int) -> str:
    """The one line on stderr of a process that ends with `code` and prints nothing else."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, b""), err
    assert err.count(b"\n") == 1, err.decode()
    (line,) = err.decode().splitlines()
    return line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_pauses_and_the_identical_command_goes_on(folder: Folder, number: signal.Signals) -> None:
    process = folder.begun(*SLOW)
    process.send_signal(number)
    line = line_of(process, 128 + number)
    assert number.name in line
    assert "'safeimg resume top.qcow2'" in line and "'safeimg rollback top.qcow2'" in line
    events = folder.events()
    assert isinstance(events[-1], Paused) and events[-1].reason == number.name
    prepared = sum(isinstance(event, StepPrepared) for event in events)
    halfway = folder.base.read_bytes()
    assert halfway not in (folder.old, folder.new)
    assert folder.done(*SLOW) == "Image committed.\n"
    assert folder.base.read_bytes() == folder.new
    assert prepared < SIZE // STEP and folder.left() == []


def test_a_second_signal_does_not_wait_for_the_step(folder: Folder) -> None:
    process = folder.begun("commit", "-r", "64k", "top.qcow2", steps=2)
    (line,) = folder.stop(process).splitlines()
    assert "'safeimg resume top.qcow2'" in line


def test_a_resume_is_paused_too(folder: Folder) -> None:
    process = folder.begun(*SLOW)
    process.kill()
    process.communicate()
    resumed = folder.start(*SLOW)
    before = len(folder.events())
    while len(folder.events()) < before + 4:
        assert resumed.poll() is None, resumed.communicate()
        time.sleep(0.02)
    resumed.send_signal(signal.SIGTERM)
    line_of(resumed, 128 + signal.SIGTERM)
    assert "commit finished" in folder.done("resume", "base.raw")
    assert folder.base.read_bytes() == folder.new and folder.left() == []


def test_sigusr1_prints_progress(folder: Folder) -> None:
    process = folder.begun(*HELD)
    process.send_signal(signal.SIGUSR1)
    assert process.stderr is not None
    found = re.fullmatch(rb"    \((\d+\.\d\d)/100%\)\n", process.stderr.readline())
    assert found is not None and 0 < float(found[1]) < 100
    folder.stop(process)


def test_one_of_two_commits_gets_the_image(folder: Folder) -> None:
    both = [folder.start(*HELD) for _ in range(2)]
    while all(process.poll() is None for process in both):
        time.sleep(0.02)
    (loser,) = (process for process in both if process.poll() is not None)
    (winner,) = (process for process in both if process is not loser)
    out, err = loser.communicate()
    assert loser.returncode in (1, 5) and out == b"", err
    refused = err.decode()
    # Where they meet: at the log, at the image's lock, or when one asks who the other is.
    assert any(word in refused for word in ("is working on it", "Is another process using the")), refused
    assert refused.startswith("safeimg: ") and len(refused.splitlines()) <= 2
    folder.stop(winner)


@pytest.mark.parametrize("words", [("resume", "base.raw"), ("rollback", "top.qcow2")])
def test_what_runs_is_left_alone(folder: Folder, words: tuple[str, ...]) -> None:
    running = folder.begun(*HELD)
    other = folder.start(*words)
    out, err = other.communicate(timeout=60)
    assert other.returncode in (1, 5) and out == b"", err
    assert err.startswith(b"safeimg: ") and b"internal error" not in err and len(err.splitlines()) <= 2
    folder.stop(running)


def test_one_of_two_recoveries_gets_it(folder: Folder) -> None:
    process = folder.begun(*SLOW)
    process.kill()
    process.communicate()
    both = [folder.start("resume", "base.raw"), folder.start("rollback", "top.qcow2")]
    ends = [other.communicate(timeout=60) for other in both]
    codes = [other.returncode for other in both]
    assert 0 in codes and set(codes) <= {0, 1, 5, 6}, ends
    for code, (out, err) in zip(codes, ends, strict=True):
        assert len((err if code else out).splitlines()) in (1, 2) and b"internal error" not in err
    assert folder.base.read_bytes() in (folder.old, folder.new) and folder.left() == []


@needs_qemu
def test_a_guest_that_has_the_image_keeps_it(folder: Folder) -> None:
    guest = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", "top.qcow2"], cwd=folder.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    folder.processes.append(guest)
    assert guest.stdin is not None and guest.stdout is not None
    guest.stdin.write(b"read 0 512\n")
    guest.stdin.flush()
    while b"512/512" not in guest.stdout.readline():
        pass
    refused = folder.start("commit", "top.qcow2")
    out, err = refused.communicate(timeout=60)
    assert (refused.returncode, out) == (1, b"")
    theirs = subprocess.run(["qemu-img", "commit", "top.qcow2"], cwd=folder.path, capture_output=True, check=False)
    assert err.replace(b"safeimg:", b"qemu-img:") == theirs.stderr
    assert folder.left() == []
    guest.communicate(b"quit\n", timeout=60)
    assert guest.returncode == 0
    folder.done(*SLOW)
    assert folder.base.read_bytes() == folder.new


@needs_qemu
@pytest.mark.parametrize(("image", "fmt"), [("base.raw", "raw"), ("top.qcow2", "qcow2")])
def test_no_guest_gets_an_image_of_a_running_commit(folder: Folder, image: str, fmt: str) -> None:
    running = folder.begun(*HELD)
    guest = subprocess.run(
        ["qemu-io", "-f", fmt, "-c", "write -P 1 0 512", image], cwd=folder.path, capture_output=True, check=False
    )
    assert guest.returncode == 1 and b'Failed to get "write" lock' in guest.stderr, guest
    folder.stop(running)
