"""A folder full of images, made once by qemu-img: every form that the read-only commands have to tell apart."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.register_assert_rewrite("twin")

from twin import qemu_io  # noqa: E402


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("qemu-img") is None or shutil.which("qemu-io") is None:
        pytest.skip("qemu-img and qemu-io are not installed")
    folder = tmp_path_factory.mktemp("images")
    _plain(folder)
    _vdi(folder)
    _chains(folder)
    _damaged(folder)
    for path in folder.rglob("*"):  # what a file occupies is only certain once it is written
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return folder


def _img(folder: Path, *arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], cwd=folder, check=True, capture_output=True)


def _create(folder: Path, name: str, size: str, *options: str) -> None:
    _img(folder, "create", "-q", "-f", "qcow2", *options, name, size)


def _plain(folder: Path) -> None:
    _create(folder, "small.qcow2", "1M", "-o", "cluster_size=4k")
    qemu_io(
        folder, "-c", "write -P 5 8k 20k", "-c", "write -z 64k 8k", "-c", "write -P 3 100k 100", "small.qcow2"
    )
    _img(folder, "convert", "-c", "-O", "qcow2", "small.qcow2", "packed.qcow2")
    _img(folder, "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", "small.qcow2", "zstd.qcow2")
    _img(folder, "convert", "-O", "raw", "small.qcow2", "small.raw")
    _img(folder, "convert", "-O", "qcow2", "small.raw", "same.qcow2")
    _create(folder, "empty.qcow2", "1M")
    _create(folder, "zero.qcow2", "0")
    _create(folder, "tera.qcow2", "1T", "-o", "compat=0.10")
    _create(folder, "tiny-clusters.qcow2", "1M", "-o", "cluster_size=512,refcount_bits=1")
    _create(folder, "lazy.qcow2", "5M", "-o", "lazy_refcounts=on,refcount_bits=64,cluster_size=2M")
    qemu_io(folder, "-c", "write -P 7 1M 3M", "lazy.qcow2")
    for mode in ("metadata", "falloc", "full"):
        _create(folder, f"{mode}.qcow2", "1M", "-o", f"preallocation={mode}")
    _create(folder, "mixed.qcow2", "1M")
    qemu_io(folder, "-c", "write 0 256k", "-c", "write -z 64k 64k", "-c", "discard 128k 64k", "mixed.qcow2")
    _create(folder, "two-data.qcow2", "128k")
    qemu_io(folder, "-c", "write -P 1 0 128k", "two-data.qcow2")
    _create(folder, "swapped.qcow2", "128k")
    qemu_io(folder, "-c", "write -P 1 64k 64k", "-c", "write -P 1 0 64k", "swapped.qcow2")
    _img(folder, "convert", "-c", "-O", "qcow2", "two-data.qcow2", "two-packed.qcow2")
    _img(folder, "convert", "-O", "raw", "two-data.qcow2", "two-data.raw")
    _create(folder, "late.qcow2", "20M")
    qemu_io(folder, "-c", "write -P 1 15M 1M", "late.qcow2")
    _img(folder, "create", "-q", "-f", "raw", "ten.raw", "10M")
    with (folder / "odd.raw").open("wb") as file:
        file.truncate(1_000_000)
    (folder / "junk.bin").write_bytes(b"junk")
    (folder / "x700.raw").write_bytes(b"x" * 700)
    (folder / "x701.raw").write_bytes(b"x" * 700 + b"y")
    (folder / "x701z.raw").write_bytes(b"x" * 600 + b"z" + b"x" * 100)
    (folder / "nothing.raw").write_bytes(b"")
    (folder / 'weird "name" é.qcow2').write_bytes((folder / "small.qcow2").read_bytes())
    (folder / "folder").mkdir()


def _vdi(folder: Path) -> None:
    """Dynamic and static images, an overlay of one, and copies with one thing wrong each."""
    _img(folder, "create", "-q", "-f", "vdi", "small.vdi", "5000k")
    qemu_io(folder, "-f", "vdi", "-c", "write -P 5 3M 20k", "-c", "write -P 3 100k 100", "small.vdi")
    _img(folder, "create", "-q", "-f", "vdi", "-o", "static=on", "static.vdi", "3M")
    qemu_io(folder, "-f", "vdi", "-c", "write -P 7 1100k 70k", "static.vdi")
    _create(folder, "on-vdi.qcow2", "6M", "-b", "small.vdi", "-F", "vdi")
    qemu_io(folder, "-c", "write -P 8 3M 64k", "-c", "write -P 8 5M 1k", "on-vdi.qcow2")
    good = (folder / "small.vdi").read_bytes()
    for name, *changes in (
        ("count.vdi", (0x184, 3)),
        ("twice.vdi", (0x200, 1)),
        ("too-far.vdi", (0x208, 7), (0x20C, 0xFFFFFFFE)),
        ("version.vdi", (0x44, 0x20000)),
    ):
        data = bytearray(good)
        for offset, value in changes:
            struct.pack_into("<I", data, offset, value)
        (folder / name).write_bytes(data)


def _chains(folder: Path) -> None:
    _create(folder, "overlay.qcow2", "1M", "-b", "small.qcow2", "-F", "qcow2")
    qemu_io(folder, "-c", "write -P 9 128k 64k", "overlay.qcow2")
    for name in ("snap1", "a very long snapshot name indeed"):
        _img(folder, "snapshot", "-c", name, "overlay.qcow2")
    _img(folder, "bitmap", "--add", "overlay.qcow2", "auto")
    _img(folder, "bitmap", "--add", "--disable", "-g", "512", "overlay.qcow2", "off, with é")
    table = bytearray((folder / "overlay.qcow2").read_bytes())
    (start,) = struct.unpack(">Q", table[64:72])
    struct.pack_into(">I", table, start + 16, 1_000_000_000)  # date
    struct.pack_into(">Q", table, start + 24, (3600 * 123 + 61) * 10**9 + 123456789)  # VM clock
    struct.pack_into(">Q", table, start + 40, 12345678901)  # VM state size
    struct.pack_into(">Q", table, start + 56, 777)  # icount
    (folder / "snapshots.qcow2").write_bytes(table)
    _create(folder, "top.qcow2", "3M", "-b", "overlay.qcow2", "-F", "qcow2", "-o", "cluster_size=512")
    qemu_io(folder, "-c", "write -P 8 1536k 2k", "-c", "write -z 2M 1k", "top.qcow2")
    _create(folder, "on-odd.qcow2", "2M", "-b", "odd.raw", "-F", "raw")
    _create(folder, "on-missing.qcow2", "1M", "-u", "-b", "missing", "-F", "raw")
    _create(folder, "on-on-missing.qcow2", "1M", "-u", "-b", "on-missing.qcow2", "-F", "qcow2")
    _create(folder, "on-junk.qcow2", "1M", "-u", "-b", "junk.bin", "-F", "qcow2")
    _create(folder, "on-unknown.qcow2", "1M", "-u", "-b", "foo:bar", "-F", "raw")
    _create(folder, "loop.qcow2", "1M")
    _img(folder, "rebase", "-u", "-b", "loop.qcow2", "-F", "qcow2", "loop.qcow2")
    _create(folder, "folder/relative.qcow2", "1M", "-u", "-b", "../small.qcow2", "-F", "qcow2")
    _create(folder, "folder/dotted.qcow2", "1M", "-u", "-b", "./nowhere", "-F", "qcow2")


def _damaged(folder: Path) -> None:
    """Copies of small.qcow2 with one thing wrong each."""
    good = (folder / "small.qcow2").read_bytes()
    (table,) = struct.unpack(">Q", good[48:56])
    (block,) = struct.unpack(">Q", good[table : table + 8])
    (l1,) = struct.unpack(">Q", good[40:48])
    clusters = len(good) // 4096

    def write(name: str, *changes: tuple[int, bytes], more: bytes = b"", cut: int | None = None) -> None:
        data = bytearray(good + more)[:cut]
        for offset, value in changes:
            data[offset : offset + len(value)] = value
        (folder / f"{name}.qcow2").write_bytes(data)

    lost = (block + 2 * (clusters - 1), b"\0\0")
    extra = [(block + 2 * index, b"\0\1") for index in range(clusters, clusters + 3)]
    write("leaking", *extra, more=bytes(3 * 4096))
    write("corrupt", lost)
    write("both", lost, *extra, more=bytes(3 * 4096))
    write("corrupt-bit", (79, bytes([good[79] | 2])))
    write("dirty", (79, bytes([good[79] | 1])))
    write("unknown-feature", (78, b"\1"))
    write("short", cut=50)
    write("version", (4, struct.pack(">I", 9)))
    write("huge", (24, struct.pack(">Q", 1 << 63)))
    write("cluster-bits", (20, struct.pack(">I", 30)))
    write("l1-unaligned", (l1, struct.pack(">Q", 0x1234567 | 1 << 63)))
    packed = bytearray((folder / "two-packed.qcow2").read_bytes())
    (l1,) = struct.unpack(">Q", packed[40:48])
    l2 = int.from_bytes(packed[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    data = int.from_bytes(packed[l2 : l2 + 8], "big") & ((1 << 54) - 1)
    packed[data : data + 20] = b"\xff" * 20
    (folder / "inflate.qcow2").write_bytes(packed)
