"""The command lines of programs that call qemu-img, as they call it: by that name, in a process of its own.

Some take any stderr for a failure, others anything but progress on stdout: all of both is compared."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from twin import Outcome, qemu_img, qemu_io

C_LOCALE = {"LC_ALL": "C", "LANG": "C"}
PROGRESS = re.compile(rb"\((\d?\d\.\d\d)/100%\)")


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """safeimg under qemu-img's name, as a distribution would install it."""
    path = tmp_path_factory.mktemp("bin") / "qemu-img"
    path.write_text(f"#!{sys.executable}\nfrom safeimg.cli.start import main\nmain()\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def folders(images: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two folders with the same images: one for each program."""
    made = []
    for name in ("ours", "theirs"):
        folder = tmp_path / name
        folder.mkdir()
        for image in ("small.qcow2", "overlay.qcow2", "small.raw", "late.qcow2"):
            shutil.copy(images / image, folder)
        made.append(folder)
    return made[0], made[1]


def run(
    program: str | Path, words: list[str], folder: Path, *, limit: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
) -> Outcome:  # fmt: skip
    done = subprocess.run(
        [program, *words], cwd=folder, capture_output=True, timeout=120, preexec_fn=limit,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def both(
    link: Path, folders: tuple[Path, Path], line: str, *, limit: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
) -> Outcome:  # fmt: skip
    """What both programs do with a command line, which is the same."""
    ours = run(link, line.split(), folders[0], limit=limit, environment=environment)
    theirs = run("qemu-img", line.split(), folders[1], limit=limit, environment=environment)
    assert ours == theirs
    return ours


def same_content(folders: tuple[Path, Path], name: str) -> None:
    ours, theirs = (str(folder / name) for folder in folders)
    assert qemu_img(["compare", ours, theirs], folders[0]).code == 0


def openstack_limits() -> None:
    """As oslo.concurrency sets them for `qemu-img info` of images of strangers."""
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (2, 2))


def test_libvirt(link: Path, folders: tuple[Path, Path]) -> None:
    both(link, folders, "create -f qcow2 -b small.qcow2 -o backing_fmt=qcow2,compat=0.10 volume 102400K")
    both(link, folders, "convert -f qcow2 -O raw -o preallocation=falloc volume copy.raw")
    both(link, folders, "convert -f raw -O qcow2 -o compat=0.10 small.raw copy.qcow2")
    both(link, folders, "resize copy.qcow2 204800000")
    both(link, folders, "resize copy.raw 204800000")
    for name in ("volume", "copy.raw", "copy.qcow2"):
        same_content(folders, name)
        ours, theirs = ((folder / name).stat() for folder in folders)
        assert (ours.st_uid, ours.st_gid, ours.st_mode) == (theirs.st_uid, theirs.st_gid, theirs.st_mode)
    for folder in folders:
        (folder / "volume").chmod(0o600)
    both(link, folders, "resize volume 204800K")
    assert (folders[0] / "volume").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in folders[0].iterdir()) == sorted(path.name for path in folders[1].iterdir())


def test_openstack(link: Path, folders: tuple[Path, Path]) -> None:
    for name in ("small.qcow2", "overlay.qcow2", "small.raw", "missing"):
        line = f"info {name} --force-share --output=json"
        done = both(link, folders, line, limit=openstack_limits, environment=C_LOCALE)
        if done.code == 0:
            found = json.loads(done.stdout)
            assert {"virtual-size", "format", "filename", "actual-size"} <= found.keys()
    both(link, folders, "create -f qcow2 -b small.qcow2 -F qcow2 delta")
    for folder in folders:
        qemu_io(folder, "-c", "write -P 3 64k 64k", "delta")
    both(link, folders, "rebase -u -F qcow2 -b small.qcow2 delta")
    both(link, folders, "commit -d delta")
    same_content(folders, "small.qcow2")
    both(link, folders, "convert -t none -O raw -f qcow2 small.qcow2 image.part")
    same_content(folders, "image.part")
    version = run(link, ["--version"], folders[0], environment=C_LOCALE)
    assert re.search(rb"qemu-img version ([0-9]+\.[0-9]+\.[0-9]+)", version.stdout) and not version.stderr


def test_containerized_data_importer(link: Path, folders: tuple[Path, Path]) -> None:
    words = ["convert", "-t", "writeback", "-p", "-O", "raw", "late.qcow2", "disk.img"]
    ours, theirs = (run(program, words, folder)
                    for program, folder in ((link, folders[0]), ("qemu-img", folders[1])))  # fmt: skip
    assert (ours.code, ours.stderr) == (theirs.code, theirs.stderr) == (0, b"")
    steps = [float(match) for match in PROGRESS.findall(ours.stdout)]
    assert steps == sorted(steps) and steps[0] == 0
    assert PROGRESS.sub(b"", ours.stdout).translate(None, b" \r\n") == b"(100.00/100%)"
    same_content(folders, "disk.img")
    both(link, folders, "convert -t none -O raw -o preallocation=foo small.qcow2 disk2.img")
    both(link, folders, "create -f raw -o preallocation=falloc blank.img 1M")
    both(link, folders, "info --output=json small.qcow2")


