"""bench: qemu-img's output, and what it writes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safeimg.drivers.storage.file import LocalFileSystem
from twin import Outcome, qemu_img, safeimg

LINES = [
    "", "a b", "-c 10 -d 2 small.qcow2", "-c x small.qcow2", "-c 0 small.qcow2", "-c -1 small.qcow2",
    "-p -c 1 small.qcow2",
    "-c 3000000000 small.qcow2", "-c 1k small.qcow2", "-d x small.qcow2", "-s x small.qcow2", "-s 5G small.qcow2",
    "-S 0 -c 2 small.qcow2", "-S x small.qcow2", "-o x small.qcow2", "-o 2M -c 2 small.qcow2", "-i foo small.qcow2",
    "-i native -c 2 small.qcow2", "-n -c 2 small.qcow2", "-i threads -c 2 small.qcow2", "-t foo small.qcow2",
    "--pattern=300 -w small.qcow2", "--pattern=5 -c 2 small.qcow2", "--flush-interval=2 -c 2 small.qcow2",
    "--flush-interval=1 -w -c 4 -d 2 small.qcow2", "--flush-interval=x -w small.qcow2", "-q -c 1 small.qcow2",
    "-f raw -c 1 small.qcow2", "-U -w -c 1 small.qcow2", "-U -c 1 small.qcow2", "-c 1 missing",
    "-c 300 -S 1M late.qcow2",
    "--image-opts driver=qcow2,file.filename=small.qcow2 -c 1", "-s 700 -c 2 small.qcow2", "-o 700 -c 2 small.qcow2",
    "-s 2M -c 1 small.qcow2", "-s 0 -c 3 small.qcow2", "-c 2 top.qcow2", "-c 0x10 -d 010 small.qcow2",
]  # fmt: skip
WRITES = [
    "-w -c 20 --pattern=5", "-w -c 40 -s 64k -o 3k --pattern 7", "-w -c 30 -S 40k -s 700 -o 123 --pattern 255",
    "-w -c 4 -d 2 --flush-interval=2 --pattern 9", "-w -c 8 --no-drain --flush-interval=64 --pattern 1",
    "-w -c 3 -s 4k -S 1k --pattern 3", "-w -c 20 -S 100 -o 100 --pattern 7",
    "-w -c 60 -S 300k -s 700 -o 99 --pattern 8", "-w -c 12 -d 1 -s 3000 -S 2500 -o 99 --flush-interval=1 --pattern 6",
    "-w -c 2 -o 1M", "-w -c 0", "-w -c 300 -s 8k --pattern 4 -t none",
]  # fmt: skip


def masked(outcome: Outcome) -> Outcome:
    return outcome._replace(stdout=re.sub(rb"completed in \d+\.\d{3} seconds", b"completed", outcome.stdout))


@pytest.mark.parametrize("line", LINES)
def test_reading(images: Path, line: str) -> None:
    words = ["bench", *line.split()]
    assert masked(safeimg(words, images, name="qemu-img")) == masked(qemu_img(words, images))


@pytest.mark.parametrize("line", WRITES)
@pytest.mark.parametrize("image", ["small.qcow2", "packed.qcow2", "overlay.qcow2", "small.raw"])
def test_writing(images: Path, tmp_path: Path, image: str, line: str) -> None:
    shutil.copy(images / "small.qcow2", tmp_path)
    outcomes = []
    for program, name in ((safeimg, "ours"), (qemu_img, "theirs")):
        shutil.copy(images / image, tmp_path / name)
        if image == "packed.qcow2":
            qemu_img(["snapshot", "-c", "one", name], tmp_path)
            qemu_img(["bitmap", "--add", "-g", "512", name, "bits"], tmp_path)
        fmt = image.rpartition(".")[2]
        words = ["bench", "-f", fmt, *line.split(), name]
        given = {"name": "qemu-img"} if program is safeimg else {}
        outcomes.append(masked(program(words, tmp_path, **given)))  # type: ignore[operator]
    assert outcomes[0] == outcomes[1]
    assert qemu_img(["compare", "-f", fmt, "-F", fmt, "ours", "theirs"], tmp_path).code == 0
    if fmt == "qcow2":
        assert qemu_img(["check", "ours"], tmp_path).code == 0


def test_locked(images: Path, tmp_path: Path) -> None:
    """What somebody writes to is neither read nor written."""
    shutil.copy(images / "small.qcow2", tmp_path / "image")
    before = (tmp_path / "image").read_bytes()
    file = LocalFileSystem().open(str(tmp_path / "image"), write=True, locking=True)
    try:
        done = safeimg(["bench", "-w", "-c", "1", "image"], tmp_path, name="qemu-img")
        assert done == qemu_img(["bench", "-w", "-c", "1", "image"], tmp_path)
    finally:
        file.close()
    assert done.code == 1 and b"lock" in done.stderr
    assert (tmp_path / "image").read_bytes() == before
