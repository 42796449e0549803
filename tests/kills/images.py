"""The images of the kill soak: a base and an overlay with every kind of cluster, and qemu-img as their judge.

base.qcow2   a sixteenth smaller than the overlay, half full of random data; an internal snapshot that
             shares a part of it, compressed clusters, zero clusters, an enabled persistent bitmap
top.qcow2    random data over about a third of the disk, aligned and not; zeroes, compressed clusters, discards
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

CLUSTER = 65536
NOISES = 97  # different MiBs of random data: what lands in a wrong place shows
NAMES = ("base.qcow2", "top.qcow2")


class Wrong(AssertionError):
    """What the images hold is not what was promised."""


def img(*arguments: str | Path, accept: tuple[int, ...] = (0,)) -> str:
    """Runs qemu-img; what it printed. Raises `Wrong` for an exit code that is not accepted."""
    done = subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, check=False)
    if done.returncode not in accept:
        words = " ".join(map(str, arguments))
        raise Wrong(
            f"qemu-img {words}: exit code {done.returncode}: {done.stdout.strip()} {done.stderr.strip()}"
        )
    return done.stdout


def build(folder: Path, size: int, seed: int) -> None:
    """Makes the chain in `folder`. `size`: of the virtual disk, bytes; a multiple of 16 clusters."""
    rng = random.Random(seed)
    folder.mkdir()
    base, top = (folder / name for name in NAMES)
    smaller = size - size // 16
    noise = folder / "noise"
    noise.mkdir()
    for number in range(NOISES):
        (noise / str(number)).write_bytes(rng.randbytes(1 << 20))
    img("create", "-q", "-f", "qcow2", base, str(smaller))
    write(base, _special(rng, smaller, size >> 25) + _data(rng, noise, smaller, size // 5, piece=1 << 20))
    img("snapshot", "-c", "shared", base)
    write(base, _data(rng, noise, smaller, size // 2, piece=1 << 20))
    img("bitmap", "--add", base, "backup")
    img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top, str(size))
    write(
        top,
        _special(rng, size, size >> 25)
        + _data(rng, noise, size, size // 4, piece=256 << 10)
        + _data(rng, noise, size, size // 24, piece=3000, align=1)
        + [f"discard {rng.randrange(size // CLUSTER) * CLUSTER} {4 * CLUSTER}" for _ in range(8)]
        + _data(rng, noise, size, size // 24, piece=64 << 10, align=512),
    )
    shutil.rmtree(noise)


def _data(
    rng: random.Random, noise: Path, size: int, amount: int, *, piece: int, align: int = CLUSTER
) -> list[str]:
    """Writes of random data, about `amount` bytes in all; small ones are fewer than that."""
    count = max(min(amount // piece, 400 if piece < CLUSTER else amount // piece), 1)
    commands = []
    for _ in range(count):
        offset = rng.randrange((size - piece) // align) * align
        source = (
            f"-s {noise}/{rng.randrange(NOISES)}" if rng.random() < 0.9 else f"-P {rng.randrange(1, 255)}"
        )
        commands.append(f"write {source} {offset} {piece}")
    return commands


def _special(rng: random.Random, size: int, count: int) -> list[str]:
    """Compressed and zero clusters, and zeroes that are not aligned. Only into new images: QEMU compresses no
    cluster that is there already."""
    commands = []
    packed = rng.sample(range(size // CLUSTER // 8), max(count, 4))
    commands += [f"write -c -P {rng.randrange(1, 255)} {at * 8 * CLUSTER} {4 * CLUSTER}" for at in packed]
    for _ in packed:
        commands.append(
            f"write -z {rng.randrange(size // CLUSTER - 8) * CLUSTER} {rng.randrange(1, 8) * CLUSTER}"
        )
        commands.append(f"write -z {rng.randrange((size - 9000) // 512) * 512} 8704")
    return commands


def write(image: Path, commands: list[str]) -> None:
    """qemu-io plays the guest."""
    done = subprocess.run(
        ["qemu-io", "-f", "qcow2", image],
        input="\n".join([*commands, "flush", "quit", ""]),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        failed = [line for line in done.stdout.splitlines() if "failed" in line or "rror" in line]
        raise Wrong(f"qemu-io {image}: {(failed or [done.stderr.strip()])[0]}")


def copy(source: Path, target: Path, *, durable: bool = True) -> None:
    """All files of a folder into another one, as new files where they differ (by size and time); reflinked where the
    file system can."""
    target.mkdir(exist_ok=True)
    for old in target.iterdir():
        if not _unchanged(source / old.name, old):
            old.unlink()
    for file in sorted(source.iterdir()):
        if (target / file.name).exists():
            continue
        subprocess.run(["cp", "--reflink=auto", "--preserve=timestamps", file, target / file.name], check=True)
        if durable:
            descriptor = os.open(target / file.name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _unchanged(source: Path, copied: Path) -> bool:
    if not source.exists():
        return False
    one, other = source.stat(), copied.stat()
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def check(image: Path, *, leaks: bool = False) -> None:
    """`qemu-img check` finds nothing wrong, or leaks at worst."""
    img("check", "-q", "-f", "qcow2", image, accept=(0, 3) if leaks else (0,))


def same(one: Path, other: Path) -> bool:
    """Whether a guest sees the same."""
    done = subprocess.run(
        ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", one, other],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise Wrong(f"qemu-img compare {one} {other}: {done.stderr.strip()}")
    return done.returncode == 0 and virtual_size(one) == virtual_size(other)


def expect_same(one: Path, other: Path) -> None:
    if not same(one, other):
        raise Wrong(f"{one} does not show what {other} shows")


def virtual_size(image: Path) -> int:
    return int(_info(image)["virtual-size"])


def features(image: Path) -> Any:
    """Snapshots, bitmaps, format options, backing file: what neither commit nor rollback may change."""
    found = _info(image)
    specific = found["format-specific"]["data"]
    return found.get("snapshots"), specific, found.get("backing-filename")


def _info(image: Path) -> Any:
    return json.loads(img("info", "--output=json", "-f", "qcow2", image))


def own_data(image: Path) -> int:
    """Bytes that the image itself holds, not its backing image."""
    found = json.loads(img("map", "--output=json", "-f", "qcow2", image))
    return sum(int(extent["length"]) for extent in found if extent["depth"] == 0)
