"""Operations whose crash states are judged: small images, several steps, every way a cluster can be."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping

from powercut import guest
from powercut.judge import STEP_BYTES, Scenario
from safeimg.drivers.formats.qcow2 import pieces
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.ops import snapshot
from safeimg.ops.amend import amend
from safeimg.ops.commit_job import commit
from safeimg.ops.convert import convert
from safeimg.ops.convert_options import Blocks, Options
from safeimg.ops.launch import Environment
from safeimg.ops.rebase import rebase_unsafe

KIB = 1024
pieces.STEP_BYTES = STEP_BYTES  # of metadata made anew, too


def data(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def _text(seed: int, length: int) -> bytes:
    """Data that can be compressed."""
    return (f"line {seed} of a log file\n" * (length // 16)).encode()[:length]


def _commit(top: str, **options: object) -> Callable[[Environment], Awaitable[None]]:
    async def run(env: Environment) -> None:
        await commit(env, top, step_bytes=STEP_BYTES, **options)  # type: ignore[arg-type]

    return run


def overlay_pieces(cluster: int) -> list[tuple[int, bytes | None]]:
    """Aligned and unaligned writes, zeroes over data, over nothing, and data over zeroes."""
    return [
        (0, data(11, 3 * cluster)),
        (5 * cluster + 100, data(12, cluster)),
        (9 * cluster, None),
        (20 * cluster, None),
        (30 * cluster + 7, data(13, 2 * cluster + 300)),
        (40 * cluster, data(14, cluster)),
    ]


def _base_pieces(cluster: int) -> list[tuple[int, bytes | None]]:
    return [
        (0, data(1, 2 * cluster)),
        (4 * cluster, data(2, 3 * cluster)),
        (9 * cluster, data(3, cluster)),
        (40 * cluster, None),
        (60 * cluster + 5, data(4, 900)),
    ]


def qcow2_chain(cluster: int = 4 * KIB, *, base_size: int = 256 * KIB, top_size: int = 256 * KIB, **base_options: str):
    def build(fs: SimulatedFileSystem) -> None:
        guest.create(fs, "/base.qcow2", "qcow2", base_size, cluster_size=str(cluster), **base_options)
        pieces = [piece for piece in _base_pieces(cluster) if piece[0] + cluster <= base_size]
        guest.write(fs, "/base.qcow2", pieces)
        guest.create(
            fs, "/top.qcow2", "qcow2", top_size, cluster_size=str(cluster), backing_file="base.qcow2",
            backing_fmt="qcow2",
        )
        guest.write(fs, "/top.qcow2", overlay_pieces(cluster))

    return build


def raw_chain(fs: SimulatedFileSystem) -> None:
    fs.write_file("/base.raw", data(5, 128 * KIB) + bytes(64 * KIB))
    guest.create(
        fs, "/top.qcow2", "qcow2", 256 * KIB, cluster_size="4096", backing_file="base.raw", backing_fmt="raw"
    )
    guest.write(fs, "/top.qcow2", overlay_pieces(4 * KIB))


def growing_on_larger(fs: SimulatedFileSystem) -> None:
    """Hazard 12: the base is smaller than its own backing image, whose data growing must not expose."""
    guest.create(fs, "/root.qcow2", "qcow2", 256 * KIB, cluster_size="4096")
    guest.write(fs, "/root.qcow2", [(0, data(6, 250 * KIB))])
    guest.create(
        fs, "/base.qcow2", "qcow2", 90 * KIB, cluster_size="4096", backing_file="root.qcow2", backing_fmt="qcow2"
    )
    guest.write(fs, "/base.qcow2", [(8 * KIB, data(7, 9 * KIB))])
    guest.create(
        fs, "/top.qcow2", "qcow2", 256 * KIB, cluster_size="4096", backing_file="base.qcow2", backing_fmt="qcow2"
    )
    guest.write(fs, "/top.qcow2", overlay_pieces(4 * KIB))


def three_layers(fs: SimulatedFileSystem) -> None:
    qcow2_chain()(fs)
    guest.create(
        fs, "/mid.qcow2", "qcow2", 200 * KIB, cluster_size="4096", backing_file="base.qcow2", backing_fmt="qcow2"
    )
    guest.write(fs, "/mid.qcow2", [(4 * KIB, data(21, 30 * KIB)), (100 * KIB, None)])
    fs.unlink("/top.qcow2")
    guest.create(
        fs, "/top.qcow2", "qcow2", 256 * KIB, cluster_size="8192", backing_file="mid.qcow2", backing_fmt="qcow2"
    )
    guest.write(fs, "/top.qcow2", [(0, data(22, 5 * KIB)), (24 * KIB, None), (220 * KIB, data(23, 9 * KIB))])


def compressed(fs: SimulatedFileSystem) -> None:
    guest.create(fs, "/base.qcow2", "qcow2", 256 * KIB, cluster_size="4096")
    guest.write_compressed(fs, "/base.qcow2", [(number * 4096, _text(number, 4096)) for number in range(12)])
    guest.create(
        fs, "/top.qcow2", "qcow2", 256 * KIB, cluster_size="4096", backing_file="base.qcow2", backing_fmt="qcow2"
    )
    guest.write(fs, "/top.qcow2", [(6 * KIB, data(31, 20 * KIB)), (40 * KIB, None), (100 * KIB, data(32, 3 * KIB))])
    pieces = [(200 * KIB + number * 4096, _text(50 + number, 4096)) for number in range(4)]
    guest.write_compressed(fs, "/top.qcow2", pieces)


MIB = 1 << 20


def _large_pieces(fs: SimulatedFileSystem) -> None:
    """A disk of several VDI blocks, some without data."""
    guest.create(fs, "/source.qcow2", "qcow2", 4 * MIB + 1536)
    pieces = [(100, data(61, 70 * KIB)), (MIB + 7 * KIB, data(62, 9000)), (3 * MIB - 512, data(63, 1024))]
    guest.write(fs, "/source.qcow2", [*pieces, (4 * MIB + 512, data(64, 512)), (0, None)])


def _existing_vdi(fs: SimulatedFileSystem) -> None:
    """Blocks that are written anew, zeroed, or left alone."""
    _large_pieces(fs)
    guest.create(fs, "/target.vdi", "vdi", 5 * MIB)
    guest.write(fs, "/target.vdi", [(3 * MIB, data(65, MIB)), (MIB, data(66, MIB))], fmt="vdi")


def vdi_chain(fs: SimulatedFileSystem) -> None:
    guest.create(fs, "/base.vdi", "vdi", 4 * MIB)
    guest.write(fs, "/base.vdi", [(3 * MIB, data(67, 50 * KIB)), (MIB, data(68, 90 * KIB))], fmt="vdi")
    guest.create(fs, "/top.qcow2", "qcow2", 4 * MIB, backing_file="base.vdi", backing_fmt="vdi")
    pieces = [(100 * KIB, data(69, 70 * KIB)), (MIB + 64 * KIB, data(70, 100 * KIB)), (2 * MIB, data(71, 512))]
    guest.write(fs, "/top.qcow2", [*pieces, (3 * MIB, None), (64 * KIB, None)])


def subclusters(top_cluster: str = "4096", base_size: int = 256 * KIB, **base_options: str):
    """Extended L2 entries: clusters of 16 KiB with parts of 512 bytes, allocated and zero in all mixtures."""
    def build(fs: SimulatedFileSystem) -> None:
        extended = {"cluster_size": "16384", "extended_l2": "on", "backing_fmt": "qcow2"}
        top = extended if top_cluster == "16384" else {"cluster_size": top_cluster, "backing_fmt": "qcow2"}
        guest.create(fs, "/root.qcow2", "qcow2", 256 * KIB, cluster_size="4096")
        guest.write(fs, "/root.qcow2", [(0, data(61, 250 * KIB))])
        guest.create(fs, "/base.qcow2", "qcow2", base_size, backing_file="root.qcow2", **extended, **base_options)
        guest.write_compressed(fs, "/base.qcow2", [(48 * KIB, _text(62, 16 * KIB))])
        pieces = [(3 * KIB + 200, data(63, 2 * KIB)), (30 * KIB, data(64, 5 * KIB)), (64 * KIB, None)]
        guest.write(fs, "/base.qcow2", [*pieces, (66 * KIB, data(65, 700)), (80 * KIB, data(66, 16 * KIB))])
        guest.create(fs, "/top.qcow2", "qcow2", 256 * KIB, backing_file="base.qcow2", **top)
        guest.write(fs, "/top.qcow2", [
            (0, None), (1 * KIB, data(71, 4 * KIB)), (9 * KIB, data(72, 600)), (31 * KIB, data(73, 9 * KIB)),
            (50 * KIB, data(74, 1 * KIB)), (64 * KIB, data(75, 3 * KIB)), (80 * KIB, None),
            (85 * KIB, data(76, 512)), (96 * KIB, data(77, 100)), (96 * KIB, None), (110 * KIB, data(78, 20 * KIB)),
            (150 * KIB + 100, data(79, 40 * KIB)),
        ])

    return build


BASE_AND_TOP = (("/base.qcow2", "qcow2"), ("/top.qcow2", "qcow2"))

COMMITS = [
    Scenario("commit", qcow2_chain(), _commit("/top.qcow2"), "/base.qcow2", "/top.qcow2", BASE_AND_TOP),
    Scenario("commit -d", qcow2_chain(), _commit("/top.qcow2", drop=True), "/base.qcow2", "/top.qcow2", BASE_AND_TOP),
    Scenario(
        "commit, version 2", qcow2_chain(compat="0.10"), _commit("/top.qcow2"), "/base.qcow2", "/top.qcow2",
        BASE_AND_TOP,
    ),
    Scenario(
        "commit, 512-byte clusters", qcow2_chain(512, refcount_bits="1"), _commit("/top.qcow2"), "/base.qcow2",
        "/top.qcow2", BASE_AND_TOP,
    ),
    Scenario(
        "commit, growing base", qcow2_chain(base_size=100 * KIB), _commit("/top.qcow2"), "/base.qcow2", "/top.qcow2",
        BASE_AND_TOP,
    ),
    Scenario(
        "commit, base growing on a larger one", growing_on_larger, _commit("/top.qcow2"), "/base.qcow2", "/top.qcow2",
        BASE_AND_TOP,
    ),
    Scenario(
        "commit into raw", raw_chain, _commit("/top.qcow2"), "/base.raw", "/top.qcow2",
        (("/base.raw", "raw"), ("/top.qcow2", "qcow2")),
    ),
    Scenario(
        "commit -b through three layers", three_layers, _commit("/top.qcow2", base="/base.qcow2"), "/base.qcow2",
        "/top.qcow2", BASE_AND_TOP,
    ),
    Scenario(
        "commit into vdi", vdi_chain, _commit("/top.qcow2"), "/base.vdi", "/top.qcow2",
        (("/base.vdi", "vdi"), ("/top.qcow2", "qcow2")),
    ),
    Scenario("commit, subclusters", subclusters(), _commit("/top.qcow2"), "/base.qcow2", "/top.qcow2", BASE_AND_TOP),
    Scenario(
        "commit, subclusters of a growing base, preallocated",
        subclusters("16384", 101 * KIB + 512, preallocation="metadata"),
        _commit("/top.qcow2"), "/base.qcow2", "/top.qcow2", BASE_AND_TOP,
    ),
    Scenario("commit, compressed", compressed, _commit("/top.qcow2"), "/base.qcow2", "/top.qcow2", BASE_AND_TOP),
]


def convert_to(
    source: str, target: str, fmt: str, create_options: Mapping[str, str] | None = None, **options: object
) -> Callable[[Environment], Awaitable[None]]:
    told = fmt if isinstance(target, str) or options.get("create", True) else None
    given = [f"{name}={value}" for name, value in (create_options or {}).items()]

    async def run(env: Environment) -> None:
        await convert(
            env,
            Options(  # type: ignore[arg-type]
                (source,), target, target_format=told, create_options=given, step_bytes=STEP_BYTES, defer=0.0, **options
            ),
        )

    return run


def _existing_target(fs: SimulatedFileSystem) -> None:
    qcow2_chain()(fs)
    guest.create(fs, "/target.qcow2", "qcow2", 256 * KIB, cluster_size="4096")
    guest.write(fs, "/target.qcow2", [(0, data(41, 20 * KIB)), (50 * KIB, None), (100 * KIB, data(42, 9 * KIB))])


def _existing_raw(fs: SimulatedFileSystem) -> None:
    qcow2_chain()(fs)
    fs.write_file("/target.raw", data(43, 256 * KIB))


def _backed_target(fs: SimulatedFileSystem) -> None:
    three_layers(fs)


SMALL = {"cluster_size": "4096"}
NEW_QCOW2 = (("/target.qcow2", "qcow2"),)
NEW_VDI = (("/target.vdi", "vdi"),)

CONVERSIONS = [
    Scenario(
        "convert to qcow2", qcow2_chain(), convert_to("/top.qcow2", "/target.qcow2", "qcow2", create_options=SMALL),
        "/target.qcow2", None, NEW_QCOW2, created=True,
    ),
    Scenario(
        "convert to raw", qcow2_chain(), convert_to("/top.qcow2", "/target.raw", "raw"), "/target.raw", None,
        (("/target.raw", "raw"),), created=True,
    ),
    Scenario(
        "convert -c", compressed,
        convert_to("/top.qcow2", "/target.qcow2", "qcow2", compress=True, create_options=SMALL),
        "/target.qcow2", None, NEW_QCOW2, created=True,
    ),
    Scenario(
        "convert -B", _backed_target,
        convert_to(
            "/top.qcow2", "/target.qcow2", "qcow2", backing="mid.qcow2", backing_format="qcow2", create_options=SMALL
        ),
        "/target.qcow2", None, NEW_QCOW2, created=True,
    ),
    Scenario(
        "dd", qcow2_chain(),
        convert_to("/top.qcow2", "/target.qcow2", "qcow2", blocks=Blocks(700, 250, 9), sparse=0, create_options=SMALL),
        "/target.qcow2", None, NEW_QCOW2, created=True,
    ),
    Scenario(
        "dd to raw", qcow2_chain(),
        convert_to("/top.qcow2", "/target.raw", "raw", blocks=Blocks(700, 250, 9), sparse=0), "/target.raw", None,
        (("/target.raw", "raw"),), created=True,
    ),
    Scenario(
        "convert -n to raw", _existing_raw, convert_to("/top.qcow2", "/target.raw", "raw", create=False),
        "/target.raw", None, (("/target.raw", "raw"),), kept=False,
    ),
    Scenario(
        "convert to vdi", _large_pieces, convert_to("/source.qcow2", "/target.vdi", "vdi"), "/target.vdi", None,
        NEW_VDI, created=True,
    ),
    Scenario(
        "convert to static vdi", _large_pieces,
        convert_to("/source.qcow2", "/target.vdi", "vdi", create_options={"static": "on"}), "/target.vdi", None,
        NEW_VDI, created=True,
    ),
    Scenario(
        "convert -n --undo to vdi", _existing_vdi,
        convert_to("/source.qcow2", "/target.vdi", "vdi", create=False, undo=True), "/target.vdi", None, NEW_VDI,
    ),
    Scenario(
        "convert -n to vdi", _existing_vdi, convert_to("/source.qcow2", "/target.vdi", "vdi", create=False),
        "/target.vdi", None, NEW_VDI, kept=False,
    ),
    Scenario(
        "convert -n to qcow2", _existing_target, convert_to("/top.qcow2", "/target.qcow2", "qcow2", create=False),
        "/target.qcow2", None, NEW_QCOW2, kept=False,
    ),
    Scenario(
        "convert -n --undo to qcow2", _existing_target,
        convert_to("/top.qcow2", "/target.qcow2", "qcow2", create=False, undo=True), "/target.qcow2", None, NEW_QCOW2,
    ),
    Scenario(
        "convert -n --undo to raw", _existing_raw,
        convert_to("/top.qcow2", "/target.raw", "raw", create=False, undo=True), "/target.raw", None,
        (("/target.raw", "raw"),),
    ),
]



def two_bases(fs: SimulatedFileSystem) -> None:
    """The header's names cross the end of its first sector: the table of feature names, and a long file name."""
    qcow2_chain()(fs)
    for name in ("/other.raw", f"/{'o' * 200}.raw"):
        fs.write_file(name, data(51, 256 * KIB))
    fs.unlink("/top.qcow2")
    guest.create(
        fs, "/top.qcow2", "qcow2", 512 * KIB, cluster_size="8192", backing_file="base.qcow2", backing_fmt="qcow2"
    )
    guest.write(fs, "/top.qcow2", overlay_pieces(8 * KIB))


