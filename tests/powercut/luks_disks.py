"""Operations on LUKS images."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from powercut import guest, straight
from powercut.judge import STEP_BYTES, Scenario, environment
from powercut.scenarios import KIB, convert_to, data, overlay_pieces, qcow2_chain
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.ops.amend import amend
from safeimg.ops.commit_job import commit
from safeimg.ops.launch import Environment
from safeimg.ops.resize import resize

# A short key makes a short header.
QUICK = {"key-secret": "s0", "cipher-alg": "aes-128", "cipher-mode": "cbc", "iter-time": "0"}
KEY = {"key-secret": "s0"}
DISK = (("/disk.luks", "luks"),)
TARGET = (("/target.luks", "luks"),)

Run = Callable[[Environment], Awaitable[None]]


def _make(fs: SimulatedFileSystem, path: str, size: int) -> None:
    guest.create(fs, path, "luks", size, **QUICK)
    pieces = [(at, data(81 + at // 4096, min(4096, size - at))) for at in range(0, size, 4096)]
    guest.write(fs, path, pieces, fmt="luks")


def _disk(fs: SimulatedFileSystem) -> None:
    _make(fs, "/disk.luks", 64 * KIB)


def _two_passwords(fs: SimulatedFileSystem) -> None:
    _disk(fs)
    straight.run(_amend("state=active,new-secret=s0,iter-time=0"), environment(fs))


def _all_passwords(fs: SimulatedFileSystem) -> None:
    """Slots 6 and 7 too, which lie behind the header's first sector."""
    _disk(fs)
    for _ in range(6):
        straight.run(_amend("state=active,new-secret=s0,iter-time=0"), environment(fs))
    straight.run(_amend("state=active,new-secret=s1,iter-time=0"), environment(fs))
    straight.run(_amend("state=inactive,keyslot=5"), environment(fs))
    straight.run(_amend("state=active,new-secret=s1,iter-time=0"), environment(fs))


def _chain(fs: SimulatedFileSystem) -> None:
    _make(fs, "/base.luks", 256 * KIB)
    guest.create(
        fs, "/top.qcow2", "qcow2", 256 * KIB, cluster_size="4096", backing_file="base.luks", backing_fmt="luks"
    )
    guest.write(fs, "/top.qcow2", overlay_pieces(4096))


def _existing(fs: SimulatedFileSystem) -> None:
    qcow2_chain()(fs)
    _make(fs, "/target.luks", 256 * KIB)


def _amend(words: str) -> Run:
    async def run(env: Environment) -> None:
        await amend(env, guest.named("/disk.luks", KEY), [words], force=True)

    return run


def _resize(size: int, **options: object) -> Run:
    async def run(env: Environment) -> None:
        name = guest.named("/disk.luks", KEY)
        await resize(env, name, lambda _: size, step_bytes=STEP_BYTES, **options)  # type: ignore[arg-type]

    return run


async def _commit(env: Environment) -> None:
    await commit(env, guest.named("/top.qcow2", {"backing.key-secret": "s0"}), step_bytes=STEP_BYTES)


LUKS_DISKS = [
    Scenario(
        "convert to luks", qcow2_chain(), convert_to("/top.qcow2", "/target.luks", "luks", create_options=QUICK),
        "/target.luks", None, TARGET, created=True,
    ),
    Scenario(
        "convert -n --undo into luks", _existing,
        convert_to("/top.qcow2", guest.named("/target.luks", KEY), "luks", create=False, undo=True), "/target.luks",
        None, TARGET,
    ),
    Scenario(
        "commit into luks", _chain, _commit, "/base.luks", "/top.qcow2",
        (("/base.luks", "luks"), ("/top.qcow2", "qcow2")),
    ),
    Scenario("resize, luks", _disk, _resize(200 * KIB), "/disk.luks", None, DISK),
    Scenario(
        "resize --preallocation=full, luks", _disk, _resize(200 * KIB, preallocation="full"), "/disk.luks", None, DISK
    ),
    Scenario("resize --shrink, luks", _disk, _resize(20 * KIB, shrink=True), "/disk.luks", None, DISK),
    *(
        Scenario(f"amend luks, {name}", build, _amend(words), "/disk.luks", "/disk.luks", DISK)
        for name, build, words in (
            ("a password more", _disk, "state=active,new-secret=s1,iter-time=0"),
            ("the last slot but one", _disk, "state=active,new-secret=s1,keyslot=6,iter-time=0"),
            ("another password", _two_passwords, "state=active,new-secret=s1,keyslot=0,iter-time=0"),
            ("a password less", _two_passwords, "state=inactive,keyslot=0"),
            ("several less", _all_passwords, "state=inactive,old-secret=s1"),
        )
    ),
]
