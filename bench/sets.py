"""What is measured on: disks with a real file system, images and chains made of them, an image that is all metadata."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo import MIB, Stage, collect, make_disk

GIB = 1 << 30
FILES = 0.36  # of the disk is what files take
SMALL = 32 * MIB  # bytes that are not worth another copy of files
CHANGES = 400  # writes of 1 MiB, scattered over an overlay; for 2 GiB
UNTIMED = b"accurate CPU usage"  # qemu-img cannot time a key's derivation every time: on a fast machine, every other
SECRET = "secret,id=key,data=benchmark"


@dataclass(frozen=True)
class Set:
    """A folder with images made from one disk of `size` bytes, each when it is first asked for."""

    folder: Path
    size: int

    def need(self, *names: str) -> None:
        for name in names:
            if not (self.folder / name).exists():
                MAKERS[name](self)

    def img(self, *words: str) -> None:
        while True:
            done = subprocess.run(["qemu-img", *words], cwd=self.folder, check=False, capture_output=True)
            if UNTIMED not in done.stderr:
                done.check_returncode()
                return

    def io(self, image: str, commands: list[str]) -> None:
        subprocess.run(
            ["qemu-io", "-f", "qcow2", image], cwd=self.folder, input="\n".join(commands), text=True, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip


def _disk(made: Set) -> None:
    """An ext4 file system with files of this machine, as often as it takes to fill it as far as that."""
    tree, wanted, copies, files = made.folder / "tree", int(made.size * FILES), 0, 0
    while wanted >= SMALL:
        copies += 1
        count, size = collect(tree / str(copies), wanted)
        files, wanted = files + count, wanted - size
    make_disk(Stage(made.folder, False, "safeimg"), tree, "disk.raw", made.size, files, True)
    shutil.rmtree(tree)


def _changed(made: Set, image: str, *, sequential: bool = False) -> None:
    rng = random.Random(image)
    count = CHANGES * made.size // (2 * GIB)
    places = [rng.randrange(made.size // MIB - 1) for _ in range(count)]
    if sequential:
        places = list(range(count))
    made.io(image, [f"write -P {rng.randrange(1, 256)} {at * MIB} 1M" for at in places])


def _overlay(name: str, base: str, fmt: str, *, sequential: bool = False) -> Callable[[Set], None]:
    def make(made: Set) -> None:
        made.need(base)
        made.img("create", "-q", "-f", "qcow2", "-b", base, "-F", fmt, name)
        _changed(made, name, sequential=sequential)

    return make


def _converted(source: str, name: str, *options: str) -> Callable[[Set], None]:
    def make(made: Set) -> None:
        made.need(source)
        made.img("convert", *options, source, name)

    return make


def _metadata(made: Set) -> None:
    """1 TiB with ten million clusters that are allocated and hold nothing."""
    made.img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "metadata.qcow2", "640G")
    made.img("resize", "-q", "metadata.qcow2", "1T")


def _zeroes(made: Set) -> None:
    with (made.folder / "zeroes.raw").open("wb") as file:
        file.truncate(made.size)


def _snapshots(made: Set) -> None:
    made.need("disk.qcow2")
    shutil.copyfile(made.folder / "disk.qcow2", made.folder / "snapshots.qcow2")
    made.img("snapshot", "-c", "one", "snapshots.qcow2")
    _changed(made, "snapshots.qcow2")


MAKERS: dict[str, Callable[[Set], None]] = {
    "disk.raw": _disk,
    "disk.qcow2": _converted("disk.raw", "disk.qcow2", "-O", "qcow2"),
    "zlib.qcow2": _converted("disk.raw", "zlib.qcow2", "-c", "-O", "qcow2"),
    "zstd.qcow2": _converted("disk.raw", "zstd.qcow2", "-c", "-O", "qcow2", "-o", "compression_type=zstd"),
    "luks.qcow2": _converted(
        "disk.raw", "luks.qcow2", "--object", SECRET, "-O", "qcow2", "-o",
        "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
    ),
    "top.qcow2": _overlay("top.qcow2", "disk.qcow2", "qcow2"),
    "top-in-order.qcow2": _overlay("top-in-order.qcow2", "disk.qcow2", "qcow2", sequential=True),
    "upper.qcow2": _overlay("upper.qcow2", "top.qcow2", "qcow2"),
    "top-on-raw.qcow2": _overlay("top-on-raw.qcow2", "disk.raw", "raw"),
    "snapshots.qcow2": _snapshots,
    "metadata.qcow2": _metadata,
    "zeroes.raw": _zeroes,
}  # fmt: skip
