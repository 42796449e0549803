"""What is killed, besides commits: how each operation's images are made, and its command line.

What the images look like behind it, qemu-img says: it gets the same command line, in a folder of its own.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kills.images import Wrong, img, write

MIB = 1 << 20
SIZE = 64 * MIB
CLUSTER = 4096  # small, so that there are many tables
NOISE = 8 * MIB


@dataclass(frozen=True, slots=True)
class Operation:
    """`words`: the command line, for qemu-img too. `home`: the image that the log lies beside.

    `target`: an image that the operation makes, and that cannot be opened before it is finished. `undone`: it is done
    unharmed, and its undo is what is killed."""

    name: str
    build: Callable[[Path, random.Random], None]
    words: tuple[str, ...]
    home: str
    target: str | None = None
    undone: bool = False
    through: tuple[str, ...] = ()  # images that show neither meanwhile, but below the top of their chain


def _create(image: Path, size: int, *options: str) -> None:
    img("create", "-q", "-f", "qcow2", "-o", ",".join((f"cluster_size={CLUSTER}", *options)), image, str(size))


def _fill(image: Path, rng: random.Random, size: int, count: int) -> None:
    """Random data in `count` places, zeroes and discards in a few."""
    noise = image.parent.with_name("noise")
    if not noise.exists():
        noise.write_bytes(rng.randbytes(NOISE))
    commands = []
    for number in range(count):
        length = rng.choice((512, CLUSTER, 5 * CLUSTER, 16 * CLUSTER))
        at = rng.randrange((size - length) // 512) * 512
        source = f"-s {noise}" if number % 4 else f"-P {rng.randrange(256)}"
        commands.append(f"write {source} {at} {length}")
        if number % 16 == 0:
            at = rng.randrange(size // CLUSTER - 8) * CLUSTER
            commands += [f"write -z {at} {3 * CLUSTER}", f"discard {at + 4 * CLUSTER} {4 * CLUSTER}"]
    write(image, commands)


def _overlay(top: Path, base: str, size: int) -> None:
    _create(top, size, f"backing_file={base}", "backing_fmt=qcow2")


def _disk(folder: Path, rng: random.Random) -> None:
    _create(folder / "disk.qcow2", SIZE, "preallocation=metadata")
    _fill(folder / "disk.qcow2", rng, SIZE, 300)


def _two_bases(folder: Path, rng: random.Random) -> None:
    """The bases differ in size and content."""
    for name, size in (("base.qcow2", SIZE), ("other.qcow2", SIZE * 3 // 4)):
        _create(folder / name, size)
        _fill(folder / name, rng, size, 200)
    _overlay(folder / "top.qcow2", "base.qcow2", SIZE)
    _fill(folder / "top.qcow2", rng, SIZE, 100)


def _snapshots(folder: Path, rng: random.Random) -> None:
    disk = folder / "disk.qcow2"
    _disk(folder, rng)
    for name in ("one", "two"):
        img("snapshot", "-c", name, disk)
        _fill(disk, rng, SIZE, 100)


def _larger_base(folder: Path, rng: random.Random) -> None:
    """Growing must not show what the base has behind the overlay's end."""
    _create(folder / "base.qcow2", SIZE)
    _fill(folder / "base.qcow2", rng, SIZE, 300)
    _overlay(folder / "top.qcow2", "base.qcow2", SIZE // 2)
    _fill(folder / "top.qcow2", rng, SIZE // 2, 100)


def _zero_clusters(folder: Path, rng: random.Random) -> None:
    """Version 2 has no zero clusters: with a backing image, they become data."""
    base, top = folder / "base.qcow2", folder / "top.qcow2"
    _create(base, SIZE)
    _fill(base, rng, SIZE, 100)
    _overlay(top, "base.qcow2", SIZE)
    _fill(top, rng, SIZE, 100)
    write(top, [f"write -z {rng.randrange(SIZE // MIB) * MIB} {MIB // 2}" for _ in range(24)])


def _bitmaps(folder: Path, rng: random.Random) -> None:
    disk = folder / "disk.qcow2"
    _disk(folder, rng)
    for name, granularity in (("one", "512"), ("two", "4096")):
        img("bitmap", "--add", "-g", granularity, disk, name)
        _fill(disk, rng, SIZE, 60)


def _broken(folder: Path, rng: random.Random) -> None:
    """Clusters that are in use and counted as free, and the other way round."""
    _snapshots(folder, rng)
    disk = folder / "disk.qcow2"
    with disk.open("r+b") as file:
        table, clusters = struct.unpack(">QI", file.read(60)[48:60])
        file.seek(table)
        blocks = struct.unpack(f">{clusters * CLUSTER // 8}Q", file.read(clusters * CLUSTER))
        for block in (offset for offset in blocks if offset):
            for _ in range(20):
                place = block + 2 * rng.randrange(CLUSTER // 2)
                file.seek(place)
                count = struct.unpack(">H", file.read(2))[0]
                file.seek(place)
                file.write(struct.pack(">H", rng.choice((0, count + 1)) if count else 1))
    if "corruptions" not in img("check", "--output=json", disk, accept=(2,)):
        raise Wrong("the image to be repaired is not broken")


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation(
            "rebase", _two_bases, ("rebase", "-F", "qcow2", "-b", "other.qcow2", "top.qcow2"), "top.qcow2"
        ),
        Operation(
            "rebase-unsafe",
            _two_bases,
            ("rebase", "-u", "-F", "qcow2", "-b", f"./{'././' * 40}other.qcow2", "top.qcow2"),
            "top.qcow2",
        ),
        Operation("snapshot-create", _snapshots, ("snapshot", "-c", "new", "disk.qcow2"), "disk.qcow2"),
        Operation("snapshot-apply", _snapshots, ("snapshot", "-a", "one", "disk.qcow2"), "disk.qcow2"),
        Operation("snapshot-delete", _snapshots, ("snapshot", "-d", "one", "disk.qcow2"), "disk.qcow2"),
        Operation("resize", _larger_base, ("resize", "-q", "top.qcow2", str(SIZE * 9 // 8)), "top.qcow2"),
        Operation("shrink", _disk, ("resize", "-q", "--shrink", "disk.qcow2", str(SIZE * 3 // 8)), "disk.qcow2"),
        Operation("amend", _zero_clusters, ("amend", "-q", "-o", "compat=0.10", "top.qcow2"), "top.qcow2"),
        Operation(
            "bitmap", _bitmaps, ("bitmap", "--add", "--merge", "one", "-g", "512", "disk.qcow2", "new"), "disk.qcow2"
        ),
        Operation("check-r", _broken, ("check", "-q", "-r", "all", "disk.qcow2"), "disk.qcow2"),
        # Slowly: only what takes longer than a second has a journal.
        Operation(
            "convert",
            _two_bases,
            ("convert", "-r", "8M", "-O", "qcow2", "top.qcow2", "target.qcow2"),
            "target.qcow2",
            target="target.qcow2",
        ),
        Operation(
            "undo-commit",
            _two_bases,
            ("commit", "-q", "-d", "top.qcow2"),
            "base.qcow2",
            undone=True,
            through=("base.qcow2",),
        ),
        Operation(
            "undo-rebase",
            _two_bases,
            ("rebase", "-F", "qcow2", "-b", "other.qcow2", "top.qcow2"),
            "top.qcow2",
            undone=True,
        ),
        Operation("undo-snapshot", _snapshots, ("snapshot", "-a", "one", "disk.qcow2"), "disk.qcow2", undone=True),
    )
}