def _rebase_unsafe(backing: str | None) -> Callable[[Environment], Awaitable[None]]:
    async def run(env: Environment) -> None:
        await rebase_unsafe(env, "/top.qcow2", backing, None if backing is None else "raw")

    return run


TOP = (("/top.qcow2", "qcow2"),)


CHANGES = [
    Scenario(name, two_bases, _rebase_unsafe(backing), "/top.qcow2", "/top.qcow2", TOP, shows=True)
    for name, backing in (
        ("rebase -u", "other.raw"), ("rebase -u, long name", "o" * 200 + ".raw"), ("rebase -u onto nothing", None),
    )
]

def _with_zeroes(**options: str) -> Callable[[SimulatedFileSystem], None]:
    """Clusters marked as zeroes, with a place and without, over a backing image that shows through."""

    def build(fs: SimulatedFileSystem) -> None:
        qcow2_chain()(fs)
        fs.unlink("/top.qcow2")
        guest.create(
            fs, "/top.qcow2", "qcow2", 256 * KIB, cluster_size="4096", backing_file="base.qcow2", backing_fmt="qcow2",
            **options,
        )
        guest.write(fs, "/top.qcow2", [*overlay_pieces(4 * KIB), (0, None), (60 * 4 * KIB, None)])

    return build


def _amend(*options: str) -> Callable[[Environment], Awaitable[None]]:
    async def run(env: Environment) -> None:
        await amend(env, "/top.qcow2", options)

    return run


