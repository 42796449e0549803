"""Resizes and safe rebases whose crash states are judged."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from powercut import guest
from powercut.judge import STEP_BYTES, Scenario
from powercut.scenarios import KIB, TOP, data, growing_on_larger, subclusters, three_layers
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.ops.launch import Environment
from safeimg.ops.rebase import rebase
from safeimg.ops.resize import resize


def _resize(path: str, size: int, **options: object) -> Callable[[Environment], Awaitable[None]]:
    async def run(env: Environment) -> None:
        await resize(env, path, lambda _: size, step_bytes=STEP_BYTES, **options)  # type: ignore[arg-type]

    return run


def _raw(fs: SimulatedFileSystem) -> None:
    fs.write_file("/disk.raw", data(61, 64 * KIB))


def _full(fs: SimulatedFileSystem) -> None:
    """Every cluster in use: there are several L2 tables to forget."""
    guest.create(fs, "/base.qcow2", "qcow2", 256 * KIB, cluster_size="512")
    guest.write(fs, "/base.qcow2", [(0, data(62, 256 * KIB))])


BASE = (("/base.qcow2", "qcow2"),)
RAW = (("/disk.raw", "raw"),)

RESIZES = [
    Scenario("resize", three_layers, _resize("/base.qcow2", 9000 * KIB), "/base.qcow2", None, BASE),
    Scenario(
        "resize over a larger base", growing_on_larger, _resize("/base.qcow2", 300 * KIB), "/base.qcow2", None, BASE
    ),
    *(
        Scenario(
            f"resize --preallocation={mode}", growing_on_larger,
            _resize("/base.qcow2", 180 * KIB, preallocation=mode), "/base.qcow2", None, BASE,
        )
        for mode in ("metadata", "full")
    ),
    Scenario("resize --shrink", _full, _resize("/base.qcow2", 70 * KIB, shrink=True), "/base.qcow2", None, BASE),
    Scenario("resize, raw", _raw, _resize("/disk.raw", 200 * KIB), "/disk.raw", None, RAW),
    *(
        Scenario(
            f"resize --preallocation={mode}, raw", _raw, _resize("/disk.raw", 200 * KIB, preallocation=mode),
            "/disk.raw", None, RAW,
        )
        for mode in ("falloc", "full")
    ),
    Scenario("resize --shrink, raw", _raw, _resize("/disk.raw", 20 * KIB, shrink=True), "/disk.raw", None, RAW),
]


def _other_base(fs: SimulatedFileSystem) -> None:
    """A base that holds some of what the old one does, other things elsewhere, and is shorter."""
    three_layers(fs)
    guest.create(fs, "/other.qcow2", "qcow2", 150 * KIB, cluster_size="8192")
    old = guest.content(fs, "/mid.qcow2")
    pieces = [(0, old[: 50 * KIB]), (70 * KIB, data(71, 40 * KIB)), (130 * KIB, old[130 * KIB : 140 * KIB])]
    guest.write(fs, "/other.qcow2", pieces)


def rebase_onto(backing: str | None) -> Callable[[Environment], Awaitable[None]]:
    async def run(env: Environment) -> None:
        await rebase(env, "/top.qcow2", backing or "", None if backing is None else "qcow2", step_bytes=STEP_BYTES)

    return run


def _parts_of_clusters(fs: SimulatedFileSystem) -> None:
    """An overlay with parts of clusters, and a base that differs from its own in single ones."""
    subclusters("16384")(fs)
    guest.create(fs, "/other.qcow2", "qcow2", 230 * KIB, cluster_size="4096")
    old = guest.content(fs, "/base.qcow2")
    pieces = [(0, old[: 7 * KIB]), (7 * KIB, data(72, 300)), (16 * KIB, old[16 * KIB : 120 * KIB]), (46 * KIB, None)]
    guest.write(fs, "/other.qcow2", [*pieces, (200 * KIB, data(73, 3 * KIB))])


REBASES = [
    Scenario("rebase", _other_base, rebase_onto("other.qcow2"), "/top.qcow2", "/top.qcow2", TOP),
    Scenario(
        "rebase, parts of clusters", _parts_of_clusters, rebase_onto("other.qcow2"), "/top.qcow2", "/top.qcow2", TOP
    ),
    Scenario("rebase within the chain", three_layers, rebase_onto("base.qcow2"), "/top.qcow2", "/top.qcow2", TOP),
    Scenario("rebase onto nothing", three_layers, rebase_onto(None), "/top.qcow2", "/top.qcow2", TOP),
]
