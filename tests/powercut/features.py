"""Each operation on qcow2 images with each feature: small images, and what only that feature makes different."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from unittest import mock

from powercut import guest
from powercut.judge import STEP_BYTES, Scenario
from powercut.repairs import Image, _leaking, _miscounted, _uncounted
from powercut.scenarios import _base_pieces, _text, convert_to, data, overlay_pieces
from safeimg.drivers.formats.naming import Blockdev
from safeimg.drivers.formats.qcow2 import pieces
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.ops import snapshot
from safeimg.ops.amend import amend
from safeimg.ops.bitmap import change_bitmaps
from safeimg.ops.bitmap_plan import BitmapAction
from safeimg.ops.commit_job import commit
from safeimg.ops.convert import convert
from safeimg.ops.convert_options import Options
from safeimg.ops.launch import Environment
from safeimg.ops.rebase import rebase, rebase_unsafe
from safeimg.ops.repair import repair
from safeimg.ops.resize import resize

Run = Callable[[Environment], Awaitable[None]]


@dataclass(frozen=True)
class Kit:
    """What an image is made with."""

    name: str
    options: dict[str, str] = field(default_factory=dict)
    compressed: bool = False
    snapshots: bool = False
    bitmaps: bool = False

    @property
    def cluster(self) -> int:
        return int(self.options.get("cluster_size", 4096))

    @property
    def has_backing(self) -> bool:
        return self.options.get("data_file_raw") != "on"

    def key(self, prefix: str = "") -> dict[str, str]:
        return {f"{prefix}encrypt.key-secret": "s0"} if "encrypt_format" in self.options else {}

    def named(self, path: str) -> str | Blockdev:
        return guest.named(path, self.key()) if self.key() else path

    def images(self, path: str) -> tuple[tuple[str, str], ...]:
        outside = (("/data.bin", "raw"),) if self.options.get("data_file_raw") == "on" else ()
        return ((path, "qcow2"), *outside)

    def make(self, fs: SimulatedFileSystem, path: str, size: int, backing: str | None = None) -> None:
        options = {"cluster_size": "4096", **self.options}
        if backing is not None and self.has_backing:
            options |= {"backing_file": backing, "backing_fmt": backing.rpartition(".")[2]}
        guest.create(fs, path, "qcow2", size, **options)
        cluster = min(self.cluster, size // 160)
        if self.compressed:
            packed = [(self.cluster * (12 + n), _text(n, self.cluster)) for n in range(6)]
            guest.write_compressed(fs, path, packed)
        guest.write(fs, path, [piece for piece in _base_pieces(cluster) if piece[0] + 4 * cluster < size])
        if self.snapshots:
            guest.snapshot(fs, path, "first")
        if self.bitmaps:
            guest.bitmaps(fs, path, [("fine", 512, True), ("coarse", 16384, True), ("off", 4096, False)])
            guest.mark(fs, path, [(0, 3 * cluster), (50 * cluster, 30 * cluster)])
        guest.write(fs, path, overlay_pieces(cluster))
        if self.snapshots:
            guest.snapshot(fs, path, "second")
            guest.write(fs, path, [(2 * cluster, data(63, 700)), (60 * cluster, None)])

    def disk(self, path: str = "/disk.qcow2") -> Callable[[SimulatedFileSystem], None]:
        """An overlay of a raw image that is a little shorter."""

        def build(fs: SimulatedFileSystem) -> None:
            fs.write_file("/root.raw", data(60, 150 * min(self.cluster, 4096)))
            self.make(fs, path, 160 * min(self.cluster, 4096), "root.raw")

        return build

    def with_(self, **changes: bool) -> Kit:
        return replace(self, **changes)  # type: ignore[arg-type]


PLAIN = Kit("plain")
V2 = Kit("version 2", {"compat": "0.10"})
SMALL = Kit("512-byte clusters, narrow refcounts", {"cluster_size": "512", "refcount_bits": "4"})
ONE_BIT = Kit("refcounts of one bit", {"refcount_bits": "1"})
LARGE = Kit("64 KiB clusters", {"cluster_size": "65536"})
WIDE = Kit("wide refcounts", {"refcount_bits": "64"})
LAZY = Kit("lazy refcounts", {"lazy_refcounts": "on"})
SUBCLUSTERS = Kit("extended L2", {"extended_l2": "on", "cluster_size": "16384"})
OUTSIDE = Kit("data file", {"data_file": "/data.bin"})
RAW_OUTSIDE = Kit("raw data file", {"data_file": "/data.bin", "data_file_raw": "on"})
AES = Kit("AES", {"encrypt_format": "aes", "encrypt_key_secret": "s0"})
AES_V2 = Kit("AES, version 2", {"encrypt_format": "aes", "encrypt_key_secret": "s0", "compat": "0.10"})
LUKS = Kit("LUKS", {
    "encrypt_format": "luks", "encrypt_key_secret": "s0", "encrypt_cipher-alg": "aes-128",
    "encrypt_cipher-mode": "cbc", "encrypt_iter-time": "0",
})  # fmt: skip
COMPRESSED = Kit("compressed", compressed=True)
ZSTD = Kit("zstd", {"compression_type": "zstd"}, compressed=True)
SNAPSHOTS = Kit("snapshots", snapshots=True)
BITMAPS = Kit("bitmaps", bitmaps=True)

FOR_NEW = (V2, SMALL, ONE_BIT, LARGE, WIDE, LAZY, SUBCLUSTERS, OUTSIDE, RAW_OUTSIDE, AES, LUKS)
OF_ONE_DISK = (V2, SMALL, ONE_BIT, LARGE, WIDE, LAZY, SUBCLUSTERS, OUTSIDE, AES, LUKS, ZSTD, SNAPSHOTS, BITMAPS)


def _on_disk(
    name: str, kits: Iterable[Kit], run: Callable[[Kit], Run], *, top: bool = True, shows: bool = False
) -> list[Scenario]:
    shown = "/disk.qcow2" if top else None
    return [
        Scenario(
            f"{name}, {kit.name}", kit.disk(), run(kit), "/disk.qcow2", shown, kit.images("/disk.qcow2"), shows=shows
        )
        for kit in kits
    ]


# ---- operations


def _snapshot(action: str, name: str) -> Callable[[Kit], Run]:
    def of(kit: Kit) -> Run:
        async def run(env: Environment) -> None:
            where = kit.named("/disk.qcow2")
            if action == "create":
                await snapshot.create(env, where, name, 1_800_000_000_000_001_000)
            else:
                await (snapshot.apply if action == "apply" else snapshot.delete)(env, where, name)

        return run

    return of


def _amend(words: str) -> Callable[[Kit], Run]:
    def of(kit: Kit) -> Run:
        async def run(env: Environment) -> None:
            await amend(env, kit.named("/disk.qcow2"), [words])

        return run

    return of


def _resize(clusters: int, **options: object) -> Callable[[Kit], Run]:
    def of(kit: Kit) -> Run:
        async def run(env: Environment) -> None:
            size = clusters * min(kit.cluster, 4096)
            await resize(env, kit.named("/disk.qcow2"), lambda _: size, step_bytes=STEP_BYTES, **options)  # type: ignore[arg-type]

        return run

    return of


def _bitmap(*actions: BitmapAction) -> Callable[[Kit], Run]:
    def of(kit: Kit) -> Run:
        async def run(env: Environment) -> None:
            with mock.patch.object(pieces, "STEP_BYTES", 1):
                await change_bitmaps(env, kit.named("/disk.qcow2"), actions)

        return run

    return of


def _rebase(backing: str, fmt: str | None) -> Callable[[Kit], Run]:
    def of(kit: Kit) -> Run:
        async def run(env: Environment) -> None:
            await rebase(env, kit.named("/disk.qcow2"), backing, fmt, step_bytes=STEP_BYTES)

        return run

    return of


def _rebase_unsafe(kit: Kit) -> Run:
    async def run(env: Environment) -> None:
        await rebase_unsafe(env, kit.named("/disk.qcow2"), None, None)

    return run


def _repair(kit: Kit) -> Run:
    async def run(env: Environment) -> None:
        await repair(env, kit.named("/disk.qcow2"), errors=True)

    return run


def _damaged(kit: Kit, damage: Callable[[Image], None]) -> Callable[[SimulatedFileSystem], None]:
    def build(fs: SimulatedFileSystem) -> None:
        kit.disk()(fs)
        image = Image(fs.read_file("/disk.qcow2"))
        damage(image)
        fs.write_file("/disk.qcow2", image.data)

    return build


def _repaired(what: str, kit: Kit, damage: Callable[[Image], None]) -> Scenario:
    return Scenario(
        f"check -r all, {what}, {kit.name}", _damaged(kit, damage), _repair(kit), "/disk.qcow2", "/disk.qcow2",
        kit.images("/disk.qcow2"), broken=True,
    )


def _commit(kit: Kit, path: str, prefix: str = "") -> Run:
    async def run(env: Environment) -> None:
        where = guest.named(path, kit.key(prefix)) if kit.key() else path
        await commit(env, where, step_bytes=STEP_BYTES)

    return run


def _below(kit: Kit) -> Callable[[SimulatedFileSystem], None]:
    """The base of a plain overlay."""

    def build(fs: SimulatedFileSystem) -> None:
        cluster = min(kit.cluster, 4096)
        kit.make(fs, "/base.qcow2", 160 * cluster)
        guest.create(
            fs, "/top.qcow2", "qcow2", 160 * cluster, cluster_size="4096", backing_file="base.qcow2",
            backing_fmt="qcow2",
        )
        pieces = [(cluster, data(21, 9 * cluster)), (30 * cluster, data(22, 700))]
        guest.write(fs, "/top.qcow2", [*pieces, (100 * cluster, data(23, 5 * cluster))])

    return build


def _source_and(kit: Kit | None) -> Callable[[SimulatedFileSystem], None]:
    def build(fs: SimulatedFileSystem) -> None:
        Kit("source", compressed=True).make(fs, "/source.qcow2", 640 << 10)
        if kit is not None:
            kit.make(fs, "/target.qcow2", 160 * 4096)

    return build


def _creation(kit: Kit, **more: str) -> dict[str, str]:
    return {"cluster_size": "4096", **guest.spelled(kit.options), **more}


def _to_new(kit: Kit, compress: bool = False, **more: str) -> Scenario:
    run = convert_to(
        "/source.qcow2", "/target.qcow2", "qcow2", create_options=_creation(kit, **more), compress=compress
    )
    told = "".join(["-c " if compress else "", *(f"-o {name}={value} " for name, value in more.items())])
    return Scenario(
        f"convert {told}to {kit.name}", _source_and(None), run, "/target.qcow2", None, kit.images("/target.qcow2"),
        created=True,
    )


async def _several(env: Environment) -> None:
    await convert(
        env,
        Options(
            ("/source.qcow2", "/other.raw", "/source.qcow2"), "/target.qcow2", target_format="qcow2",
            create_options=["cluster_size=4096"], step_bytes=STEP_BYTES, defer=0.0,
        ),
    )


def _sources(fs: SimulatedFileSystem) -> None:
    _source_and(None)(fs)
    fs.write_file("/other.raw", data(81, 30 * 1024) + bytes(20 * 1024) + data(82, 3 * 512))


def _scenarios() -> Sequence[Scenario]:
    adding = BitmapAction("add", "new")
    merging = BitmapAction("merge", "new", source="fine")
    changing = [_bitmap(BitmapAction("clear", "fine"), BitmapAction("disable", "coarse"), adding, merging)]
    kits = (SMALL, LARGE, WIDE, LAZY, SUBCLUSTERS, AES, LUKS, ZSTD, BITMAPS)
    with_snapshots = [kit.with_(snapshots=True) for kit in kits]
    return [
        *(each for words in (("create", "third", "-c"), ("apply", "first", "-a"), ("delete", "first", "-d"))
          for each in _on_disk(
              f"snapshot {words[2]}", [kit for kit in with_snapshots if words[2] != "-a" or not kit.bitmaps],
              _snapshot(*words[:2]), shows=words[2] == "-a")),
        *_on_disk("amend -o refcount_bits=32", (SUBCLUSTERS, OUTSIDE, LUKS, SNAPSHOTS, BITMAPS, LAZY, SMALL),
                  _amend("refcount_bits=32")),
        *_on_disk("amend -o compat=0.10", (AES, SNAPSHOTS, COMPRESSED), _amend("compat=0.10")),
        *_on_disk("amend -o compat=1.1", (AES_V2, V2.with_(snapshots=True)), _amend("compat=1.1")),
        *_on_disk("amend -o lazy_refcounts=off", (LAZY,), _amend("lazy_refcounts=off")),
        *_on_disk("amend -o data_file_raw=off", (RAW_OUTSIDE,), _amend("data_file_raw=off")),
        *_on_disk("resize", (*OF_ONE_DISK, RAW_OUTSIDE), _resize(200), top=False),
        *_on_disk("resize --preallocation=metadata", (SMALL, SUBCLUSTERS, OUTSIDE, RAW_OUTSIDE, LUKS),
                  _resize(200, preallocation="metadata"), top=False),
        *_on_disk("resize --preallocation=falloc", (PLAIN, SUBCLUSTERS, OUTSIDE), _resize(200, preallocation="falloc"),
                  top=False),
        *_on_disk("resize --preallocation=full", (SUBCLUSTERS, RAW_OUTSIDE, AES), _resize(200, preallocation="full"),
                  top=False),
        *_on_disk("resize --shrink", [kit for kit in (*OF_ONE_DISK, RAW_OUTSIDE) if not kit.snapshots],
                  _resize(35, shrink=True), top=False),
        *_on_disk("bitmap --add", (*OF_ONE_DISK[1:-1], RAW_OUTSIDE), _bitmap(adding)),
        *(each for run in changing for each in _on_disk(
            "bitmap --clear --disable --add --merge",
            [kit.with_(bitmaps=True) for kit in (SMALL, SUBCLUSTERS, OUTSIDE, LUKS, SNAPSHOTS)], run)),
        *_on_disk("rebase", OF_ONE_DISK, _rebase("/root.raw", "raw")),
        *_on_disk("rebase onto nothing", OF_ONE_DISK, _rebase("", None)),
        *_on_disk("rebase -u", (V2, LUKS, SNAPSHOTS), _rebase_unsafe, shows=True),
        *(_repaired("leaks and refcounts", kit, _miscounted) for kit in (V2, AES, ZSTD, BITMAPS, LAZY)),
        *(_repaired("leaks", kit, _leaking) for kit in (LUKS, OUTSIDE, RAW_OUTSIDE)),
        *(_repaired("rebuilt", kit, _uncounted) for kit in (AES, LUKS, ZSTD, BITMAPS, LAZY)),
        *(Scenario(f"commit from {kit.name}", kit.disk(), _commit(kit, "/disk.qcow2"), "/root.raw", "/disk.qcow2",
                   (("/root.raw", "raw"), *kit.images("/disk.qcow2"))) for kit in OF_ONE_DISK),
        *(Scenario(f"commit into {kit.name}", _below(kit), _commit(kit, "/top.qcow2", "backing."), "/base.qcow2",
                   "/top.qcow2", (*kit.images("/base.qcow2"), ("/top.qcow2", "qcow2")))
          for kit in (ONE_BIT, LARGE, WIDE, LAZY, ZSTD, SNAPSHOTS, BITMAPS, SUBCLUSTERS.with_(bitmaps=True))),
        *(_to_new(kit) for kit in (V2, SMALL, LARGE, WIDE, LAZY, SUBCLUSTERS, RAW_OUTSIDE, LUKS)),
        _to_new(ZSTD, compress=True),
        *(_to_new(kit, preallocation=mode) for kit, mode in
          ((PLAIN, "metadata"), (PLAIN, "full"), (SUBCLUSTERS, "falloc"), (OUTSIDE, "metadata"))),
        Scenario("convert of several", _sources, _several, "/target.qcow2", None, (("/target.qcow2", "qcow2"),),
                 created=True),
        *(Scenario(f"convert -n --undo into {kit.name}", _source_and(kit),
                   convert_to("/source.qcow2", kit.named("/target.qcow2"), "qcow2", create=False, undo=True),
                   "/target.qcow2", None, kit.images("/target.qcow2"))
          for kit in (V2, ONE_BIT, SUBCLUSTERS, RAW_OUTSIDE, LUKS, ZSTD, SNAPSHOTS, BITMAPS)),
        Scenario("convert -n -c --undo into compressed", _source_and(COMPRESSED),
                 convert_to("/source.qcow2", "/target.qcow2", "qcow2", create=False, undo=True, compress=True),
                 "/target.qcow2", None, (("/target.qcow2", "qcow2"),)),
    ]  # fmt: skip


FEATURES = _scenarios()