def _amendment(name: str, options: str, **made: str) -> Scenario:
    return Scenario(
        f"amend -o {name}", _with_zeroes(**made), _amend(options), "/top.qcow2", "/top.qcow2", TOP, shows=name == "size"
    )


AMENDMENTS = [
    _amendment("compat=0.10", "compat=0.10", lazy_refcounts="on"),
    _amendment("compat=1.1", "compat=1.1", compat="0.10"),
    _amendment("lazy_refcounts", "lazy_refcounts=on"),
    _amendment("refcount_bits, wider", "refcount_bits=64"),
    _amendment("refcount_bits, narrower", "refcount_bits=1"),
    _amendment("several", "compat=1.1,lazy_refcounts=on,refcount_bits=8", compat="0.10"),
    _amendment("size", "size=300k"),
    _amendment("several, down", "compat=0.10,refcount_bits=16", refcount_bits="2"),
]

DISK = (("/disk.qcow2", "qcow2"),)


def two_snapshots(compressed: bool = False, **options: str) -> Callable[[SimulatedFileSystem], None]:
    """What both snapshots and the disk share, what only some do, and what is in one alone; a cluster written anew and
    zeroed again; with `compressed`, clusters that share a host cluster."""

    def build(fs: SimulatedFileSystem) -> None:
        fs.write_file("/root.raw", data(60, 200 * KIB))
        cluster = int(options.setdefault("cluster_size", "4096"))
        guest.create(
            fs, "/disk.qcow2", "qcow2", 160 * cluster, backing_file="root.raw", backing_fmt="raw", **options
        )
        guest.write(fs, "/disk.qcow2", _base_pieces(cluster))
        if compressed:
            packed = [((80 + number) * cluster, _text(number, cluster)) for number in range(9)]
            guest.write_compressed(fs, "/disk.qcow2", packed)
        guest.snapshot(fs, "/disk.qcow2", "first")
        guest.write(fs, "/disk.qcow2", overlay_pieces(cluster))
        if compressed:
            guest.write(fs, "/disk.qcow2", [(81 * cluster + 9, data(61, 90)), (83 * cluster, None)])
            guest.write_compressed(fs, "/disk.qcow2", [(120 * cluster, _text(62, cluster))])
        guest.snapshot(fs, "/disk.qcow2", "second")
        guest.write(fs, "/disk.qcow2", [(2 * cluster, data(63, 700)), (60 * cluster, None), (150 * cluster, b"last")])

    return build


