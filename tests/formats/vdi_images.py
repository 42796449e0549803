"""VDI images made by qemu-img, and small changes of them."""

from __future__ import annotations

import random
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from safeimg.drivers.formats.vdi.driver import driver
from safeimg.drivers.formats.vdi.image import VdiImage
from safeimg.drivers.storage.file import LocalFileSystem

MIB = 1 << 20
FS = LocalFileSystem()


def run(*command: str | Path, ok: Sequence[int] = (0,)) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode in ok, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def create(path: Path, size: str, *options: str) -> Path:
    run("qemu-img", "create", "-q", "-f", "vdi", *options, path, size)
    return path


def write(path: Path, *commands: str) -> None:
    """Plays the guest."""
    run("qemu-io", "-f", "vdi", *(part for command in commands for part in ("-c", command)), path)


def filled(path: Path, rng: random.Random, *, size: int = 9 * MIB + 512, static: bool = False) -> Path:
    """An image with blocks here and there, allocated in any order."""
    create(path, str(size), *(("-o", "static=on") if static else ()))
    blocks = rng.sample(range(size // MIB), rng.randrange(1, 5))
    write(path, *(f"write -P {rng.randrange(1, 256)} {block * MIB + 512 * rng.randrange(500)} 64k" for block in blocks))
    return path


def poke(path: Path, *words: tuple[int, int]) -> None:
    """Changes 32-bit words (offset, value)."""
    with path.open("r+b") as file:
        for offset, value in words:
            file.seek(offset)
            file.write(struct.pack("<I", value))


def block_map(path: Path) -> tuple[int, list[int]]:
    """The header's count of blocks, and the map."""
    data = path.read_bytes()
    start, (blocks, allocated) = struct.unpack_from("<I", data, 0x154)[0], struct.unpack_from("<II", data, 0x180)
    return allocated, list(struct.unpack_from(f"<{blocks}I", data, start))


def opened(path: Path, *, write: bool = False, repair: bool = False) -> VdiImage:
    return driver.open(FS.open(str(path), write=write), write=write, repair=repair)  # type: ignore[return-value]


def guest(path: Path) -> bytes:
    """The disk as QEMU reads it."""
    out = path.with_suffix(".guest")
    run("qemu-img", "convert", "-f", "vdi", "-O", "raw", path, out)
    content = out.read_bytes()
    out.unlink()
    return content
