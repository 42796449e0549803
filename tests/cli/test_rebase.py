"""rebase, given to safeimg and to qemu-img: same output and exit code, same guest content, clean metadata."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from twin import qemu_img, qemu_io, safeimg

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-img and qemu-io are not installed"
)


def run(folder: Path, line: str) -> None:
    assert qemu_img(line.split(), folder).code == 0


def make_images(folder: Path) -> None:
    run(folder, "create -q -f qcow2 root.qcow2 3M")
    qemu_io(folder, "-c", "write -P 1 0 3M", "root.qcow2")
    run(folder, "create -q -f qcow2 -o cluster_size=4k -b root.qcow2 -F qcow2 old.qcow2 2M")
    qemu_io(folder, "-c", "write -P 2 100k 300k", "-c", "write -z 1M 128k", "old.qcow2")
    run(folder, "create -q -f qcow2 -o compat=0.10 new.qcow2 4M")
    qemu_io(folder, "-c", "write -P 1 0 64k", "-c", "write -P 3 200k 1M", "-c", "write -P 4 3M 1M", "new.qcow2")
    (folder / "new.raw").write_bytes(bytes(range(1, 241)) * 4096)
    for name, options in (("top", ""), ("v2", "-o compat=0.10"), ("small", "-o cluster_size=512")):
        run(folder, f"create -q -f qcow2 {options} -b old.qcow2 -F qcow2 {name}.qcow2 3584k")
        written = ("write -P 9 1500 700", "write -P 8 3M 100k", "write -z 1200k 64k")
        qemu_io(folder, *(word for each in written for word in ("-c", each)), f"{name}.qcow2")
    run(folder, "snapshot -c kept top.qcow2")
    run(folder, "create -q -f vdi disk.vdi 3M")


TARGETS = (
    "-b new.qcow2 -F qcow2", "-b new.raw -F raw", "-b root.qcow2 -F qcow2", "-b old.qcow2 -F qcow2",
    "-u -b new.raw -F raw",
)


@pytest.mark.parametrize("image", ["top.qcow2", "v2.qcow2", "small.qcow2"])
@pytest.mark.parametrize("target", [*TARGETS, "-b"])
def test_same_as_qemu_img(tmp_path: Path, image: str, target: str) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    make_images(theirs)
    shutil.copytree(theirs, ours)
    words = ["rebase", *target.split(), *([""] if target == "-b" else []), image]
    expected = qemu_img(words, theirs)
    assert safeimg(words, ours, name="qemu-img") == expected
    assert expected.code == 0
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    compared = qemu_img(["compare", str(theirs / image), str(ours / image)], tmp_path)
    assert compared.code == 0, compared
    assert qemu_img(["check", image], ours).code == 0
    found = [json.loads(qemu_img(["info", "--output=json", image], folder).stdout) for folder in (theirs, ours)]
    for name in ("actual-size", "filename", "snapshots"):
        for each in found:
            each.pop(name, None)
    assert found[0] == found[1]
    assert mapped(ours, image) == mapped(theirs, image)


def mapped(folder: Path, image: str) -> list[tuple[int, int, int, bool, bool]]:
    """How the image's guest ranges are stored, wherever that is."""
    runs: list[tuple[int, int, int, bool, bool]] = []
    for each in json.loads(qemu_img(["map", "--output=json", image], folder).stdout):
        start, length, *kind = (each[name] for name in ("start", "length", "depth", "zero", "data"))
        if runs and list(runs[-1][2:]) == kind:
            start, length = runs[-1][0], runs[-1][1] + length
            runs.pop()
        runs.append((start, length, *kind))
    return runs


@pytest.mark.parametrize(
    "line",
    [
        "top.qcow2", "-b new.qcow2 top.qcow2", "-F qcow2 top.qcow2", "-b nothing -F qcow2 top.qcow2",
        "-b new.qcow2 -F foo top.qcow2", "-b new.qcow2 -F qcow2 -t foo top.qcow2",
        "-b new.qcow2 -F qcow2 -T foo top.qcow2", "-u top.qcow2",
        "-f raw -b new.qcow2 -F qcow2 new.raw", "-u -b new.qcow2 top.qcow2", "-u -f raw -b new.qcow2 -F qcow2 new.raw",
        "-u -b new.qcow2 -F qcow2 disk.vdi", "-b new.qcow2 -F qcow2 disk.vdi", "", "-b new.qcow2 -F qcow2 top.qcow2 x",
        "-b new.qcow2 -F qcow2 missing", "-b top.qcow2 -F qcow2 top.qcow2", "-p -u -b new.raw -F raw top.qcow2",
    ],
)
def test_messages(tmp_path: Path, line: str) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    make_images(theirs)
    shutil.copytree(theirs, ours)
    words = ["rebase", *line.split()]
    assert safeimg(words, ours, name="qemu-img") == qemu_img(words, theirs)