def _snapshot(action: str, name: str) -> Callable[[Environment], Awaitable[None]]:
    async def run(env: Environment) -> None:
        if action == "create":
            await snapshot.create(env, "/disk.qcow2", name, 1_800_000_000_000_001_000)
        else:
            await (snapshot.apply if action == "apply" else snapshot.delete)(env, "/disk.qcow2", name)

    return run


def _snapshots() -> list[Scenario]:
    images = {
        "": two_snapshots(),
        ", compressed": two_snapshots(compressed=True),
        ", version 2": two_snapshots(compat="0.10"),
        ", 512-byte clusters, narrow refcounts": two_snapshots(cluster_size="512", refcount_bits="2"),
    }
    actions = {"-c third": ("create", "third"), "-a first": ("apply", "first"), "-d first": ("delete", "first"),
               "-d second": ("delete", "second")}
    return [
        Scenario(
            f"snapshot {action}{kind}", build, _snapshot(*words), "/disk.qcow2", "/disk.qcow2", DISK,
            shows=words[0] == "apply",
        )
        for kind, build in images.items()
        for action, words in actions.items()
        if "narrow" not in kind or action != "-c third"
    ]


def _last_snapshot(fs: SimulatedFileSystem) -> None:
    """The disk shares everything with its only snapshot, and has another size by now."""
    guest.create(fs, "/disk.qcow2", "qcow2", 256 * KIB, cluster_size="4096", refcount_bits="8")
    guest.write(fs, "/disk.qcow2", _base_pieces(4096))
    guest.snapshot(fs, "/disk.qcow2", "only")
    file = fs.open("/disk.qcow2", write=True)
    file.pwrite(24, (192 * KIB).to_bytes(8, "big"))
    file.close()


SNAPSHOTS = [
    *_snapshots(),
    Scenario(
        "convert -l", two_snapshots(),
        convert_to("/disk.qcow2", "/target.qcow2", "qcow2", snapshot="first", create_options=SMALL), "/target.qcow2",
        None, NEW_QCOW2, created=True,
    ),
    Scenario(
        "snapshot -a, another size", _last_snapshot, _snapshot("apply", "only"), "/disk.qcow2", "/disk.qcow2", DISK,
        shows=True,
    ),
    Scenario("snapshot -d, the last", _last_snapshot, _snapshot("delete", "only"), "/disk.qcow2", "/disk.qcow2", DISK),
]
