"""Users who may not do everything: folders they cannot write to, no HOME, folders of root's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from faults.running import COMMIT, PROGRAM, Folder

USER = 65534
DROPPED = f"import os; os.setgroups([]); os.setgid({USER}); os.setuid({USER})\n"
NO_STATE = {"SAFEIMG_STATE_DIR": "", "HOME": "", "XDG_STATE_HOME": ""}


@cache
def how() -> dict[str, Any] | None:
    """How to run the program as that user: by which Python, and how that finds its modules; None if none can."""
    modules = os.pathsep.join([os.environ.get("PYTHONPATH", ""), *(path for path in sys.path if "-packages" in path)])
    for python in (sys.executable, "/usr/bin/python3"):
        words = [python, "-c", DROPPED + "import trio, sqlite_utils, safeimg.cli.main, safeimg.ops.commit_job"]
        environment = {**os.environ, "PYTHONPATH": modules}
        if not subprocess.run(words, env=environment, capture_output=True, check=False).returncode:
            return {"python": python, "program": DROPPED + PROGRAM, "environment": {"PYTHONPATH": modules}}
    return None


class Theirs(Folder):
    """A folder of root's; the images in it belong to another user, whom every command runs as."""

    def start(self, *words: str, **process: Any) -> subprocess.Popen[bytes]:
        """`environment` adds to that user's."""
        run = how()
        assert run is not None
        environment = {**run["environment"], **process.pop("environment", {})}
        return super().start(*words, **{**run, **process, "environment": environment})


@pytest.fixture
def theirs() -> Iterator[Theirs]:
    if os.geteuid() != 0:
        pytest.skip("only root may become another user")
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    if how() is None:
        pytest.skip("another user cannot run this Python")
    path = Path(tempfile.mkdtemp())  # pytest's own folders are for root alone
    path.chmod(0o755)
    folder = Theirs(path)
    for image in (folder.base, folder.top):
        os.chown(image, USER, USER)
    yield folder
    shutil.rmtree(path)


def test_a_read_only_folder(theirs: Theirs) -> None:
    """Log and pointers are in the user's state directory, and everything is found there."""
    theirs.state.mkdir()
    os.chown(theirs.state, USER, USER)
    found = theirs.base.stat()
    theirs.log = theirs.state / f"{found.st_dev:x}-{found.st_ino:x}.safeimg"
    theirs.killed()
    assert theirs.left() == []
    for image in ("base.raw", "top.qcow2"):
        code, out, err = theirs.ends("status", image)
        assert code == 3 and "commit was interrupted" in out and err == ""
    assert "an interrupted commit is pending" in theirs.fails("resize", "-f", "raw", "base.raw", "8M", code=3)
    theirs.done("rollback", "top.qcow2")
    assert theirs.base.read_bytes() == theirs.old and theirs.shown(theirs.top) == theirs.new
    theirs.killed()
    theirs.done("resume", "base.raw")
    assert theirs.base.read_bytes() == theirs.shown(theirs.top) == theirs.new
    assert not [name for name in os.listdir(theirs.state) if name.startswith(theirs.log.stem)]


def test_no_home(theirs: Theirs) -> None:
    """There is no place for the history: the way to give it one is named; what needs none works."""
    os.chown(theirs.path, USER, USER)
    line = theirs.fails(*COMMIT, environment=NO_STATE)
    assert line.endswith("set SAFEIMG_STATE_DIR to a folder that only you can write to"), line
    assert theirs.left() == [] and theirs.base.read_bytes() == theirs.old
    assert theirs.ends("status", "base.raw", environment=NO_STATE) == (0, "nothing is pending\n", "")
    assert theirs.ends("log", "base.raw", environment=NO_STATE) == (0, "base.raw: nothing on record\n", "")
    theirs.done("commit", "--no-journal", "top.qcow2", environment=NO_STATE)
    assert theirs.base.read_bytes() == theirs.new


def test_an_unprivileged_user_in_a_folder_of_roots(theirs: Theirs) -> None:
    """No place for a journal, nor for a pointer to one elsewhere: refused, with the ways that are left."""
    line = theirs.fails(*COMMIT, environment=NO_STATE)
    assert line.startswith("safeimg: base.raw: no place for a journal (") and line.endswith(
        "; name one with --journal PATH, or go on without any with --no-journal"
    )
    elsewhere = Path(tempfile.gettempdir()) / f"{theirs.path.name}.log"
    line = theirs.fails("commit", "--journal", str(elsewhere), "top.qcow2", environment=NO_STATE)
    assert "no place for a pointer to the journal" in line and line.endswith("; go on without any with --no-journal")
    assert not elsewhere.exists() and theirs.left() == []
    assert (theirs.base.read_bytes(), theirs.shown(theirs.top)) == (theirs.old, theirs.new)
    theirs.done("commit", "--no-journal", "top.qcow2", environment=NO_STATE)
    assert theirs.base.read_bytes() == theirs.new


def test_an_image_that_may_not_be_written(theirs: Theirs) -> None:
    os.chown(theirs.base, 0, 0)
    line = theirs.fails(*COMMIT)
    assert line.endswith("Could not open backing file: Could not open 'base.raw': Permission denied"), line
    assert theirs.left() == []
