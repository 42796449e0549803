"""measure: the same numbers as qemu-img."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twin import assert_same, qemu_img, qemu_io

SECRET = "secret,id=s,data=abc"

LINES = [
    "--size 1G", "--size 1G -O qcow2", "--size 1G -O qcow2 --output json", "--size 1G -O raw --output=json", "",
    "--size 1G small.qcow2", "small.qcow2", "--size x", "--size -1", "--size 8E", "-O foo --size 1", "--size 5",
    "-O qcow2 --size 9223372036854775807", "-O qcow2 --size 600", "-O qcow2 -o foo=1 --size 1G", "missing",
    "-O qcow2 -o help --size 1G", "-l foo --size 1", "-f raw --size 1", "-U --size 1", "--image-opts --size 1",
    "-l foo small.qcow2", "-l foo small.raw", "-l snapshot.foo=x small.qcow2", "-O vdi --size 1G", "a b",
    "-f qcow2 --image-opts a", "--output foo --size 1", "-O qcow2 small.raw", "-O qcow2 packed.qcow2",
    "-O qcow2 -o backing_file=small.qcow2 overlay.qcow2", "-O qcow2 overlay.qcow2", "-O qcow2 top.qcow2",
    "-O qcow2 -o compat=0.10 overlay.qcow2", "-O qcow2 -o cluster_size=4k overlay.qcow2", "-O qcow2 mixed.qcow2",
    "-O qcow2 -l snap1 snapshots.qcow2", "-O qcow2 -l 2 snapshots.qcow2", "-O qcow2 -l 9 snapshots.qcow2",
    "-O qcow2 tera.qcow2", "-O qcow2 -o preallocation=full late.qcow2", "-O qcow2 ten.raw", "-O qcow2 on-odd.qcow2",
    "-O qcow2 metadata.qcow2", "-O qcow2 full.qcow2", "-O raw tera.qcow2", "-O raw odd.raw",
    "-O qcow2 -o cluster_size=3 --size 1", "-O qcow2 -o compat=foo --size 1",
    "-O qcow2 -o preallocation=foo --size 1", "-O qcow2 -o refcount_bits=3 --size 1",
    "-O qcow2 -o compat=0.10,refcount_bits=1 --size 1", "-O qcow2 -o lazy_refcounts=on,compat=0.10 --size 1",
    "-O qcow2 -o encrypt.format=luks --size 1", "-O qcow2 -o encrypt.format=luks,encrypt.key-secret=nope --size 1G",
    "-O qcow2 -o encrypt.format=aes --size 1G", "-O qcow2 -o extended_l2=on,cluster_size=4k --size 1G",
    "-O qcow2 -o size=x --size 1G", "-O qcow2 -o cluster_size=x --size 1G", "-O qcow2 -o extent_size_hint=1M --size 1G",
    f"--object {SECRET} -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 --size 1G",
]  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_as_qemu_img(images: Path, line: str) -> None:
    assert_same(["measure", *line.split()], images)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    size=st.integers(0, 1 << 44),
    bits=st.integers(9, 21),
    order=st.integers(0, 6),
    extended=st.booleans(),
)
def test_empty_images(images: Path, size: int, bits: int, order: int, extended: bool) -> None:
    options = f"cluster_size={1 << bits},refcount_bits={1 << order},extended_l2={'on' if extended else 'off'}"
    assert_same(["measure", "-O", "qcow2", "-o", options, "--size", str(size)], images)


def test_bitmaps(images: Path) -> None:
    qemu_img(["create", "-f", "qcow2", "bitmaps.qcow2", "10G"], images)
    qemu_io(images, "-c", "write 1M 1M", "bitmaps.qcow2")
    for name, granularity in (("a", "64k"), ("ninechars", "4k"), ("x" * 300, "512")):
        qemu_img(["bitmap", "--add", "-g", granularity, "bitmaps.qcow2", name], images)
        for options in ("cluster_size=64k", "cluster_size=512", "cluster_size=2M", "compat=0.10"):
            assert_same(["measure", "-O", "qcow2", "-o", options, "bitmaps.qcow2"], images)
