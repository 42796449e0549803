"""Filling guest ranges step by step: what a step may take has been made ready before it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import trio
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.transfer.core import Settings, Transfer
from safeimg.journal.history import MemoryHistory
from safeimg.ops.commit_job import commit
from safeimg.ops.launch import Environment

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-img and qemu-io are not installed"
)


def run(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


@pytest.mark.parametrize("commands", [
    pytest.param(["write -z 0 4M"], id="one long range: a new L2 table for every 32 KiB"),
    pytest.param([f"write -z {number * 64}k 512" for number in range(160)], id="many short ones"),
    pytest.param([f"write {number * 64}k 512" for number in range(160)], id="data in as many tables"),
])
def test_a_step_has_the_tables_that_it_needs(tmp_path: Path, commands: list[str]) -> None:
    raw, base, top = (tmp_path / name for name in ("raw", "base.qcow2", "top.qcow2"))
    raw.write_bytes(b"\1" * (16 << 20))
    run("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", "-b", raw, "-F", "raw", base)
    run("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=512", "-b", base, "-F", "qcow2", top)
    run("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), top)
    expected = tmp_path / "expected"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, expected)
    environment = Environment(LocalFileSystem(), MemoryHistory(), Transfer(Settings(workers=1)))
    trio.run(lambda: commit(environment, str(top), drop=True, step_bytes=1 << 14))
    run("qemu-img", "check", "-f", "qcow2", base)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", expected, base)


def test_short_places_in_many_clusters(tmp_path: Path) -> None:
    """With extended L2 entries a fresh place may be much shorter than the cluster that is taken for it."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    run("qemu-img", "create", "-f", "qcow2", "-o", "cluster_size=16k,extended_l2=on,refcount_bits=64", base, "40M")
    expected = tmp_path / "expected"
    expected.write_bytes((bytes(3072) + b"\1" * 512 + bytes(12800)) * 2400 + bytes(160 * 16384))
    run("qemu-img", "convert", "-S", "512", "-O", "qcow2", "-o", "cluster_size=512", expected, top)
    run("qemu-img", "rebase", "-u", "-b", base, "-F", "qcow2", top)
    environment = Environment(LocalFileSystem(), MemoryHistory(), Transfer(Settings(workers=1)))
    trio.run(lambda: commit(environment, str(top), drop=True, step_bytes=2 << 20))
    run("qemu-img", "check", "-f", "qcow2", base)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", expected, base)
    assert base.stat().st_blocks * 512 < 2400 * 4096 + (1 << 20)  # only the parts that were written
