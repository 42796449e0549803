"""Each fault that can befall a disk, on real processes: one line that says what to do, nothing lost, both ways out."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.injecting import SYNCS, WRITES, Injected, dying_disk, fill, small_disk
from faults.running import COMMIT, PROGRAM, SLOW, Folder

Folders = Callable[..., Folder]
WAYS = "; go on with 'safeimg resume {0}', or take it back with 'safeimg rollback {0}'"


def stopped(folder: Folder, number: int, words: tuple[str, ...] = COMMIT, **how: Any) -> str:
    """The commit stops with that error, and its line names both ways out. What it said before them."""
    line = folder.fails(*words, **how)
    said, ways, rest = line.partition(WAYS.format(words[-1]))
    assert said.startswith("safeimg: ") and ways and not rest, line
    assert said.endswith(os.strerror(number)), said
    return said.removeprefix("safeimg: ")


def test_no_space(folders: Folders, tmp_path: Path) -> None:
    """A full disk, images and journal together: not a byte is free, and it is taken back; with room, it goes on."""
    with small_disk(tmp_path / "disk", 20 << 20) as disk:
        folder = folders(disk, "base.qcow2")
        filler = fill(disk, 2_000_000)
        stopped(folder, errno.ENOSPC)
        fill(disk, 0)
        folder.settles_both_ways(more_room=filler.unlink)


@pytest.mark.parametrize(("file", "when"), [("base.qcow2", "4+"), ("base.qcow2.safeimg-undo", "3+")])
def test_a_quota(folders: Folders, tmp_path: Path, file: str, when: str) -> None:
    folder = folders(tmp_path, "base.qcow2")
    fault = Injected(tmp_path, WRITES, "error=EDQUOT", on=[tmp_path / file], when=when)
    said = stopped(folder, errno.EDQUOT, under=fault.under)
    assert said.split(":")[0].endswith(file) and fault.hits
    folder.settles_both_ways()


@pytest.mark.parametrize(
    ("file", "calls", "when"),
    [
        ("base.qcow2", WRITES, "4"),
        ("base.qcow2", SYNCS, "3"),
        ("base.qcow2.safeimg", SYNCS, "5"),
        ("top.qcow2", "preadv,preadv2", "1"),
    ],
)
def test_io_errors(folders: Folders, tmp_path: Path, file: str, calls: str, when: str) -> None:
    folder = folders(tmp_path, "base.qcow2")
    fault = Injected(tmp_path, calls, "error=EIO", on=[tmp_path / file], when=when)
    said = stopped(folder, errno.EIO, under=fault.under)
    assert said.split(":")[0].endswith(file) and fault.hits
    folder.settles_both_ways()


def test_an_error_behind_the_last_step(folders: Folders, tmp_path: Path) -> None:
    """A fence does not come down: the commit is done, so no rollback is offered, and resume tidies up."""
    folder = folders(tmp_path, "base.qcow2")
    broken = (
        "import safeimg.ops.tidy as tidy; from safeimg.drivers.errors import StorageError\n"
        "def fail(files, records): raise StorageError('base.qcow2', 'write', OSError(5, 'Input/output error'))\n"
        "tidy.finish_images = fail\n" + PROGRAM
    )
    line = folder.fails(*COMMIT, program=broken)
    assert line.endswith("output error; the commit is done but for tidying up: 'safeimg resume top.qcow2'"), line
    assert folder.shown(folder.base) == folder.new
    assert "safeimg rollback" not in folder.ends("status", "base.qcow2")[1]
    folder.done("resume", "top.qcow2")
    assert folder.shown(folder.base) == folder.shown(folder.top) == folder.new and folder.left() == []


@pytest.mark.parametrize("limit", [2_300_077, 4_000_077])
def test_a_file_larger_than_allowed(folder: Folder, limit: int) -> None:
    """RLIMIT_FSIZE (SIGXFSZ), of the journal's files and of the image: no sector is written in part."""
    stopped(folder, errno.EFBIG, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    folder.settles_both_ways()


def test_a_full_journal_disk_with_room_on_the_images_disk(folders: Folders, tmp_path: Path) -> None:
    """`--journal` on another file system: the image points to it."""
    with small_disk(tmp_path / "logs", 3 << 20) as logs:
        folder = folders(tmp_path)
        words = ("commit", "--journal", str(logs / "log"), "top.qcow2")
        assert stopped(folder, errno.ENOSPC, words).startswith(str(logs))
        stopped(folder, errno.ENOSPC, ("resume", "base.raw"))
        assert folder.left() == ["base.raw.safeimg", "top.qcow2.safeimg"]
        larger = ["mount", "-o", "remount,size=16m", logs]
        folder.settles_both_ways(more_room=lambda: subprocess.run(larger, check=True))
        assert os.listdir(logs) == []


def test_a_full_images_disk_with_room_on_the_journals_disk(folders: Folders, tmp_path: Path) -> None:
    with small_disk(tmp_path / "images", 16 << 20) as images:
        folder = folders(images, "base.qcow2")
        filler = fill(images, 1 << 20)
        words = ("commit", "--journal", str(tmp_path / "log"), "top.qcow2")
        folder.more.append(tmp_path / "log")
        assert stopped(folder, errno.ENOSPC, words).startswith("base.qcow2")
        folder.settles_both_ways(more_room=filler.unlink)


def test_a_full_disk_of_the_history(folders: Folders, tmp_path: Path) -> None:
    """What cannot be put on record is not begun; what is done already is put on record later."""
    with small_disk(tmp_path / "state", 1 << 20) as state:
        folder = folders(tmp_path)
        filler = fill(state, 0)
        line = folder.fails(*COMMIT)
        assert "history.db: the history cannot be used" in line and "SAFEIMG_STATE_DIR" in line
        assert folder.left() == [] and folder.base.read_bytes() == folder.old
        filler.unlink()
        process = folder.begun(*SLOW)
        fill(state, 0)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err.count(b"\n")) == (1, b"", 1)
        assert err.endswith(b"the commit is done but for tidying up: 'safeimg resume top.qcow2'\n"), err
        assert "history.db" in folder.fails("resume", "base.raw")
        filler.unlink()
        folder.done("resume", "base.raw")
        assert folder.base.read_bytes() == folder.new and folder.left() == []
        assert "completed" in folder.done("log", "base.raw")


def test_a_read_only_remount_in_the_middle(folders: Folders, tmp_path: Path) -> None:
    """The kernel finds the disk broken, and lets nobody write to it any more."""
    with dying_disk(tmp_path / "disk", 40 << 20) as change:
        folder = folders(tmp_path / "disk")
        process = folder.begun(*SLOW)
        change()
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (1, b""), err
        line = err.decode()
        assert line.count("\n") == 1 and line.endswith(WAYS.format("top.qcow2") + "\n"), line
        assert any(os.strerror(number) in line for number in (errno.EROFS, errno.EIO)), line
        refused = folder.fails("rollback", "base.raw", code=1)
        assert os.strerror(errno.EROFS) in refused or os.strerror(errno.EIO) in refused
        change()
        folder.settles_both_ways()
