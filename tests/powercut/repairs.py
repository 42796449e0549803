"""check -r: images that are damaged in every way that can be repaired."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from powercut.judge import Scenario
from powercut.scenarios import DISK, two_snapshots
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.ops.launch import Environment
from safeimg.ops.repair import CHECK, REPAIR, repair


class Image:
    """An image's bytes, to be damaged."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.l1 = self.get(40)
        self.l2 = self.get(self.l1) & (1 << 56) - 512
        self.table = self.get(48)
        self.block = self.get(self.table)

    def get(self, offset: int, length: int = 8) -> int:
        return int.from_bytes(self.data[offset : offset + length], "big")

    def put(self, offset: int, value: int, length: int = 8) -> None:
        self.data[offset : offset + length] = value.to_bytes(length, "big")

    def count(self, cluster: int, change: int) -> None:
        at = self.block + 2 * cluster
        self.put(at, self.get(at, 2) + change, 2)

    def clusters(self, number: int) -> list[int]:
        """Of the disk's data, by host cluster."""
        entries = [self.get(self.l2 + 8 * index) for index in range(512)]
        return [(entry & (1 << 56) - 512) >> 12 for entry in entries if entry and not entry & 3 << 61][:number]

    def copied(self, at: int) -> None:
        self.put(at, self.get(at) ^ 1 << 63)


def _leaking(image: Image) -> None:
    clusters = len(image.data) >> 12
    image.data += bytes(5 << 12)
    for cluster in range(clusters, clusters + 4):
        image.count(cluster, 1)


def _miscounted(image: Image) -> None:
    first, second = image.clusters(2)
    image.count(first, 3)
    image.count(second, 1)
    image.copied(image.l1)
    low = next(c for c in range(len(image.data) >> 12) if image.get(image.block + 2 * c, 2) > 1)
    image.count(low, -1)
    image.copied(image.l2)
    _leaking(image)


def _uncounted(image: Image) -> None:
    for cluster in image.clusters(3):
        image.count(cluster, -image.get(image.block + 2 * cluster, 2))
    _leaking(image)


def _misplaced_blocks(image: Image) -> None:
    image.put(image.table, image.block + 512)


def _block_outside(image: Image) -> None:
    image.put(image.table + 8, len(image.data) + (7 << 12))
    _leaking(image)


def _incomplete_snapshots(image: Image) -> None:
    """A table as version 2 has it; and its clusters are counted twice."""
    at, table = image.get(64), b""
    for _ in range(image.get(60, 4)):
        extra, names = image.get(at + 36, 4), image.get(at + 12, 2) + image.get(at + 14, 2)
        entry = image.data[at : at + 36] + bytes(4) + image.data[at + 40 + extra : at + 40 + extra + names]
        table += entry + bytes(-len(entry) % 8)
        at += -(-(40 + extra + names) // 8) * 8
    start = image.get(64)
    image.data[start : start + len(table)] = table
    _leaking(image)


def _outside(image: Image) -> None:
    """A cluster far behind the end of the file, and one that is not aligned."""
    entries = [at for at in range(image.l2, image.l2 + 4096, 8) if image.get(at) and not image.get(at) & 3 << 61]
    image.put(entries[0], 1 << 63 | len(image.data) + (9 << 12))
    image.put(entries[1], image.get(entries[1]) + 512)
    _leaking(image)


def _shared(image: Image) -> None:
    """Two guest clusters in one host cluster, each the only user, they say."""
    entries = [at for at in range(image.l2, image.l2 + 4096, 8) if image.get(at) and not image.get(at) & 3 << 61]
    image.put(entries[1], image.get(entries[0]))
    image.put(entries[2], image.get(entries[0]))


def _marked(image: Image) -> None:
    image.put(72, image.get(72) | 2)
    _miscounted(image)


def _dirty(image: Image) -> None:
    image.put(72, image.get(72) | 1)
    image.put(80, 1)
    _uncounted(image)


def _damaged(damage: Callable[[Image], None], **options: str) -> Callable[[SimulatedFileSystem], None]:
    def build(fs: SimulatedFileSystem) -> None:
        two_snapshots(**options)(fs)
        image = Image(fs.read_file("/disk.qcow2"))
        damage(image)
        fs.write_file("/disk.qcow2", image.data)

    return build


def _repair(errors: bool, command: str) -> Callable[[Environment], Awaitable[None]]:
    async def run(env: Environment) -> None:
        done = await repair(env, "/disk.qcow2", errors=errors, command=command)
        assert done.first is not None and (done.first.corruptions_fixed or done.first.leaks_fixed)

    return run


def _repairs(name: str, damage: Callable[[Image], None], *, errors: bool = True, command: str = CHECK,
             stays: bool = False, **options: str) -> Scenario:
    """`stays`: some of it cannot be repaired."""
    run, build = _repair(errors, command), _damaged(damage, **options)
    return Scenario(name, build, run, "/disk.qcow2", "/disk.qcow2", DISK, broken=True, breaks=stays)


REPAIRS = [
    _repairs("check -r leaks", _leaking, errors=False),
    _repairs("check -r all, refcounts", _miscounted),
    _repairs("check -r all, rebuilt", _uncounted),
    _repairs("check -r all, rebuilt, version 2", _uncounted, compat="0.10"),
    _repairs("check -r all, refcount table", _misplaced_blocks),
    _repairs("check -r all, refcount block outside", _block_outside),
    _repairs("check -r all, snapshots", _incomplete_snapshots),
    _repairs("check -r all, references outside", _outside, stays=True),
    _repairs("check -r all, overlapping references", _shared),
    _repairs("check -r all, marked as corrupt", _marked),
    _repairs("repair of what was not closed", _dirty, command=REPAIR),
]
