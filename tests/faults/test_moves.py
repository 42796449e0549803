"""Images and logs that are renamed, copied, deleted, restored, and reached by other names, with something pending."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.injecting import SYNCS, Injected, mounted
from faults.running import COMMIT, Folder

Folders = Callable[..., Folder]
NOTHING = (0, "nothing is pending\n", "")


def half_resized(folder: Folder, *options: str) -> None:
    """An operation on one image alone is pending."""
    fault = Injected(folder.path.parent, SYNCS, "signal=KILL", on=[folder.top], when="3")
    assert folder.ends("resize", *options, "top.qcow2", "8M", under=fault.under)[0] == -signal.SIGKILL
    assert folder.left()[0] == "top.qcow2.safeimg"


def size(image: Path) -> int:
    words = ["qemu-img", "info", "--output=json", image]
    return int(json.loads(subprocess.run(words, capture_output=True, check=True).stdout)["virtual-size"])


@pytest.fixture
def inner(folders: Folders, tmp_path: Path) -> Folder:
    """A folder within the test's own."""
    (tmp_path / "images").mkdir()
    return folders(tmp_path / "images")


@pytest.mark.parametrize("with_log", [True, False])
def test_an_image_is_renamed_with_its_log_or_without(inner: Folder, with_log: bool) -> None:
    half_resized(inner)
    for name in ["top.qcow2", *(inner.left() if with_log else [])]:
        (inner.path / name).rename(inner.path / name.replace("top", "moved"))
    assert "resize was interrupted" in inner.ends("status", "moved.qcow2")[1]
    inner.done("rollback", "moved.qcow2")
    assert size(inner.path / "moved.qcow2") == 4 << 20 and inner.left() == []


@pytest.mark.parametrize("name", ["base.raw", "top.qcow2"])
def test_images_of_a_chain_keep_their_names(folder: Folder, name: str) -> None:
    """Nobody could tell which image an overlay means; they are settled once they have their names again."""
    folder.killed()
    (folder.path / name).rename(folder.path / f"moved-{name}")
    for verb in ("resume", "rollback"):
        line = folder.fails(verb, f"moved-{name}", code=6)
        assert f"{name}: not there: put it back under that name, or give" in line and "safeimg abandon" in line
    (folder.path / f"moved-{name}").rename(folder.path / name)
    folder.settles_both_ways()


def test_a_folder_is_renamed(folders: Folders, inner: Folder, tmp_path: Path) -> None:
    inner.killed()
    inner.path.rename(tmp_path / "elsewhere")
    inner.path.mkdir()
    assert "interrupted" in inner.ends("status", "--scan", "..")[1]
    inner.done("rollback", "../elsewhere/base.raw")
    assert (tmp_path / "elsewhere" / "base.raw").read_bytes() == inner.old


@pytest.mark.parametrize("verb", ["resume", "rollback"])
def test_a_copy_with_its_log(inner: Folder, tmp_path: Path, verb: str) -> None:
    """It is not the image that the log is about, until somebody says so; the original is never touched."""
    inner.killed()
    subprocess.run(["cp", "-a", inner.path, tmp_path / "copy"], check=True)
    original = inner.kept()
    line = inner.fails(verb, "../copy/base.raw", code=4)
    assert "not the file that the pending commit was about" in line and "add --adopt" in line
    inner.done(verb, "--adopt", "../copy/base.raw")
    assert (tmp_path / "copy" / "base.raw").read_bytes() == (inner.new if verb == "resume" else inner.old)
    assert {path: original[path] for path in (inner.base, inner.top, inner.log)} == {
        path: what for path, what in inner.kept().items() if path in (inner.base, inner.top, inner.log)
    }
    inner.settles_both_ways()


def test_a_copy_without_its_log(folders: Folders, inner: Folder, tmp_path: Path) -> None:
    """The fence came along: it is read, and nobody writes to it until it was looked at."""
    inner.killed()
    copy = tmp_path / "copy"
    copy.mkdir()
    for image in (inner.base, inner.top):
        subprocess.run(["cp", "-a", image, copy], check=True)
    assert inner.ends("status", "../copy/top.qcow2") == NOTHING
    assert "Image is corrupt; cannot be opened read/write" in inner.fails("commit", "../copy/top.qcow2")
    other = subprocess.run(["qemu-io", "-c", "write 0 512", copy / "top.qcow2"], capture_output=True, check=False)
    assert other.returncode == 1 and b"Image is corrupt" in other.stderr
    inner.done("check", "-q", "-r", "leaks", "../copy/top.qcow2")
    assert inner.shown(copy / "top.qcow2") == inner.new
    inner.done("commit", "../copy/top.qcow2")
    assert (copy / "base.raw").read_bytes() == inner.new
    inner.settles_both_ways()


