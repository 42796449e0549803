"""Images for the tests of the qcow2 driver, made and judged by qemu-img and qemu-io."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safeimg.drivers.formats.api import Kind
from safeimg.drivers.formats.qcow2.image import Qcow2Image, open_image
from safeimg.drivers.storage.file import LocalFileSystem

needs_qemu = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")), reason="needs qemu-img and qemu-io"
)
FS = LocalFileSystem()


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, errors="replace", check=False
    )


def qemu_img(*arguments: str | Path) -> str:
    result = run("qemu-img", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def qemu_io(path: Path, *commands: str) -> None:
    result = run("qemu-io", "-f", "qcow2", *(part for command in commands for part in ("-c", command)), path)
    assert result.returncode == 0 and "failed" not in result.stdout, result.stdout + result.stderr


def qemu_check(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The JSON of `qemu-img check` (None: it could not) and the messages, as qemu-img prints them."""
    result = run("qemu-img", "check", "-f", "qcow2", "--output=json", path)
    messages = [line for line in result.stderr.splitlines() if not line.startswith("qemu-img: Check failed")]
    try:
        return json.loads(result.stdout), messages
    except ValueError:
        return None, messages


@dataclass(frozen=True)
class Recipe:
    """A kind of image that the generated tests are run on."""

    options: str
    snapshots: int = 0
    bitmap: bool = False

    @property
    def cluster_size(self) -> int:
        options = dict(option.split("=", 1) for option in self.options.split(","))
        return int(options.get("cluster_size", "65536"))

    @property
    def is_extended(self) -> bool:
        return "extended_l2=on" in self.options

    @property
    def is_v2(self) -> bool:
        return "compat=0.10" in self.options


RECIPES = (
    Recipe("cluster_size=65536", snapshots=2, bitmap=True),
    Recipe("cluster_size=512,refcount_bits=1", bitmap=True),
    Recipe("cluster_size=4096,refcount_bits=2"),
    Recipe("cluster_size=16384,refcount_bits=4", snapshots=1),
    Recipe("cluster_size=1024,refcount_bits=64", snapshots=1, bitmap=True),
    Recipe("cluster_size=2097152,refcount_bits=32", snapshots=1),
    Recipe("cluster_size=65536,compat=0.10", snapshots=1),
    Recipe("cluster_size=8192,compression_type=zstd,refcount_bits=4", snapshots=2, bitmap=True),
    Recipe("cluster_size=32768,refcount_bits=8,lazy_refcounts=on"),
    Recipe("cluster_size=16384,extended_l2=on", snapshots=1, bitmap=True),
)


def build(path: Path, recipe: Recipe) -> Path:
    """An image of about 100 clusters with every kind of cluster that its version has."""
    size = recipe.cluster_size
    qemu_img("create", "-q", "-f", "qcow2", "-o", recipe.options, path, str(100 * size - 512))
    guest = [
        f"write -P 1 0 {6 * size}", f"write -c -P 3 {20 * size} {size}", f"write -c -P 4 {21 * size} {size}",
        f"write -P 5 {90 * size} {size}", f"write -P 6 {99 * size} {size - 512}",
    ]
    if not recipe.is_v2:
        guest += [f"write -z {8 * size} {2 * size}", f"write -z {4 * size} {size}"]
    if recipe.is_extended:
        part = size // 32
        guest += [f"write -P 8 {10 * size + 3 * part} {5 * part}", f"write -z {10 * size + 6 * part} {9 * part}",
                  f"write -z {2 * size + part} {7 * part}", f"write -P 9 {11 * size + 31 * part} {2 * part}"]
    qemu_io(path, *guest)
    for number in range(recipe.snapshots):
        qemu_img("snapshot", "-c", f"snapshot {number}", path)
        qemu_io(path, f"write -P {9 + number} {number * size} {2 * size}")
    if recipe.bitmap:
        qemu_img("bitmap", "--add", path, "bitmap one")
        qemu_io(path, f"write -P 7 {30 * size} {size}")
    return path


def read_guest(image: Qcow2Image, start: int = 0, length: int | None = None) -> bytes:
    """What the guest sees of this layer; unallocated ranges read as zeroes."""
    parts = []
    position = start
    for extent in image.extents(start, image.size - start if length is None else length):
        assert extent.start == position and extent.length > 0
        position += extent.length
        if extent.kind is Kind.DATA:
            assert extent.offset is not None
            parts.append(image.file.pread(extent.offset, extent.length).ljust(extent.length, b"\0"))
        elif extent.kind is Kind.COMPRESSED:
            assert extent.offset is not None
            parts.append(image.decompress(extent, image.file.pread(extent.offset, extent.stored)))
        else:
            parts.append(bytes(extent.length))
    return b"".join(parts)


def open_path(path: Path, *, write: bool = False, repair: bool = False) -> Qcow2Image:
    return open_image(FS.open(str(path), write=write), write=write, repair=repair)


def patched(data: bytes, *edits: tuple[str, int, int]) -> bytes:
    """`data` with (struct format, offset, value) edits."""
    out = bytearray(data)
    for form, offset, value in edits:
        struct.pack_into(form, out, offset, value)
    return bytes(out)


def u64(data: bytes, offset: int) -> int:
    value: int = struct.unpack_from(">Q", data, offset)[0]
    return value
