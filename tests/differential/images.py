"""The kept set: small images of every kind, made once by qemu-img, and copied for each case."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

SIZE = "1M"

# What is made from nothing: name, format, options, what qemu-io writes.
_MADE: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("plain.qcow2", "qcow2", "", ("write -P 5 64k 100k", "write -z 512k 64k", "write -P 3 900k 100")),
    ("small.qcow2", "qcow2", "cluster_size=4k", ("write -P 5 8k 20k", "write -z 64k 8k", "write -P 3 500k 1k")),
    ("old.qcow2", "qcow2", "compat=0.10,cluster_size=16k", ("write -P 6 100k 200k",)),
    ("empty.qcow2", "qcow2", "", ()),
    ("full.qcow2", "qcow2", "preallocation=full", ("write -P 9 0 64k",)),
    ("meta.qcow2", "qcow2", "preallocation=metadata,cluster_size=8k", ("write -P 9 32k 64k",)),
    ("narrow.qcow2", "qcow2", "cluster_size=512,refcount_bits=1", ("write -P 2 10k 33k",)),
    ("wide.qcow2", "qcow2", "refcount_bits=64,lazy_refcounts=on", ("write -P 2 10k 33k",)),
    ("extl2.qcow2", "qcow2", "extended_l2=on,cluster_size=64k", ("write -P 4 6k 90k", "write -z 300k 8k")),
    ("outside.qcow2", "qcow2", "data_file=outside.data", ("write -P 4 64k 128k",)),
    ("outraw.qcow2", "qcow2", "data_file=outraw.data,data_file_raw=on", ("write -P 4 64k 128k",)),
    ("disk.raw", "raw", "", ("write -P 5 64k 100k", "write -P 3 900k 100")),
    ("disk.vdi", "vdi", "", ("write -P 5 64k 100k",)),
    ("static.vdi", "vdi", "static=on", ("write -P 7 300k 9k",)),
)  # fmt: skip

# Overlays: name, backing image and its format, options, what qemu-io writes.
_OVERLAYS: tuple[tuple[str, str, str, str, tuple[str, ...]], ...] = (
    ("mid.qcow2", "plain.qcow2", "qcow2", "", ("write -P 8 128k 64k", "write -z 64k 64k")),
    ("top.qcow2", "mid.qcow2", "qcow2", "cluster_size=4k", ("write -P 9 130k 7k", "write -P 9 700k 64k")),
    ("on-raw.qcow2", "disk.raw", "raw", "compat=0.10", ("write -P 8 70k 10k",)),
    ("on-vdi.qcow2", "disk.vdi", "vdi", "", ("write -P 8 70k 10k",)),
    ("on-narrow.qcow2", "narrow.qcow2", "qcow2", "extended_l2=on", ("write -P 8 16k 3k",)),
)

GOOD = (
    *(made[0] for made in _MADE),
    *(made[0] for made in _OVERLAYS),
    "packed.qcow2",
    "zstd.qcow2",
    "snaps.qcow2",
    "bitmaps.qcow2",
    "odd.raw",
)
BROKEN = (
    "leaking.qcow2",
    "corrupt.qcow2",
    "corrupt-bit.qcow2",
    "dirty.qcow2",
    "unknown.qcow2",
    "short.qcow2",
    "version.qcow2",
    "on-missing.qcow2",
    "count.vdi",
    "junk.raw",
    "nothing.raw",
)
# What an image cannot be opened without.
NEEDS = {
    **{made[0]: (made[1],) for made in _OVERLAYS},
    "outside.qcow2": ("outside.data",),
    "outraw.qcow2": ("outraw.data",),
}


def format_of(name: str) -> str:
    return name.rpartition(".")[2]


def build(folder: Path) -> None:
    """Makes all of them in an empty folder."""
    for name, fmt, options, writes in _MADE:
        _img(folder, "create", "-q", "-f", fmt, *(("-o", options) if options else ()), name, SIZE)
        _io(folder, name, fmt, writes)
    for name, backing, fmt, options, writes in _OVERLAYS:
        more = ("-o", options) if options else ()
        _img(folder, "create", "-q", "-f", "qcow2", "-b", backing, "-F", fmt, *more, name)
        _io(folder, name, "qcow2", writes)
    _img(folder, "convert", "-c", "-O", "qcow2", "plain.qcow2", "packed.qcow2")
    _img(folder, "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", "plain.qcow2", "zstd.qcow2")
    shutil.copy(folder / "plain.qcow2", folder / "snaps.qcow2")
    _img(folder, "snapshot", "-c", "first", "snaps.qcow2")
    _io(folder, "snaps.qcow2", "qcow2", ("write -P 11 100k 200k",))
    _img(folder, "snapshot", "-c", "second one", "snaps.qcow2")
    shutil.copy(folder / "plain.qcow2", folder / "bitmaps.qcow2")
    _img(folder, "bitmap", "--add", "bitmaps.qcow2", "b0")
    _img(folder, "bitmap", "--add", "--disable", "-g", "32k", "bitmaps.qcow2", "b1")
    _io(folder, "bitmaps.qcow2", "qcow2", ("write -P 12 256k 64k",))
    (folder / "odd.raw").write_bytes((folder / "disk.raw").read_bytes()[:1_000_000])
    _break(folder)


def copy(kept: Path, folder: Path, names: Iterable[str]) -> None:
    """Copies these and what they need; names that are not in the set are passed over."""
    for name in names:
        target = folder / name
        if (kept / name).exists() and not target.exists():
            subprocess.run(["cp", "--sparse=auto", "--preserve=mode", kept / name, target], check=True)
            copy(kept, folder, NEEDS.get(name, ()))


def mentioned(words: Iterable[str]) -> list[str]:
    """The images of the set that a command line may touch."""
    words = list(words)
    return [name for name in (*GOOD, *BROKEN) if any(name in word for word in words)]


def _break(folder: Path) -> None:
    _img(folder, "create", "-q", "-u", "-f", "qcow2", "-b", "missing", "-F", "raw", "on-missing.qcow2", SIZE)
    good = (folder / "small.qcow2").read_bytes()
    table = int.from_bytes(good[48:56], "big")
    block = int.from_bytes(good[table : table + 8], "big")
    clusters = len(good) // 4096

    def write(name: str, *changes: tuple[int, bytes], more: int = 0, cut: int | None = None) -> None:
        data = bytearray(good + bytes(more))[:cut]
        for offset, value in changes:
            data[offset : offset + len(value)] = value
        (folder / name).write_bytes(data)

    leaked = [(block + 2 * index, b"\0\1") for index in range(clusters, clusters + 3)]
    write("leaking.qcow2", *leaked, more=3 * 4096)
    write("corrupt.qcow2", (block + 2 * (clusters - 1), b"\0\0"))
    write("corrupt-bit.qcow2", (79, b"\2"))
    write("dirty.qcow2", (79, b"\1"))
    write("unknown.qcow2", (78, b"\1"))
    write("short.qcow2", cut=50)
    write("version.qcow2", (4, struct.pack(">I", 9)))
    vdi = bytearray((folder / "disk.vdi").read_bytes())
    struct.pack_into("<I", vdi, 0x184, 3)
    (folder / "count.vdi").write_bytes(vdi)
    (folder / "junk.raw").write_bytes(b"junk")
    (folder / "nothing.raw").write_bytes(b"")


def _img(folder: Path, *arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], cwd=folder, check=True, capture_output=True)


def _io(folder: Path, name: str, fmt: str, writes: tuple[str, ...]) -> None:
    if writes:
        commands = [word for write in writes for word in ("-c", write)]
        subprocess.run(["qemu-io", "-f", fmt, *commands, name], cwd=folder, check=True, capture_output=True)