def test_proxmox(link: Path, folders: tuple[Path, Path]) -> None:
    for folder in folders:
        qemu_img(["create", "-f", "raw", "target.raw", "20M"], folder)
    done = run(link, ["convert", "-p", "-n", "-f", "qcow2", "-O", "raw", "late.qcow2", "target.raw"], folders[0])
    assert (done.code, done.stderr) == (0, b"")
    run("qemu-img", ["convert", "-p", "-n", "-f", "qcow2", "-O", "raw", "late.qcow2", "target.raw"], folders[1])
    same_content(folders, "target.raw")
    for name in ("small.qcow2", "small.raw", "late.qcow2") * 3:
        both(link, folders, f"info --output=json {name}")
    both(link, folders, "info -f raw --output=json small.raw")


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_proxmox_reads_standard_output(link: Path, folders: tuple[Path, Path], kind: str) -> None:
    """`convert -O raw FILE /dev/stdout`, into a file; into a pipe it is refused as qemu-img does."""
    found = []
    for program, folder in ((link, folders[0]), ("qemu-img", folders[1])):
        words = [program, "convert", "-O", "raw", "small.qcow2", "/dev/stdout"]
        if kind == "pipe":
            found.append(run(program, words[1:], folder))  # type: ignore[arg-type]
            continue
        with (folder / "stream").open("w+b") as stream:
            done = subprocess.run(words, cwd=folder, stdout=stream, stderr=subprocess.PIPE, timeout=120)
        found.append(Outcome(done.returncode, (folder / "stream").read_bytes(), done.stderr))
    assert found[0] == found[1]


def test_vdsm(link: Path, folders: tuple[Path, Path]) -> None:
    for folder in folders:
        qemu_img(["create", "-f", "qcow2", "target.qcow2", "1M"], folder)
        qemu_img(["bitmap", "--add", "small.qcow2", "b0"], folder)
    line = "convert -t none -T none -n -W --target-is-zero --bitmaps -f qcow2 -O qcow2 small.qcow2 target.qcow2"
    done = both(link, folders, line)
    assert done == Outcome(0, b"", b"")
    same_content(folders, "target.qcow2")
    both(link, folders, "check --output json -f qcow2 small.qcow2")
    for folder in folders:
        qemu_img(["create", "-f", "qcow2", "target.qcow2", "1M"], folder)
    progress = run(link, ["convert", "-p", *line.split()[1:]], folders[0])
    assert progress.code == 0 and PROGRESS.search(progress.stdout)
    both(link, folders, "measure --output json -O qcow2 small.qcow2")


def test_vdsm_aborts_by_sigkill(link: Path, folders: tuple[Path, Path]) -> None:
    """What is left is no image that anybody would take for a whole one, and the same command begins anew."""
    words = [str(link), "convert", "-t", "none", "-f", "qcow2", "-O", "qcow2", "late.qcow2", "copy.qcow2"]
    process = subprocess.Popen(words, cwd=folders[0])
    time.sleep(0.4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(words, cwd=folders[0], capture_output=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert qemu_img(["compare", "late.qcow2", "copy.qcow2"], folders[0]).code == 0


def test_virt_v2v(link: Path, folders: tuple[Path, Path]) -> None:
    part = {"driver": "raw", "offset": 65536, "size": 131072, "file": {"driver": "file", "filename": "small.raw"}}
    name = "json:" + json.dumps(part, separators=(",", ":"))
    both(link, folders, f"info --output json {name}")
    both(link, folders, f"convert -O raw {name} part.raw")
    same_content(folders, "part.raw")
    both(link, folders, "create -q -b small.qcow2 -o compat=1.1,backing_fmt=qcow2 -f qcow2 overlay1.qcow2")


def listens_for(pid: int, number: signal.Signals) -> bool:
    """Whether the signal is caught or ignored."""
    text = Path(f"/proc/{pid}/status").read_text()
    masks = [int(mask, 16) for mask in re.findall(r"^Sig(?:Ign|Cgt):\s*([0-9a-f]+)$", text, re.MULTILINE)]
    return any(mask >> (number - 1) & 1 for mask in masks)


def test_sigusr1_right_after_the_start(link: Path, folders: tuple[Path, Path]) -> None:
    """Asks for progress. Programs send it without knowing whether it is listened for already."""
    words = [str(link), "convert", "-O", "raw", "late.qcow2", "copy.raw"]
    process = subprocess.Popen(words, cwd=folders[0], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not listens_for(process.pid, signal.SIGUSR1):  # what the interpreter takes to start is not ours
        time.sleep(0.001)
    while process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.01)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0
    assert PROGRESS.sub(b"", stderr).translate(None, b" \r\n") in (b"", b"(100.00/100%)")
    qemu_img(["convert", "-O", "raw", "late.qcow2", "copy.raw"], folders[1])
    same_content(folders, "copy.raw")