def test_a_log_is_gone(folder: Folder) -> None:
    """Where an image says that it takes part, nobody takes that for nothing."""
    folder.killed()
    kept = folder.log.read_bytes()
    folder.log.unlink()
    for words in (("resume", "top.qcow2"), ("rollback", "top.qcow2")):
        line = folder.fails(*words)
        assert f"{folder.log} is not there" in line and "put it back" in line and "safeimg abandon" in line
    assert folder.ends("status", "top.qcow2")[0] == 3
    folder.log.write_bytes(kept)
    folder.log.chmod(0o600)
    folder.settles_both_ways()


def test_a_log_on_a_disk_that_is_not_mounted(inner: Folder, tmp_path: Path) -> None:
    """`--journal`: the image itself says where its log is."""
    logs, away = tmp_path / "logs", tmp_path / "away"
    logs.mkdir()
    half_resized(inner, "--journal", str(logs / "log"))
    assert "resize was interrupted" in inner.ends("status", "--scan", ".")[1]
    logs.rename(away)
    for words in (("rollback", "top.qcow2"), ("commit", "top.qcow2")):
        assert f"{logs / 'log'} is not there (is its disk mounted?)" in inner.fails(*words)
    away.rename(logs)
    assert "an interrupted resize is pending" in inner.fails("commit", "top.qcow2", code=3)
    inner.done("rollback", "top.qcow2")
    assert size(inner.top) == 4 << 20 and inner.left() == os.listdir(logs) == []


@pytest.mark.parametrize("what", ["log", "undo", "gone"])
def test_what_cannot_be_settled_is_given_up(folder: Folder, what: str) -> None:
    """A damaged log, no undo file, no log: abandon works all the same, and keeps what there was."""
    folder.killed()
    if what == "log":
        with folder.log.open("r+b") as log:
            log.seek(700)
            log.write(b"damage")
    elif what == "undo":
        (folder.path / "base.raw.safeimg-undo").unlink()
    else:
        folder.log.unlink()
    assert "safeimg abandon" in folder.fails("rollback", "top.qcow2")
    images = folder.base.read_bytes(), folder.top.read_bytes()
    for _ in range(3):
        if folder.ends("status", "top.qcow2")[0] == 0:
            break
        folder.done("abandon", "top.qcow2")
    assert folder.ends("status", "base.raw", "top.qcow2") == NOTHING
    assert (folder.path / "base.raw.safeimg-damaged").exists() == (what == "log")
    if what != "undo":  # that log still told which fence was its own
        assert (folder.base.read_bytes(), folder.top.read_bytes()) == images
        folder.done("check", "-q", "-r", "leaks", "top.qcow2")
    folder.done(*COMMIT)
    assert folder.base.read_bytes() == folder.new


def test_a_log_left_behind_by_a_deleted_image(folder: Folder) -> None:
    folder.killed()
    another = folder.base.with_name("another.raw")  # there before the image goes, or it might get its inode
    another.write_bytes(folder.old)
    folder.base.unlink()
    code, out, _ = folder.ends("status", "base.raw")
    assert code == 3 and "the image is not there, only its log" in out and "safeimg abandon base.raw" in out
    for verb in ("resume", "rollback"):
        assert "safeimg abandon" in folder.fails(verb, "base.raw", code=6)
    code, out, _ = folder.ends("recover", "--scan", ".", "--policy", "resume")
    assert code == 6 and "the image is not there" in out
    another.rename(folder.base)  # another image takes the name
    assert "an interrupted commit is pending" in folder.fails("resize", "-f", "raw", "base.raw", "8M", code=3)
    assert "not the file" in folder.fails("resume", "base.raw", code=4)
    folder.done("abandon", "base.raw")
    assert folder.base.read_bytes() == folder.old and folder.left() == []
    folder.done(*COMMIT)
    assert folder.base.read_bytes() == folder.new


def test_a_new_image_supersedes_the_log_of_a_deleted_one(inner: Folder) -> None:
    half_resized(inner)
    inner.top.unlink()
    inner.done("create", "-q", "-f", "qcow2", "top.qcow2", "1M")
    assert inner.left() == [] and size(inner.top) == 1 << 20


def test_images_restored_from_a_backup_made_before(folder: Folder) -> None:
    """In place, over a pending operation whose log is still there: nothing is written over the backup."""
    before = folder.base.read_bytes(), folder.top.read_bytes()
    folder.killed(steps=4)  # the first that copies is on record as applied: what was before it is no possible crash
    for image, content in zip((folder.base, folder.top), before, strict=True):
        with image.open("r+b") as file:
            file.truncate(len(content))
            file.write(content)
    for verb in ("resume", "rollback"):
        for adopt in ((), ("--adopt",)):
            assert "safeimg abandon" in folder.fails(verb, *adopt, "base.raw", code=4)
    assert (folder.base.read_bytes(), folder.top.read_bytes()) == before
    folder.done("abandon", "base.raw", "--reason", "restored")
    assert (folder.base.read_bytes(), folder.top.read_bytes()) == before
    folder.done(*COMMIT)
    assert folder.base.read_bytes() == folder.new


