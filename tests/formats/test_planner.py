"""Generated images and writes: every crash state is a valid image, the result is what was written, and so is
what rolling back leaves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import pytest
from planner_harness import Engine, check, guest, needs_qemu, qemu_io, run, snapshot_guest

pytestmark = needs_qemu


class Shape(NamedTuple):
    cluster: int
    refcount_bits: int
    version: int
    size: int
    extended: bool = False


SHAPES = [
    # …; backed
    (Shape(512, 1, 3, 200 * 512), False),
    (Shape(512, 64, 3, 3000 * 512), True),
    (Shape(512, 16, 2, 1001 * 512), True),
    (Shape(4096, 2, 3, 1 << 20), True),
    (Shape(4096, 4, 3, (1 << 20) + 1536), False),
    (Shape(65536, 16, 3, (4 << 20) + 512), True),
    (Shape(65536, 16, 2, 4 << 20), False),
    (Shape(65536, 8, 3, 4 << 20), False),
    (Shape(2 << 20, 32, 3, (8 << 20) - 1024), True),
    (Shape(16384, 4, 3, (1 << 20) + 1536, extended=True), True),
    (Shape(16384, 16, 3, 1 << 20, extended=True), False),
    (Shape(65536, 64, 3, (3 << 20) + 33 * 512, extended=True), True),
    (Shape(65536, 1, 3, 3 << 20, extended=True), True),
]


def make(folder: Path, rng: random.Random, shape: Shape, *, backed: bool, snapshots: bool) -> Path:
    """An image with clusters of every kind, made by QEMU."""
    cluster, bits, version, size, extended = shape
    path = folder / "image.qcow2"
    options = f"cluster_size={cluster},compat={'1.1' if version == 3 else '0.10'}"
    if version == 3:
        options += f",refcount_bits={bits},extended_l2={'on' if extended else 'off'}"
    backing: list[str | Path] = []
    if backed:
        base = folder / "base.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", base, str(size - 512 * rng.randrange(3)))
        qemu_io(base, *(f"write -P {rng.randrange(1, 256)} {start} {size // 16 & ~511}"
                        for start in (rng.randrange(size * 7 // 8) & ~511 for _ in range(6))))
        backing = ["-b", base, "-F", "qcow2"]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, path, str(size))
    qemu_io(path, *random_commands(rng, shape, 12))
    if snapshots:
        run("qemu-img", "snapshot", "-c", "one", path)
        qemu_io(path, *random_commands(rng, shape, 6))
    check(path, leaks=False)
    return path


def random_commands(rng: random.Random, shape: Shape, count: int) -> list[str]:
    cluster, bits, version, size, extended = shape
    clusters = size // cluster
    commands = []
    for _ in range(count):
        kind = rng.choice(("write", "write", "write -c", "write -z", "write -zu", "discard"))
        if kind == "write -c" and bits == 2:
            continue  # several compressed clusters in one: no room for a snapshot's references
        number = rng.randrange(clusters)
        length = min(rng.randrange(1, 9), clusters - number) * cluster
        start = number * cluster
        if (kind == "write" or (extended and kind != "write -c")) and rng.random() < 0.5:
            start, length = start + 512 * rng.randrange(cluster // 512), 512 * rng.randrange(1, 20)
            length = min(length, size - start)
        if kind == "write -c":
            length = cluster
        pattern = "" if kind.startswith(("write -z", "discard")) else f"-P {rng.randrange(1, 256)} "
        if kind.startswith("write -z") and version == 2:
            continue
        commands.append(f"{kind} {pattern}{start} {length}")
    return commands


def random_writes(engine: Engine, rng: random.Random, count: int) -> None:
    """One step's worth: no subcluster is written twice, as no operation does."""
    size, cluster, unit = len(engine.model), engine.planner.cluster_size, engine.planner.granularity
    most = 12 * cluster if unit == cluster else 20 * unit
    touched: set[int] = set()
    for _ in range(count if unit == cluster else 4 * count):
        start = rng.randrange(size) & ~511
        if unit < cluster and rng.random() < 0.5:
            start %= 3 * cluster  # a few clusters get many small changes
        length = min(size - start, 512 * rng.randrange(1, max(2, min(most, size // 4) // 512)))
        kind = rng.choice(("write", "write", "zero", "zero", "compressed"))
        if kind == "compressed":
            start, length = start - start % cluster, 1
        elif kind == "zero" and rng.random() < 0.7:
            start -= start % unit
            length = min(-(-length // unit) * unit, size - start)
        parts = set(range(start // unit, (start + length - 1) // unit + 1))
        if kind == "compressed":
            parts = set(range(start // unit, (start + cluster) // unit))
        if parts & touched:
            continue
        touched |= parts
        if kind == "zero":
            engine.zero(start, length)
        elif kind == "compressed" and cluster <= 65536:
            engine.write_compressed(start // cluster, rng.randbytes(cluster // 3) * 2)
        else:
            engine.write(start, rng.randbytes(length))


@pytest.mark.parametrize(("shape", "backed"), SHAPES, ids=str)
def test_crash_states_result_and_rollback(tmp_path: Path, shape: Shape, backed: bool) -> None:
    rng = random.Random(f"{shape} {backed}")
    snapshots = shape.refcount_bits > 1
    path = make(tmp_path, rng, shape, backed=backed, snapshots=snapshots)
    kept = snapshot_guest(path, "one") if snapshots else b""
    original = path.read_bytes()
    engine = Engine(path, rng)
    clusters = shape.size // shape.cluster + 1
    for number in range(3):
        engine.reserve(2 * clusters)
        random_writes(engine, rng, 4)
        engine.apply(engine.planner.take())
        if number == 1:
            engine.reopen()
    check(path, leaks=True)
    assert guest(path) == engine.model
    unreleased = path.read_bytes()

    engine.apply(engine.planner.release())
    check(path, leaks=False)
    assert guest(path) == engine.model
    if snapshots:
        assert snapshot_guest(path, "one") == kept
    for offset, length in engine.planner.freed():  # nobody may miss it
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(b"\xee" * length)
    assert guest(path) == engine.model

    path.write_bytes(unreleased)
    engine.steps.pop()
    engine.roll_back()
    check(path, leaks=False)
    assert guest(path) == engine.original
    assert len(path.read_bytes()) == len(original)
    if snapshots:
        assert snapshot_guest(path, "one") == kept
