"""Real guests: a virtual machine is started on images with something pending, or is running already."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from faults import guests
from faults.running import HELD, SLOW, Folder

Folders = Callable[..., Folder]
WRITTEN = bytes([guests.PATTERN]) * guests.LENGTH
COMMITTED = 64 << 10  # an offset that the killed commits have behind them
VERBS = ("resume", "rollback")


def test_the_fence_keeps_guests_from_pending_images(folders: Folders, tmp_path: Path) -> None:
    """qcow2 version 3: the machine does not start; once it is settled, it does."""
    folder = folders(tmp_path, "base.qcow2")
    folder.killed()
    for image in (folder.base, folder.top):
        assert "Image is corrupt; cannot be opened read/write" in guests.refused(image)
    folder.settles_both_ways()
    guests.run(folder.top, COMMITTED)
    assert folder.shown(folder.top)[COMMITTED : COMMITTED + guests.LENGTH] == WRITTEN


@pytest.mark.parametrize("base", ["base.raw", "base.qcow2"])
def test_a_guest_on_the_base_of_a_pending_commit_is_noticed(folders: Folders, tmp_path: Path, base: str) -> None:
    """raw, and qcow2 version 2, have no fence: the recovery sees that somebody wrote, and writes nothing itself."""
    folder = folders(tmp_path, base, compat="0.10")
    folder.killed()
    guests.run(folder.base, COMMITTED)
    with_guest = folder.base.read_bytes(), folder.top.read_bytes()
    assert folder.shown(folder.base)[COMMITTED : COMMITTED + guests.LENGTH] == WRITTEN
    for verb in VERBS:
        line = folder.fails(verb, base, code=4)
        assert "somebody else" in line and "nothing was written" in line and "safeimg abandon" in line
    assert (folder.base.read_bytes(), folder.top.read_bytes()) == with_guest
    folder.done("abandon", base)
    assert folder.shown(folder.base)[COMMITTED : COMMITTED + guests.LENGTH] == WRITTEN


def test_a_guest_on_the_overlay_of_a_pending_commit_is_noticed(folders: Folders, tmp_path: Path) -> None:
    folder = folders(tmp_path, "base.raw", compat="0.10")
    folder.killed()
    guests.run(folder.top, COMMITTED)
    expected = bytearray(folder.new)
    expected[COMMITTED : COMMITTED + guests.LENGTH] = WRITTEN
    before = folder.base.read_bytes()
    for verb in VERBS:
        assert "somebody else wrote to it" in folder.fails(verb, "top.qcow2", code=4)
    assert folder.shown(folder.top) == expected and folder.base.read_bytes() == before
    folder.done("abandon", "top.qcow2")
    assert folder.shown(folder.top) == expected
    folder.done("commit", "top.qcow2")
    assert folder.base.read_bytes() == expected


def test_a_guest_that_runs_keeps_safeimg_away(folder: Folder) -> None:
    """In QEMU's words."""
    guest = guests.start(folder.top, stays=True)
    folder.processes.append(guest)
    assert guest.stdout is not None and guest.stdout.read(1) == b"W"
    for words in (("commit", "top.qcow2"), ("resize", "top.qcow2", "8M"), ("snapshot", "-c", "s", "top.qcow2")):
        code, out, err = folder.ends(*words)
        theirs = subprocess.run(["qemu-img", *words], cwd=folder.path, capture_output=True, text=True, check=False)
        assert (code, out, err.replace("safeimg:", "qemu-img:")) == (theirs.returncode, "", theirs.stderr), words
        assert code == 1 and "Is another process using the image" in err
    assert folder.left() == []
    guest.kill()
    guest.communicate()
    expected = WRITTEN + folder.new[guests.LENGTH :]
    folder.done("commit", "top.qcow2")
    assert folder.base.read_bytes() == folder.shown(folder.top) == expected


def test_a_guest_is_not_started_while_safeimg_runs(folder: Folder) -> None:
    running = folder.begun(*HELD)
    for image in (folder.base, folder.top):
        assert 'Failed to get "write" lock' in guests.refused(image)
    folder.stop(running)


def test_a_guest_that_is_started_while_a_recovery_waits_for_it(folders: Folders, tmp_path: Path) -> None:
    """It has the image of a pending operation: a recovery leaves it alone, in QEMU's words, until it has ended."""
    folder = folders(tmp_path, "base.raw", compat="0.10")
    folder.killed(*SLOW)
    guest = guests.start(folder.top, COMMITTED, stays=True)
    folder.processes.append(guest)
    assert guest.stdout is not None and guest.stdout.read(1) == b"W"
    code, out, err = folder.ends("resume", "top.qcow2")
    assert (code, out) == (1, "") and "Is another process using the image" in err
    guest.kill()
    guest.communicate()
    assert "somebody else wrote to it" in folder.fails("resume", "top.qcow2", code=4)