@pytest.mark.parametrize("verb", ["resume", "rollback"])
def test_images_and_logs_restored_from_a_backup_made_during(inner: Folder, tmp_path: Path, verb: str) -> None:
    inner.killed()
    backup = tmp_path / "backup"
    subprocess.run(["cp", "-a", inner.path, backup], check=True)
    inner.done("resume", "base.raw")
    inner.path.rename(tmp_path / "done")  # kept: no file gets the number of one that was there
    subprocess.run(["cp", "-a", backup, inner.path], check=True)
    assert "add --adopt" in inner.fails(verb, "base.raw", code=4)
    inner.done(verb, "--adopt", "base.raw")
    assert inner.base.read_bytes() == (inner.new if verb == "resume" else inner.old)
    assert inner.shown(inner.top) == inner.new and inner.left() == []


def test_logs_restored_beside_images_from_after(folder: Folder) -> None:
    """The operation is long done: its old log does not take anything back."""
    folder.killed()
    logs = {name: (folder.path / name).read_bytes() for name in folder.left()}
    folder.done("resume", "base.raw")
    after = folder.base.read_bytes(), folder.top.read_bytes()
    for name, content in logs.items():
        (folder.path / name).write_bytes(content)
        (folder.path / name).chmod(0o600)
    for verb in ("resume", "rollback"):
        assert "safeimg abandon" in folder.fails(verb, "base.raw", code=4)
    assert (folder.base.read_bytes(), folder.top.read_bytes()) == after
    folder.done("abandon", "base.raw")
    assert (folder.base.read_bytes(), folder.shown(folder.top)) == (folder.new, folder.new) and folder.left() == []


def test_links_and_two_paths(folder: Folder) -> None:
    """One file, whatever it is called: hard links, here and elsewhere, symbolic links, relative and absolute."""
    (folder.path / "other").mkdir()
    os.link(folder.base, folder.path / "hard.raw")
    os.link(folder.base, folder.path / "other" / "hard.raw")
    (folder.path / "other" / "soft.raw").symlink_to("../base.raw")
    folder.killed()
    names = ("hard.raw", "other/hard.raw", "other/soft.raw", "other/../base.raw", str(folder.base))
    for name in names:
        assert "commit was interrupted" in folder.ends("status", name)[1], name
        assert "an interrupted commit is pending" in folder.fails("resize", "-f", "raw", name, "8M", code=3), name
    kept = folder.kept()
    for name in names:
        folder.put_back(kept)
        folder.done("rollback", name)
        assert folder.base.read_bytes() == folder.old and folder.left() == [], name


def test_bind_mounts(inner: Folder, tmp_path: Path) -> None:
    """Of the folder: its log is seen. Of the file alone: this host's index knows."""
    inner.killed()
    (tmp_path / "file.raw").touch()
    folder, file = tmp_path / "bound", tmp_path / "file.raw"
    with mounted(folder, "--bind", str(inner.path)), mounted(file, "--bind", str(inner.base)):
        kept = inner.kept()
        for name in ("../bound/base.raw", "../bound/top.qcow2", "../file.raw"):
            inner.put_back(kept)
            assert "commit was interrupted" in inner.ends("status", name)[1], name
            inner.done("rollback", name)
            assert inner.base.read_bytes() == inner.old and inner.left() == [], name


@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP"])
def test_no_byte_range_locks(folder: Folder, error: str) -> None:
    """A network file system without them: QEMU's words; without locking it works, and so does its recovery."""
    fault = Injected(folder.path, "fcntl,flock", f"error={error}", on=[folder.base, folder.top, folder.log])
    theirs = subprocess.run(
        [*fault.under, "qemu-img", "check", "top.qcow2"], cwd=folder.path, capture_output=True, check=False
    )
    said = theirs.stderr.decode().replace("qemu-img:", "safeimg:")
    assert folder.fails("check", "top.qcow2", under=fault.under) + "\n" == said
    unlocked = "driver=qcow2,file.filename=top.qcow2,file.locking=off,backing.file.locking=off"
    before = folder.kept()
    folder.killed("commit", "-r", "4M", "--image-opts", unlocked, under=fault.under)
    folder.settles_both_ways(under=fault.under)
    folder.put_back(before)  # else the overlay is empty, and the next one too short to be killed
    folder.killed("commit", "-r", "4M", "--image-opts", unlocked, under=fault.under)
    folder.done("abandon", "top.qcow2", under=fault.under)
    assert folder.left() == []
