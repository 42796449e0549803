"""Operations that keep no journal: create, and bench -w."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from powercut import guest
from powercut.features import FOR_NEW, LUKS, OUTSIDE, SMALL, SUBCLUSTERS, V2, Kit
from powercut.judge import Scenario
from powercut.luks_disks import QUICK
from powercut.scenarios import KIB, data
from safeimg.drivers.formats.chain import open_chain
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.ops.bench import Requests, bench_write
from safeimg.ops.create import Request, create
from safeimg.ops.launch import Environment

Run = Callable[[Environment], Awaitable[None]]


def _nothing(fs: SimulatedFileSystem) -> None:
    fs.write_file("/base.raw", data(91, 40 * KIB))


def _over_another(fs: SimulatedFileSystem) -> None:
    """What is replaced is an image, too."""
    _nothing(fs)
    guest.create(fs, "/new.qcow2", "qcow2", 100 * KIB, cluster_size="4096")
    guest.write(fs, "/new.qcow2", [(0, data(92, 50 * KIB))])


def _create(path: str, fmt: str, options: dict[str, str], size: int | None, backing: str | None) -> Run:
    async def run(env: Environment) -> None:
        words = tuple(f"{name}={value}" for name, value in guest.spelled(options).items())
        request = Request(
            path, fmt, size, words, backing=backing, backing_format="raw" if backing else None, secrets=guest.SECRETS
        )
        create(env.fs, request, say=lambda line: None, supersede=lambda path: None)

    return run


def _creation(
    name: str, fmt: str = "qcow2", backing: str | None = None, size: int | None = 600 * KIB,
    build: Callable[[SimulatedFileSystem], None] = _nothing, files: tuple[tuple[str, str], ...] = (), **options: str,
) -> Scenario:  # fmt: skip
    path = f"/new.{fmt}"
    run = _create(path, fmt, options, size, backing)
    return Scenario(f"create {name}", build, run, path, None, ((path, fmt), *files), created=True, bare=True)


def _of(kit: Kit) -> Scenario:
    return _creation(f"qcow2, {kit.name}", files=kit.images("")[1:], **kit.options)


def _bench(kit: Kit) -> Scenario:
    async def run(env: Environment) -> None:
        layers = open_chain(env.fs, kit.named("/disk.qcow2"), write=True, secrets=guest.SECRETS)
        try:
            await bench_write(env, layers, Requests(count=12, size=3 * KIB, offset=5 * KIB, step=6 * KIB, pattern=7))
        finally:
            for layer in layers:
                layer.close()

    return Scenario(
        f"bench -w, {kit.name}", kit.disk(), run, "/disk.qcow2", None, kit.images("/disk.qcow2"), bare=True
    )


BARE = [
    *map(_of, FOR_NEW),
    _creation("qcow2"),
    _creation("qcow2 over another", build=_over_another),
    _creation("qcow2 -b", backing="base.raw", size=None),
    *(
        _creation(f"qcow2 preallocation={mode}", preallocation=mode, cluster_size="4096")
        for mode in ("metadata", "falloc", "full")
    ),
    _creation("raw", "raw"),
    *(_creation(f"raw preallocation={mode}", "raw", preallocation=mode) for mode in ("falloc", "full")),
    _creation("vdi", "vdi", size=3 << 20),
    _creation("static vdi", "vdi", size=3 << 20, static="on"),
    _creation("luks", "luks", **QUICK),
    *map(_bench, (V2, SMALL, SUBCLUSTERS, OUTSIDE, LUKS)),
]
