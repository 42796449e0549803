"""Who is at work on an image, and whether that process lives: pids that are used again, reboots, other machines and
containers. The owner stands in the log as it does when a process was killed; the world around it is what changes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from faults.running import HELD, Folder
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.journal.events import Declared, Owner
from safeimg.journal.log import Log, read_events
from safeimg.journal.owner import current_owner, liveness


def rewrite(folder: Folder, **changes: object) -> Owner:
    """The pending operation's log, as a process that differs so from the one that was killed would have left it."""
    events = read_events(LocalFileSystem(), str(folder.log))
    declared = events[0]
    assert isinstance(declared, Declared)
    owner = declared.owner._replace(**changes)  # type: ignore[arg-type]
    folder.log.unlink()
    log = Log.create(LocalFileSystem(), str(folder.log), declared.operation, LocalFileSystem().stat(str(folder.base)))  # type: ignore[arg-type]
    for event in (declared._replace(owner=owner), *events[1:]):
        log.append(event)
    log.sync()
    log.close()
    return owner


def test_a_pid_that_is_used_again(folder: Folder) -> None:
    """The process of that number is another one: it was started at another time."""
    folder.killed()
    mine = current_owner()
    owner = rewrite(folder, pid=mine.pid, started=mine.started - 1)
    assert liveness(owner) == "dead" and liveness(owner._replace(started=mine.started)) == "alive"
    folder.settles_both_ways()


def test_the_owner_lives(folder: Folder) -> None:
    folder.killed()
    mine = current_owner()
    rewrite(folder, pid=mine.pid, started=mine.started)
    for verb in ("resume", "rollback"):
        for fenced in ((), ("--fenced",)):  # what is seen to live is not fenced
            line = folder.fails(verb, *fenced, "base.raw", code=5)
            assert f"process {mine.pid} is working on it; wait for it, or stop it with SIGINT" in line


def test_another_boot(folder: Folder) -> None:
    """This machine was started anew since: whatever has the number and start time now is another process."""
    folder.killed()
    mine = current_owner()
    pids = mine.boot.partition(" ")[2]
    rewrite(folder, pid=mine.pid, started=mine.started, boot=f"00000000-0000-0000-0000-000000000000 {pids}")
    folder.settles_both_ways()


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": "0" * 32},
        {"host": "another-host"},  # a clone of this machine
        {"boot": current_owner().boot.partition(" ")[0] + " pid:[1]"},  # another container of this machine
    ],
)
def test_an_owner_that_cannot_be_seen(folder: Folder, changes: dict[str, str]) -> None:
    """It may be at work at this moment: nothing is done unless somebody says that it is dead."""
    folder.killed()
    owner = rewrite(folder, **changes)
    assert liveness(owner) == "unknown"
    halfway = folder.base.read_bytes()
    for words in (("resume", "base.raw"), ("rollback", "top.qcow2")):
        line = folder.fails(*words, code=5)
        assert "cannot be seen from here; if it is certainly dead, add --fenced" in line and owner.host in line
    assert folder.ends("recover", "--scan", ".", "--policy", "rollback")[0] == 5
    assert "cannot be seen from here" in folder.ends("status", "base.raw")[1]
    assert folder.base.read_bytes() == halfway
    folder.done("rollback", "--fenced", "base.raw")
    assert folder.base.read_bytes() == folder.old and folder.left() == []


def test_another_container(folder: Folder, tmp_path: Path) -> None:
    """A process in a pid namespace of its own, alive or dead, is not told from here, nor from there who lives here."""
    own_pids = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    if subprocess.run([*own_pids, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no pid namespace can be made here")
    process = folder.begun(*HELD, under=own_pids)
    (declared,) = (event for event in folder.events() if isinstance(event, Declared))
    assert liveness(declared.owner) == "unknown"
    assert "working on it" in folder.fails("rollback", "base.raw", code=5)  # it holds the log's lock
    process.kill()
    process.communicate(timeout=60)
    line = folder.fails("rollback", "base.raw", code=5)
    assert "cannot be seen from here" in line
    folder.done("rollback", "--fenced", "base.raw")
    assert folder.base.read_bytes() == folder.old
    process = folder.begun(*HELD)
    assert "working on it" in folder.fails("resume", "base.raw", code=5, under=own_pids)
    process.kill()
    process.communicate(timeout=60)
    assert "cannot be seen from here" in folder.fails("resume", "base.raw", code=5, under=own_pids)
    folder.settles_both_ways()


def test_the_start_time_does_not_depend_on_the_clock() -> None:
    """It is counted from the boot on, by the kernel; and no other process has the same at the same pid."""
    mine = current_owner()
    with open("/proc/self/stat", "rb") as file:
        assert mine.started == int(file.read().rpartition(b")")[2].split()[19])
    assert mine.pid == os.getpid() and liveness(mine) == "alive"
