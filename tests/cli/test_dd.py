"""dd: the same output and the same content as qemu-img's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twin import assert_same, qemu_img, safeimg

LINES = [
    "", "if=small.qcow2", "of=OUT", "if=small.qcow2 of=OUT", "if=x701z.raw of=OUT", "if=x701.raw of=OUT bs=3000",
    "if=two-data.raw of=OUT bs=1k count=3 skip=2", "if=two-data.raw of=OUT bs=0", "if=two-data.raw of=OUT bs=x",
    "if=two-data.raw of=OUT bs=-1", "if=two-data.raw of=OUT bs=3G", "if=two-data.raw of=OUT count=x",
    "if=two-data.raw of=OUT count=-1", "if=two-data.raw of=OUT skip=x", "if=two-data.raw of=OUT skip=1000",
    "if=two-data.raw of=OUT count=0", "if=two-data.raw of=OUT foo=1", "foo", "=3", "bs=1k bs=",
    "-O qcow2 if=small.raw of=OUT", "-O foo if=small.raw of=OUT", "-f qcow2 if=small.raw of=OUT",
    "-O vdi if=small.raw of=OUT", "if=small.raw if=empty.qcow2 of=OUT", "-n if=small.raw of=OUT",
    "-U if=ten.raw of=OUT",
    "--image-opts if=driver=raw,file.filename=small.raw of=OUT", "--image-opts -f raw if=x of=OUT",
    "if=missing of=OUT", "if=small.raw of=folder/none/x", "if=small.raw of=OUT bs=512 count=1 skip=19",
    "if=small.raw of=OUT count=9223372036854775807", "if=small.raw of=OUT skip=9223372036854775807",
    "if=two-data.raw of=OUT bs=700 skip=1 count=2", "if=top.qcow2 of=OUT bs=1M",
    "-O qcow2 if=packed.qcow2 of=OUT bs=7k",
    "-p if=small.raw of=OUT", "if= of=OUT", "if=overlay.qcow2 of=OUT bs=64k skip=1",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_as_qemu_img(images: Path, line: str) -> None:
    for name in ("theirs", "ours", "OUT"):
        (images / name).unlink(missing_ok=True)
    words = ["dd", *line.split()]
    theirs = qemu_img(words, images)
    if (images / "OUT").exists():
        (images / "OUT").rename(images / "theirs")
    ours = safeimg(words, images, name="qemu-img")
    assert ours == theirs
    assert (images / "OUT").exists() == (images / "theirs").exists()
    if (images / "OUT").exists():
        assert qemu_img(["compare", "-s", "OUT", "theirs"], images).code == 0


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    name=st.sampled_from(["small.qcow2", "packed.qcow2", "overlay.qcow2", "odd.raw", "x701z.raw"]),
    block=st.integers(1, 300_000),
    count=st.none() | st.integers(0, 3000),
    skip=st.none() | st.integers(0, 300),
    fmt=st.sampled_from(["raw", "qcow2"]),
)
def test_parts(images: Path, name: str, block: int, count: int | None, skip: int | None, fmt: str) -> None:
    block = max(block, 700)  # smaller ones take qemu-img seconds
    operands = [f"{key}={value}" for key, value in (("count", count), ("skip", skip)) if value is not None]
    words = ["dd", "-O", fmt, f"bs={block}", *operands, f"if={name}"]
    theirs, ours = qemu_img([*words, "of=theirs"], images), safeimg([*words, "of=ours"], images, name="qemu-img")
    assert ours == theirs
    assert qemu_img(["compare", "-f", fmt, "-F", fmt, "ours", "theirs"], images).code == 0
    assert qemu_img(["info", "-f", fmt, "ours"], images).code == 0


def test_a_copy_onto_itself_is_refused(images: Path) -> None:
    shutil.copy(images / "small.raw", images / "self.raw")
    done = safeimg(["dd", "if=self.raw", "of=self.raw"], images)
    assert done.code == 1 and b"lock" in done.stderr
    assert (images / "self.raw").read_bytes() == (images / "small.raw").read_bytes()


def test_image_opts_name_the_input_alone(images: Path) -> None:
    assert_same(["dd", "--image-opts", "if=driver=raw,size=1k,file.filename=small.raw", "of=driver=x"], images)
    assert (images / "driver=x").stat().st_size == 1024
