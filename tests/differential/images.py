"""The kept set: small images of every kind, made once by qemu-img, and copied for each case."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

from twin import qemu_img

SIZE = "1M"
SECRET = ("--object", "secret,id=sec0,data=abc")  # of all that is encrypted

# What is made from nothing: name, format, options, what qemu-io writes; their size, where it is another.
_SIZES = {"odd-size.qcow2": "1049088", "large.qcow2": "5M", "zero.qcow2": "0"}
_MADE: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("plain.qcow2", "qcow2", "", ("write -P 5 64k 100k", "write -z 512k 64k", "write -P 3 900k 100")),
    ("small.qcow2", "qcow2", "cluster_size=4k", ("write -P 5 8k 20k", "write -z 64k 8k", "write -P 3 500k 1k")),
    ("old.qcow2", "qcow2", "compat=0.10,cluster_size=16k", ("write -P 6 100k 200k",)),
    ("empty.qcow2", "qcow2", "", ()),
    ("full.qcow2", "qcow2", "preallocation=full", ("write -P 9 0 64k",)),
    ("meta.qcow2", "qcow2", "preallocation=metadata,cluster_size=8k", ("write -P 9 32k 64k",)),
    ("narrow.qcow2", "qcow2", "cluster_size=512,refcount_bits=1", ("write -P 2 10k 33k",)),
    ("wide.qcow2", "qcow2", "refcount_bits=64,lazy_refcounts=on", ("write -P 2 10k 33k",)),
    ("two-bits.qcow2", "qcow2", "refcount_bits=2,cluster_size=4k", ("write -P 2 10k 33k",)),
    ("byte.qcow2", "qcow2", "refcount_bits=8,lazy_refcounts=on", ("write -P 2 10k 33k", "write -c -P 7 128k 64k")),
    ("large.qcow2", "qcow2", "cluster_size=2M,refcount_bits=32", ("write -P 2 1M 3M",)),
    ("odd-size.qcow2", "qcow2", "cluster_size=16k", ("write -P 2 10k 33k", "write -P 3 1M 512", "write -z 64k 100k")),
    ("zero.qcow2", "qcow2", "", ()),
    ("zeroed.qcow2", "qcow2", "preallocation=metadata", ("write -z 0 1M", "write -P 1 512k 512")),
    ("state.qcow2", "qcow2", "", ("write -P 1 0 300k", "write -b -P 9 0 192k")),
    ("old-state.qcow2", "qcow2", "compat=0.10,cluster_size=4k", ("write -P 1 0 300k", "write -b -P 9 0 19k")),
    ("extl2.qcow2", "qcow2", "extended_l2=on,cluster_size=64k", ("write -P 4 6k 90k", "write -z 300k 8k")),
    ("outside.qcow2", "qcow2", "data_file=outside.data", ("write -P 4 64k 128k", "write -z 256k 64k")),
    ("outraw.qcow2", "qcow2", "data_file=outraw.data,data_file_raw=on", ("write -P 4 64k 128k", "write -z 256k 64k")),
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
    ("short.qcow2", "plain.qcow2", "qcow2", "size=512k", ("write -P 8 70k 10k",)),
    ("long.qcow2", "plain.qcow2", "qcow2", "size=2M,compat=0.10", ("write -P 8 70k 10k",)),
    ("on-short.qcow2", "short.qcow2", "qcow2", "size=1M,cluster_size=4k", ("write -P 8 600k 10k", "write -z 64k 8k")),
    ("on-odd.qcow2", "odd.raw", "raw", "size=1M", ("write -P 8 70k 10k",)),
    ("named.qcow2", 'json:{"driver":"qcow2","file":{"driver":"file","filename":"plain.qcow2"}}', "qcow2", "",
     ("write -P 8 70k 10k",)),
    ("on-narrow.qcow2", "narrow.qcow2", "qcow2", "extended_l2=on", ("write -P 8 16k 3k",)),
)

OVERLAYS = tuple(made[0] for made in _OVERLAYS)
GOOD = (
    *(made[0] for made in _MADE),
    *OVERLAYS,
    "packed.qcow2",
    "zstd.qcow2",
    "snaps.qcow2",
    "sized.qcow2",
    "bitmaps.qcow2",
    "all.qcow2",
    "packed-top.qcow2",
    "odd.raw",
    "tiny.raw",
)
ENCRYPTED = ("luks.qcow2", "aes.qcow2", "luks-top.qcow2", "disk.luks")
BROKEN = (
    "leaking.qcow2",
    "corrupt.qcow2",
    "corrupt-bit.qcow2",
    "dirty.qcow2",
    "unknown.qcow2",
    "cut.qcow2",
    "version.qcow2",
    "on-missing.qcow2",
    "lost-data.qcow2",
    "broken-bitmaps.qcow2",
    "l2-astray.qcow2",
    "twice.qcow2",
    "snaps-astray.qcow2",
    "no-table.qcow2",
    "hostile.qcow2",
    "count.vdi",
    "junk.raw",
    "nothing.raw",
)
# safeimg does not write to an image whose metadata has no refcounts (see `Planner.ready`), and does not take tables
# behind the end of the file for empty ones, as qemu-img does; what is in use without a refcount both write over, each
# in its own way: `info` and `check` alone agree on these.
UNCOUNTED = ("l2-astray.qcow2", "no-table.qcow2", "corrupt.qcow2")
# What an image cannot be opened without.
NEEDS = {
    **{made[0]: (made[1],) for made in _OVERLAYS},
    "outside.qcow2": ("outside.data",),
    "outraw.qcow2": ("outraw.data",),
    "named.qcow2": ("plain.qcow2",),
    "packed-top.qcow2": ("plain.qcow2",),
    "luks-top.qcow2": ("plain.qcow2",),
}


def format_of(name: str) -> str:
    return name.rpartition(".")[2]


def build(folder: Path) -> None:
    """Makes all of them in an empty folder."""
    for name, fmt, options, writes in _MADE:
        _img(folder, "create", "-q", "-f", fmt, *(("-o", options) if options else ()), name, _SIZES.get(name, SIZE))
        _io(folder, name, fmt, writes)
    (folder / "odd.raw").write_bytes((folder / "disk.raw").read_bytes()[:1_000_000])
    (folder / "tiny.raw").write_bytes(b"x" * 513)
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
    for name in ("state.qcow2", "old-state.qcow2"):
        _img(folder, "snapshot", "-c", "with state", name)
        entry = _snapshot_table(folder / name)
        _set(folder / name, (entry + 32, (19_000).to_bytes(4, "big")), (entry + 40, (19_000).to_bytes(8, "big")))
        _io(folder, name, "qcow2", ("write -P 11 100k 200k",))
        _img(folder, "snapshot", "-c", "other", name)
    shutil.copy(folder / "snaps.qcow2", folder / "sized.qcow2")
    _img(folder, "resize", "sized.qcow2", "1600k")
    _img(folder, "snapshot", "-c", "larger", "sized.qcow2")
    _io(folder, "sized.qcow2", "qcow2", ("write -P 12 1500k 64k",))
    shutil.copy(folder / "plain.qcow2", folder / "bitmaps.qcow2")
    _img(folder, "bitmap", "--add", "bitmaps.qcow2", "b0")
    _img(folder, "bitmap", "--add", "--disable", "-g", "32k", "bitmaps.qcow2", "b1")
    _io(folder, "bitmaps.qcow2", "qcow2", ("write -P 12 256k 64k",))
    shutil.copy(folder / "bitmaps.qcow2", folder / "broken-bitmaps.qcow2")
    subprocess.run(["qemu-io", "-c", "abort", "broken-bitmaps.qcow2"], cwd=folder, capture_output=True)
    _everything(folder)
    _encrypted(folder)
    _break(folder)


def _everything(folder: Path) -> None:
    """Subclusters, snapshots, bitmaps, a backing image, compressed clusters."""
    _img(folder, "create", "-q", "-f", "qcow2", "-b", "plain.qcow2", "-F", "qcow2", "packed-top.qcow2")
    _io(folder, "packed-top.qcow2", "qcow2", ("write -c -P 4 0 64k", "write -c -P 5 256k 128k", "write -P 6 300k 1k"))
    options = "extended_l2=on,cluster_size=32k,compression_type=zstd,refcount_bits=8"
    _img(folder, "create", "-q", "-f", "qcow2", "-o", options, "all.qcow2", "1500k")
    _io(folder, "all.qcow2", "qcow2", ("write -P 4 3k 90k", "write -c -P 5 320k 32k", "write -z 40k 9k"))
    _img(folder, "snapshot", "-c", "first", "all.qcow2")
    _img(folder, "bitmap", "--add", "all.qcow2", "b0")
    _io(folder, "all.qcow2", "qcow2", ("write -P 6 10k 3k", "discard 320k 32k"))


def _encrypted(folder: Path) -> None:
    """Quickly opened: the key is of no worth."""
    on = ("-b", "plain.qcow2", "-F", "qcow2")
    for name, fmt, options, more in (
        ("luks.qcow2", "qcow2", "encrypt.format=luks,encrypt.iter-time=10,cluster_size=16k,encrypt.", (SIZE,)),
        ("aes.qcow2", "qcow2", "encrypt.format=aes,encrypt.", (SIZE,)),
        ("luks-top.qcow2", "qcow2", "encrypt.format=luks,encrypt.iter-time=10,encrypt.", ()),
        ("disk.luks", "luks", "iter-time=10,", (SIZE,)),
    ):
        words = ["create", "-q", *SECRET, "-f", fmt, "-o", options + "key-secret=sec0", *(() if more else on), name]
        _img(folder, *words, *more)
        writes = ("-c", "write -P 5 64k 100k", "-c", "write -z 512k 64k")
        opened = ["qemu-io", "-t", "unsafe", *SECRET, "--image-opts", *writes, opening(name)]
        subprocess.run(opened, cwd=folder, check=True, capture_output=True)


def opening(path: str) -> str:
    """The options (of --image-opts) that an encrypted image is opened with."""
    fmt = format_of(path)
    return f"driver={fmt},file.filename={path},{'' if fmt == 'luks' else 'encrypt.'}key-secret=sec0"


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
    return [name for name in (*GOOD, *ENCRYPTED, *BROKEN) if any(name in word for word in words)]


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
    write("cut.qcow2", cut=50)
    write("version.qcow2", (4, struct.pack(">I", 9)))
    vdi = bytearray((folder / "disk.vdi").read_bytes())
    struct.pack_into("<I", vdi, 0x184, 3)
    (folder / "count.vdi").write_bytes(vdi)
    (folder / "junk.raw").write_bytes(b"junk")
    (folder / "nothing.raw").write_bytes(b"")
    _img(folder, "create", "-q", "-f", "qcow2", "-o", "data_file=lost.data", "lost-data.qcow2", SIZE)
    (folder / "lost.data").unlink()
    l1 = int.from_bytes(good[40:48], "big")
    l2 = int.from_bytes(good[l1 : l1 + 8], "big") & (1 << 56) - 1
    write("l2-astray.qcow2", (l1, (1 << 63 | 1 << 40).to_bytes(8, "big")))
    write("twice.qcow2", (l2 + 8 * 3, good[l2 + 8 * 2 : l2 + 8 * 3]))
    write("no-table.qcow2", (table, bytes(8)))
    write("hostile.qcow2", (36, b"\xff" * 4), (40, (4096).to_bytes(8, "big")))
    shutil.copy(folder / "snaps.qcow2", folder / "snaps-astray.qcow2")
    _set(folder / "snaps-astray.qcow2", (_snapshot_table(folder / "snaps.qcow2"), (1 << 50).to_bytes(8, "big")))


def _snapshot_table(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[64:72], "big")


def _set(path: Path, *changes: tuple[int, bytes]) -> None:
    with path.open("r+b") as file:
        for offset, value in changes:
            file.seek(offset)
            file.write(value)


def _img(folder: Path, *arguments: str) -> None:
    done = qemu_img(list(arguments), folder)
    assert done.code == 0, done.stderr


def _io(folder: Path, name: str, fmt: str, writes: tuple[str, ...]) -> None:
    if writes:
        commands = [word for write in writes for word in ("-c", write)]
        words = ["qemu-io", "-t", "unsafe", "-f", fmt, *commands, name]
        subprocess.run(words, cwd=folder, check=True, capture_output=True)
