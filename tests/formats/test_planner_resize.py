"""Growing: old data that would be exposed, bitmaps that have to fit, L1 tables of internal snapshots."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from planner_harness import Engine, check, guest, needs_qemu, qemu_io, run, snapshot_guest
from safeimg.drivers.errors import UnsupportedError, UsageError

pytestmark = needs_qemu


def grow(engine: Engine, size: int, backing_size: int = 0) -> None:
    """What an operation does to grow the disk."""
    old = len(engine.model)
    engine.apply_all(engine.planner.prepare_resize(size))
    exposed = engine.planner.exposed(size, backing_size)
    engine.reserve(sum(length // engine.planner.cluster_size + 2 for _start, length in exposed))
    for start, length in exposed:
        engine.zero(start, length)
    changes = engine.planner.take()
    if changes or engine.in_place:
        engine.apply(changes)
    *first, last = engine.planner.resize(size)
    engine.apply_all(first)
    engine.model.extend(bytes(size - old))
    engine.apply(last, crashes=4)


def bitmaps(path: Path) -> dict[str, tuple[int, bytes]]:
    """Name → (flags, bits), as stored."""
    data = path.read_bytes()
    cluster = 1 << int.from_bytes(data[20:24], "big")
    at = data.index(struct.pack(">II", 0x23852875, 24)) + 8
    count, _, _size, position = struct.unpack(">IIQQ", data[at:at + 24])
    found = {}
    for _ in range(count):
        table, entries, flags, _, _, name_size, _ = struct.unpack(">QIIBBHI", data[position:position + 24])
        bits = b""
        for entry in struct.unpack(f">{entries}Q", data[table:table + 8 * entries]):
            filler = b"\xff" if entry & 1 else b"\0"
            bits += data[entry:entry + cluster].ljust(cluster, b"\0") if entry >> 9 else filler * cluster
        found[data[position + 24:position + 24 + name_size].decode()] = (flags, bits)
        position += (24 + name_size + 7) & ~7
    return found


@pytest.mark.parametrize("version", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster", [512, 65536])
def test_hazard_12_a_base_that_grows_exposes_nothing_of_its_backing_image(
    tmp_path: Path, version: str, cluster: int
) -> None:
    rng = random.Random(f"{version} {cluster}")
    lower, path = tmp_path / "lower.qcow2", tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", lower, "600K")
    qemu_io(lower, "write -P 17 0 600K")
    options = f"compat={version},cluster_size={cluster}"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", lower, "-F", "qcow2", path, "100352")
    qemu_io(path, "write -P 33 90K 3K")
    engine = Engine(path, rng)
    grow(engine, 5 << 20, 600 << 10)
    assert guest(path) == engine.model
    engine.reserve(20)
    engine.write(3 << 20, rng.randbytes(3000 & ~511))
    engine.apply(engine.planner.take())
    engine.apply(engine.planner.release())
    check(path, leaks=False)
    assert guest(path) == engine.model
    engine.roll_back()
    check(path, leaks=False)
    assert guest(path) == engine.original


def test_remains_behind_the_end_are_zeroed(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "256K")
    qemu_io(path, "write -P 9 0 256K")
    run("qemu-img", "resize", "-q", "--shrink", path, "100K")
    engine = Engine(path, random.Random(3))
    grow(engine, 300 << 10)
    assert guest(path) == engine.model


@pytest.mark.parametrize(("cluster", "size", "behind"), [(1024, 9 << 20, False), (8192, 34 << 20, True)])
def test_hazard_16_bitmaps_fit_the_new_size(tmp_path: Path, cluster: int, size: int, behind: bool) -> None:
    """The bitmaps extension lies in the first sector, or reaches into the second (behind QEMU's feature
    names)."""
    rng = random.Random(cluster)
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, "2M")
    for name, granularity in (("fine", "512"), ("coarse", "64K")):
        run("qemu-img", "bitmap", "--add", "--enable", "-g", granularity, path, name)
    run("qemu-img", "bitmap", "--add", "--disable", "-g", "512", path, "off")
    qemu_io(path, "write -P 5 1M 100K")
    assert (path.read_bytes().index(struct.pack(">II", 0x23852875, 24)) + 32 > 512) == behind
    before = bitmaps(path)
    engine = Engine(path, rng)
    grow(engine, size)
    after = bitmaps(path)
    assert [(name, flags) for name, (flags, _) in after.items()] == [
        (name, flags) for name, (flags, _) in before.items()
    ]
    for name, (_, bits) in before.items():
        kept = after[name][1]
        assert kept.startswith(bits.rstrip(b"\0"))
        assert not any(kept[len(bits):])
    # Marking works on the new tables.
    ranges = [(1 << 20, 512), (size - 3000, 3000), (5 << 20, 1 << 20)]
    engine.reserve(engine.planner.marking_clusters(ranges))
    engine.apply(engine.planner.mark_dirty(ranges))
    marked = bitmaps(path)
    assert marked["off"] == after["off"]
    for start, length in ranges:
        for bit in range(start // 512, -(-(start + length) // 512)):
            assert marked["fine"][1][bit // 8] >> bit % 8 & 1
        for bit in range(start // 65536, -(-(start + length) // 65536)):
            assert marked["coarse"][1][bit // 8] >> bit % 8 & 1
    assert count_bits(marked["fine"][1]) == count_bits(before["fine"][1]) + 6 + 2048
    engine.apply(engine.planner.release())
    check(path, leaks=False)
    assert "in-use" not in run("qemu-img", "info", path)
    qemu_io(path, "write 8M 1K")  # QEMU opens it for writing, and so takes the bitmaps
    assert count_bits(bitmaps(path)["fine"][1]) == count_bits(marked["fine"][1]) + 2


def test_growing_with_bitmaps_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", path, "2M")
    run("qemu-img", "bitmap", "--add", "--enable", "-g", "512", path, "fine")
    qemu_io(path, "write -P 5 1M 100K")
    before, info = bitmaps(path), run("qemu-img", "info", path)
    engine = Engine(path, random.Random(5))
    grow(engine, 9 << 20)
    engine.roll_back()
    check(path, leaks=False)
    assert bitmaps(path) == before
    assert run("qemu-img", "info", path) == info


def count_bits(data: bytes) -> int:
    return int.from_bytes(data, "big").bit_count()


def test_resize_with_snapshots(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "1M")
    qemu_io(path, "write -P 5 0 700K")
    run("qemu-img", "snapshot", "-c", "one", path)
    kept = snapshot_guest(path, "one")
    engine = Engine(path, random.Random(6))
    grow(engine, 64 << 20)
    engine.apply(engine.planner.release())
    check(path, leaks=False)
    assert snapshot_guest(path, "one")[:len(kept)] == kept
    assert guest(path) == engine.model


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "1M")
    run("qemu-img", "snapshot", "-c", "one", path)
    planner = Engine(path, random.Random(0)).planner
    with pytest.raises(UnsupportedError, match=r"^Can't resize a v2 image which has snapshots$"):
        planner.prepare_resize(2 << 20)
    with pytest.raises(UsageError, match="multiple of 512"):
        planner.prepare_resize((2 << 20) + 1)
    with pytest.raises(UnsupportedError, match=r"^Can't resize a v2 image which has snapshots$"):
        planner.shrink(1 << 19)
    run("qemu-img", "snapshot", "-d", "one", path)
    planner = Engine(path, random.Random(0)).planner
    with pytest.raises(UsageError, match=r"^Failed to grow the L1 table: File too large$"):
        planner.prepare_resize(1 << 60)
