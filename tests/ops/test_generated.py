"""Generated images of every kind, converted and committed: QEMU accepts each as clean and reads the same content.

`SAFEIMG_GENERATED=500 pytest tests/ops/test_generated.py` makes so many instead of a few."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.transfer.core import Settings, Transfer
from safeimg.drivers.transfer.view import View
from safeimg.journal.history import MemoryHistory
from safeimg.ops.commit_job import commit
from safeimg.ops.convert import convert
from safeimg.ops.convert_options import Options
from safeimg.ops.launch import Environment

COUNT = int(os.environ.get("SAFEIMG_GENERATED", "12"))

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="qemu-img and qemu-io are not installed"
)


def qemu(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.returncode} {done.stdout[-500:]}{done.stderr[-500:]}"
    return done.stdout


def info(path: Path) -> Any:
    return json.loads(qemu("qemu-img", "info", "--output=json", path))


def environment() -> Environment:
    return Environment(LocalFileSystem(), MemoryHistory(), Transfer(Settings(workers=2)))


class Generator:
    """Images from a seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.rng = random.Random(seed)

    def options(self) -> dict[str, str]:
        version = self.rng.choice(("0.10", "1.1", "1.1", "1.1"))
        cluster = self.rng.choice((512, 1024, 4096, 16384, 65536, 65536, 1 << 20, 2 << 20))
        found = {"compat": version, "cluster_size": str(cluster)}
        if version == "1.1":
            found["refcount_bits"] = str(self.rng.choice((1, 2, 4, 8, 16, 32, 64)))
            found["compression_type"] = self.rng.choice(("zlib", "zstd"))
            if cluster >= 16384 and self.rng.random() < 0.6:
                found["extended_l2"] = "on"
        return found

    def size(self) -> int:
        """Up to some MiB, and rarely a multiple of the cluster; qcow2 wants one of the sector."""
        return self.rng.randrange(1, 12 << 11) * 512

    def create(self, name: str, size: int, *backing: str) -> Path:
        path = self.folder / name
        options = ",".join(f"{key}={value}" for key, value in self.options().items())
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, path, size)
        return path

    def write(self, path: Path, size: int, count: int) -> None:
        """Data, zeroes, discards and compressed clusters anywhere, aligned or not."""
        cluster = info(path)["cluster-size"]
        words: list[str] = []
        packed: list[str] = []
        for number in range(count):
            kind = self.rng.choice(("data", "data", "data", "zero", "unmap", "compressed"))
            length = min(self.rng.randrange(1, 512) * 512, size)
            start = self.rng.randrange(0, size - length + 512) // 512 * 512
            if kind == "compressed":
                start = start // cluster * cluster
                if start + cluster > size:
                    continue
                packed += ["-c", f"write -c -P {number % 255 + 1} {start} {cluster}"]
            else:
                flag = {"data": f"-P {number % 255 + 1}", "zero": "-z", "unmap": "-z -u"}[kind]
                words += ["-c", f"write {flag} {start} {length}"]
        # Compressed ones come first: compressing over what was discarded makes QEMU 7.2 leave images that it finds
        # fault with itself. It refuses to compress over an allocated cluster and goes on with the next command.
        subprocess.run(["qemu-io", "-f", "qcow2", *packed, *words, path], capture_output=True, check=False)
        qemu("qemu-img", "check", "-q", path)


def read(path: Path, fmt: str) -> bytes:
    """The content as safeimg reads it."""
    chain = open_chain(LocalFileSystem(), str(path), format=fmt)
    try:
        view = View(chain)
        data = bytearray(view.size)
        view.read_into(0, memoryview(data))
        return bytes(data)
    finally:
        close_chain(chain)


@pytest.mark.parametrize("seed", range(COUNT))
def test_convert(tmp_path: Path, seed: int) -> None:
    made = Generator(tmp_path, seed)
    size = made.size()
    source = made.create("source", size)
    made.write(source, size, 20)
    if made.rng.random() < 0.5:
        top = made.create("top", size, "-b", "source", "-F", "qcow2")
        made.write(top, size, 8)
        source = top
    compress = made.rng.random() < 0.4
    target = tmp_path / "target"
    trio.run(convert, environment(), Options(
        (str(source),), str(target), source_format="qcow2", target_format="qcow2", compress=compress,
        create_options=[f"{name}={value}" for name, value in made.options().items()],
    ))
    qemu("qemu-img", "check", "-q", "-f", "qcow2", target)
    qemu("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", source, target)
    back = tmp_path / "back"
    trio.run(convert, environment(), Options((str(target),), str(back), source_format="qcow2", target_format="raw"))
    qemu("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", back, target)
    assert read(source, "qcow2") == read(target, "qcow2") == back.read_bytes()


@pytest.mark.parametrize("seed", range(COUNT))
def test_commit(tmp_path: Path, seed: int) -> None:
    made = Generator(tmp_path, 1000 + seed)
    size = made.size()
    base = made.create("base", size)
    made.write(base, size, 20)
    bits = info(base)["format-specific"]["data"]["refcount-bits"]
    if made.rng.random() < 0.4 and bits >= 16:  # narrow ones have no room to count a snapshot
        qemu("qemu-img", "snapshot", "-c", "kept", base)
    larger = size + (made.rng.randrange(0, 4 << 11) * 512 if made.rng.random() < 0.4 else 0)
    if "snapshots" in info(base):
        larger = size  # version 2 images with snapshots do not grow
    top = made.create("top", larger, "-b", "base", "-F", "qcow2")
    made.write(top, larger, 12)
    expected = tmp_path / "expected"
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, expected)
    drop = made.rng.random() < 0.3
    trio.run(lambda: commit(environment(), str(top), drop=drop, step_bytes=1 << 20))
    for image in (base, top):
        qemu("qemu-img", "check", "-q", "-f", "qcow2", image)
        qemu("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", expected, image)
        assert read(image, "qcow2") == expected.read_bytes()
