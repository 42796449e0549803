"""resize, given to safeimg and to qemu-img: same output and exit code, same guest content, clean metadata."""

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
    run(folder, "create -q -f qcow2 a.qcow2 10M")
    qemu_io(folder, "-c", "write -P 1 0 9M", "a.qcow2")
    run(folder, "create -q -f qcow2 -b a.qcow2 -F qcow2 overlay.qcow2 1M")
    qemu_io(folder, "-c", "write -P 2 0 100k", "overlay.qcow2")
    run(folder, "create -q -f qcow2 -o cluster_size=4k,compat=0.10 v2.qcow2 8M")
    qemu_io(folder, "-c", "write -P 3 0 8M", "v2.qcow2")
    run(folder, "create -q -f qcow2 -o cluster_size=1k shared.qcow2 4M")
    qemu_io(folder, "-c", "write -P 4 0 4M", "shared.qcow2")
    run(folder, "snapshot -c kept shared.qcow2")
    qemu_io(folder, "-c", "write -P 5 1M 1M", "shared.qcow2")
    run(folder, "create -q -f qcow2 bitmaps.qcow2 20M")
    run(folder, "bitmap --add -g 4k bitmaps.qcow2 fine")
    qemu_io(folder, "-c", "write -P 6 0 1M", "-c", "write -P 6 19M 1M", "bitmaps.qcow2")
    run(folder, "create -q -f vdi disk.vdi 3M")
    (folder / "disk.raw").write_bytes(b"raw" * 350000)


IMAGES = ("a.qcow2", "overlay.qcow2", "v2.qcow2", "shared.qcow2", "bitmaps.qcow2", "disk.raw", "disk.vdi")
SIZES = (
    "+1M", "--shrink -512k", "--shrink 512", "-1k", "+0", "1k", "70000k", "--preallocation=metadata +1M",
    "--preallocation=falloc +3M", "--preallocation=full +70000", "--preallocation=full +1100k", "-100G", "+100",
)


@pytest.mark.parametrize("image", IMAGES)
def test_same_as_qemu_img(tmp_path: Path, image: str) -> None:
    kept, theirs, ours = tmp_path / "kept", tmp_path / "theirs", tmp_path / "ours"
    kept.mkdir()
    make_images(kept)
    for size in SIZES:
        for folder in (theirs, ours):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(kept, folder)
        *options, last = size.split()
        line = ["resize", *options, image, last]
        expected = qemu_img(line, theirs)
        assert safeimg(line, ours, name="qemu-img") == expected, size
        assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in kept.iterdir())
        compared = qemu_img(["compare", str(theirs / image), str(ours / image)], tmp_path)
        assert compared.code == 0, (size, compared)
        assert (size, virtual_size(ours / image)) == (size, virtual_size(theirs / image))
        if not image.endswith(".raw"):
            checked = qemu_img(["check", image], ours)
            assert checked.code == 0, (size, checked)
        if expected.code == 0 and options != ["--preallocation=metadata"]:  # where holes are is up to the layout
            assert abs(allocated(ours / image) - allocated(theirs / image)) <= 1 << 20, size


@pytest.mark.parametrize(
    "line",
    [
        "a.qcow2", "", "a.qcow2 foo", "a.qcow2 +foo", "-f qcow2 --shrink -10M a.qcow2", "a.qcow2 10k x 20M",
        "--preallocation=bad a.qcow2 +1M", "nothing +5", "-f foo a.qcow2 5M", "-q a.qcow2 30M", "a.qcow2 99999999999G",
        "a.qcow2 17179869184G", "--shrink --preallocation=full a.qcow2 1M", "-f raw disk.raw 2M", "-x a.qcow2 5M",
    ],
)
def test_messages(tmp_path: Path, line: str) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    make_images(theirs)
    shutil.copytree(theirs, ours)
    words = ["resize", *line.split()]
    expected = qemu_img(words, theirs)
    assert safeimg(words, ours, name="qemu-img") == expected


def virtual_size(image: Path) -> int:
    return int(json.loads(qemu_img(["info", "--output=json", str(image)], image.parent).stdout)["virtual-size"])


def allocated(image: Path) -> int:
    return image.stat().st_blocks * 512


