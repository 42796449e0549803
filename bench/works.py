"""What is measured: the same work as both programs are told to do it, and how the results are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sets import SECRET

OUT = "out"
LUKS_OUT = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
LUKS_IN = "driver=qcow2,encrypt.key-secret=key,file.filename="


@dataclass(frozen=True)
class Work:
    """A command line for both programs, the `images` of a set that it reads, and those that it `changes` copies of.

    `same`: the result, and the image of the set that has to show the same, by `qemu-img compare`. `target`: what
    safeimg's time may be, as a part of qemu-img's; None where none was set. `ours`: options that only safeimg has."""

    name: str
    words: Sequence[str]
    images: Sequence[str] = ()
    changes: Sequence[str] = ()
    same: tuple[str, str] | None = None
    target: float | None = None
    ours: Sequence[str] = ()
    size_target: float | None = None  # of the result, as a part of what qemu-img's takes
    killed: bool = False  # measured is what the same command takes after a kill at nine tenths


def _convert(name: str, *words: str, image: str = "disk.raw", target: float, killed: bool = False,
             size_target: float | None = None, ours: Sequence[str] = ()) -> Work:  # fmt: skip
    return Work(
        f"convert {name}", ("convert", *words, image, OUT), (image,), same=(OUT, "disk.raw"), target=target,
        size_target=size_target, killed=killed, ours=ours,
    )  # fmt: skip


def _commit(name: str, top: str, base: str, *ours: str, target: float, killed: bool = False) -> Work:
    return Work(
        f"commit {name}", ("commit", "-q", "-t", "writeback", top), (), (top, base), same=(base, top), target=target,
        ours=ours, killed=killed,
    )  # fmt: skip


def _rebase(name: str = "", *ours: str, target: float, killed: bool = False) -> Work:
    top = "top-on-raw.qcow2"
    return Work(
        f"rebase{name}", ("rebase", "-t", "writeback", "-F", "raw", "-b", "zeroes.raw", top),
        ("zeroes.raw", "disk.raw"), (top,), same=(top, top), target=target, ours=ours, killed=killed,
    )  # fmt: skip


WORKS = (
    _convert("raw to qcow2, unsafe", "-t", "unsafe", "-O", "qcow2", target=0.85),
    _convert("raw to qcow2, writeback", "-t", "writeback", "-O", "qcow2", target=0.75),
    _convert("qcow2 to raw, unsafe", "-t", "unsafe", "-O", "raw", image="disk.qcow2", target=0.85),
    _convert("qcow2 to raw, writeback", "-t", "writeback", "-O", "raw", image="disk.qcow2", target=0.75),
    _convert("raw to raw, unsafe", "-t", "unsafe", "-O", "raw", target=0.6),
    Work(
        "convert chain to qcow2, writeback", ("convert", "-t", "writeback", "-O", "qcow2", "top.qcow2", OUT),
        ("top.qcow2", "disk.qcow2"), same=(OUT, "top.qcow2"), target=0.75,
    ),
    _convert("-c zlib", "-t", "unsafe", "-c", "-O", "qcow2", target=0.08, size_target=1.04),
    _convert(
        "-c zlib, --window 32k", "-t", "unsafe", "-c", "-O", "qcow2", target=0.12, size_target=1.02,
        ours=("--window", "32k"),
    ),
    _convert(
        "-c zstd", "-t", "unsafe", "-c", "-O", "qcow2", "-o", "compression_type=zstd", target=0.30, size_target=1.02
    ),
    _convert("zlib to raw", "-t", "unsafe", "-O", "raw", image="zlib.qcow2", target=0.35),
    _convert("zstd to raw", "-t", "unsafe", "-O", "raw", image="zstd.qcow2", target=0.35),
    _convert(
        "raw to qcow2, writeback, no journal", "-t", "writeback", "-O", "qcow2", target=0.75, ours=("--no-journal",)
    ),
    _convert("raw to qcow2, writeback, killed at 90 %", "-t", "writeback", "-O", "qcow2", target=0.2, killed=True),
    Work(
        "convert raw to luks", ("convert", "--object", SECRET, "-O", "qcow2", "-o", LUKS_OUT, "disk.raw", OUT),
        ("disk.raw",),
    ),
    Work(
        "convert luks to raw",
        ("convert", "--object", SECRET, "--image-opts", "-O", "raw", LUKS_IN + "luks.qcow2", OUT),
        ("luks.qcow2", "disk.raw"), same=(OUT, "disk.raw"),
    ),
    _commit("into qcow2", "top.qcow2", "disk.qcow2", target=1.2),
    _commit("into qcow2, --no-undo", "top.qcow2", "disk.qcow2", "--no-undo", target=0.9),
    _commit("into raw", "top-on-raw.qcow2", "disk.raw", target=1.2),
    _commit("into raw, --no-undo", "top-on-raw.qcow2", "disk.raw", "--no-undo", target=0.9),
    _commit("of changes in order", "top-in-order.qcow2", "disk.qcow2", target=1.2),
    _commit("into qcow2, killed at 90 %", "top.qcow2", "disk.qcow2", target=0.2, killed=True),
    _rebase(target=0.35),
    _rebase(", no journal", "--no-journal", target=0.35),
    _rebase(", killed at 90 %", target=0.2, killed=True),
    Work("compare raw, qcow2", ("compare", "disk.raw", "disk.qcow2"), ("disk.raw", "disk.qcow2"), target=0.7),
    Work("check", ("check", "disk.qcow2"), ("disk.qcow2",)),
    Work("check, ten million clusters", ("check", "metadata.qcow2"), ("metadata.qcow2",), target=1.0),
    Work("map, ten million clusters", ("map", "--output=json", "metadata.qcow2"), ("metadata.qcow2",), target=1.0),
    Work("measure", ("measure", "-O", "qcow2", "disk.qcow2"), ("disk.qcow2",)),
    Work("snapshot -c", ("snapshot", "-c", "new", "disk.qcow2"), changes=("disk.qcow2",)),
    Work("snapshot -a", ("snapshot", "-a", "one", "snapshots.qcow2"), changes=("snapshots.qcow2",)),
    Work("snapshot -d", ("snapshot", "-d", "one", "snapshots.qcow2"), changes=("snapshots.qcow2",)),
    Work("bitmap --add", ("bitmap", "--add", "disk.qcow2", "new"), changes=("disk.qcow2",)),
    Work("resize", ("resize", "-q", "disk.qcow2", "16T"), changes=("disk.qcow2",)),
    Work("info", ("info", "disk.qcow2"), ("disk.qcow2",)),
)  # fmt: skip
