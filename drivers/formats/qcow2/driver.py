"""The qcow2 driver: the parts of this package behind `formats.api.Driver`."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from safeimg.drivers.errors import RefusedError
from safeimg.drivers.formats.api import (
    PLAIN,
    Changes,
    CheckResult,
    CreateOption,
    Image,
    Opening,
    Patch,
    Planner,
    RuntimeOption,
)
from safeimg.drivers.formats.encryption import luks_create_options
from safeimg.drivers.formats.features import (
    Amending,
    BitmapBits,
    Bitmapping,
    BitmapState,
    Measuring,
    Rebasing,
    Repair,
    Repairing,
    SnapshotEntry,
    Snapshotting,
    WantedBitmap,
)
from safeimg.drivers.formats.qcow2.header import KNOWN_AUTOCLEAR, MAGIC, MAX_SNAPSHOTS, UNFINISHED
from safeimg.drivers.formats.qcow2.image import Qcow2Image, open_image
from safeimg.drivers.formats.qcow2.runtime import RUNTIME_OPTIONS, apply_runtime
from safeimg.drivers.formats.qcow2.snapshots import Snapshot
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import File, FileSystem

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner

CREATE_OPTIONS = (
    CreateOption("encryption", "bool", "Encrypt the image with format 'aes'. (Deprecated in favor of "
                                       "encrypt.format=aes)"),
    CreateOption("encrypt.format", "str", "Encrypt the image, format choices: 'aes', 'luks'"),
    CreateOption("encrypt.key-secret", "str", "ID of secret providing qcow AES key or LUKS passphrase"),
    *luks_create_options("encrypt."),
    CreateOption("cluster_size", "size", "qcow2 cluster size", "65536"),
    CreateOption("extended_l2", "bool", "Extended L2 tables", "off"),
    CreateOption("preallocation", "str", "Preallocation mode (allowed values: off, metadata, falloc, full)"),
    CreateOption("compression_type", "str", "Compression method used for image cluster compression", "zlib"),
    CreateOption("size", "size", "Virtual disk size"),
    CreateOption("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    CreateOption("backing_file", "str", "File name of a base image"),
    CreateOption("backing_fmt", "str", "Image format of the base image"),
    CreateOption("data_file", "str", "File name of an external data file"),
    CreateOption("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
    CreateOption("lazy_refcounts", "bool", "Postpone refcount updates", "off"),
    CreateOption("refcount_bits", "num", "Width of a reference count entry in bits", "16"),
    CreateOption("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
)


class Qcow2Rebasing:
    """Implements `formats.features.Rebasing`."""

    def set_backing(
        self, image: Image, planner: Planner, filename: str | None, fmt: str | None
    ) -> Iterable[Changes]:
        from safeimg.drivers.formats.qcow2.backing import set_backing

        return set_backing(own_planner(planner), filename, fmt)

    def marks_zeroes(self, image: Image) -> bool:
        return own_image(image).header.version > 2

    def accepts(self, image: Image, filename: str) -> bool:
        from safeimg.drivers.formats.qcow2.backing import accepts_backing

        return accepts_backing(own_image(image).header, filename)


class Qcow2Snapshotting:
    """Implements `formats.features.Snapshotting`."""

    def entries(self, image: Image) -> Sequence[SnapshotEntry]:
        return own_image(image).snapshots

    def at(self, image: Image, entry: SnapshotEntry) -> Qcow2Image:
        return own_image(image).at(_own_entry(entry))

    def refuse(self, image: Image, *, applying: bool) -> None:
        own = own_image(image)
        if applying and own.bitmaps:  # which would have to know what changes
            raise RefusedError(image.file.path, "Device has active dirty bitmaps")
        if own.data is not own.file:
            raise RefusedError(image.file.path, "its data lies in a file of its own", errno=errno.ENOTSUP)
        if not applying and own.header.nb_snapshots >= MAX_SNAPSHOTS:
            raise RefusedError(image.file.path, f"it has {MAX_SNAPSHOTS} snapshots already", errno=errno.EFBIG)

    def create(self, image: Image, planner: Planner, name: str, seconds: int, nanoseconds: int) -> Iterable[Changes]:
        from safeimg.drivers.formats.qcow2.snapshot_changes import create

        return create(own_planner(planner), name, seconds, nanoseconds)

    def apply(self, image: Image, planner: Planner, entry: SnapshotEntry) -> Iterable[Changes]:
        from safeimg.drivers.formats.qcow2.snapshot_changes import apply

        return apply(own_planner(planner), _own_entry(entry))

    def delete(self, image: Image, planner: Planner, entry: SnapshotEntry) -> Iterable[Changes]:
        from safeimg.drivers.formats.qcow2.snapshot_changes import delete

        return delete(own_planner(planner), _own_entry(entry))


class Qcow2Bitmapping:
    """Implements `formats.features.Bitmapping`."""

    def supported(self, image: Image) -> bool:
        return own_image(image).header.version > 2

    def listed(self, image: Image) -> Sequence[BitmapState]:
        return [
            BitmapState(bitmap.name, bitmap.granularity, bitmap.enabled, bitmap.in_use)
            for bitmap in own_image(image).bitmaps
        ]

    def bits(self, image: Image, name: str) -> BitmapBits:
        from safeimg.drivers.formats.qcow2.bitmapping import bits_of

        return bits_of(own_image(image), name)

    def refusal(self, image: Image, name: str, granularity: int) -> str | None:
        from safeimg.drivers.formats.qcow2.bitmapping import refusal

        return refusal(own_image(image), name, granularity)

    def store(
        self, image: Image, planner: Planner, wanted: Sequence[WantedBitmap]
    ) -> Iterable[Changes]:
        from safeimg.drivers.formats.qcow2.bitmap_store import store

        return store(own_planner(planner), wanted)


class Qcow2Repairing:
    """Implements `formats.features.Repairing`."""

    def plan(self, image: Image, *, errors: bool) -> Repair:
        from safeimg.drivers.formats.qcow2.repair import plan_repair

        return plan_repair(own_image(image), errors=errors)

    def is_marked(self, image: Image) -> bool:
        return own_image(image).header.is_corrupt

    def is_suspect(self, image: Image) -> bool:
        header = own_image(image).header
        return header.is_corrupt or header.is_dirty or bool(header.autoclear_features & ~KNOWN_AUTOCLEAR)

    def conclude(self, image: Image, *, sound: bool, marked: bool) -> Sequence[Patch]:
        from safeimg.drivers.formats.qcow2.fence import clear_marks, unfence

        own = own_image(image)
        if sound:
            return clear_marks(own.file, own.header.version)
        return () if marked else unfence(own.file, own.header.version)


class Qcow2Driver:
    """Implements `formats.api.Driver`."""

    name = "qcow2"
    rebasing: Rebasing | None = Qcow2Rebasing()
    snapshots: Snapshotting | None = Qcow2Snapshotting()
    bitmaps: Bitmapping | None = Qcow2Bitmapping()
    repairing: Repairing | None = Qcow2Repairing()
    shared = False

    @property
    def measuring(self) -> Measuring | None:
        from safeimg.drivers.formats.qcow2.measure import Qcow2Measuring

        return Qcow2Measuring()

    @property
    def amending(self) -> Amending | None:
        from safeimg.drivers.formats.qcow2.amend import Qcow2Amending

        return Qcow2Amending()

    create_options: Sequence[CreateOption] = CREATE_OPTIONS
    runtime_options: Sequence[RuntimeOption] = RUNTIME_OPTIONS

    def probe(self, head: bytes, path: str) -> int:
        return 100 if head[:4] == MAGIC and int.from_bytes(head[4:8], "big") >= 2 else 0

    def open(
        self, file: File, *, write: bool = False, repair: bool = False, given: Opening = PLAIN
    ) -> Qcow2Image:
        image = open_image(file, write=write, repair=repair)
        apply_runtime(image, given, repair=repair)
        return image

    def reopen(self, image: Image) -> Qcow2Image:
        return open_image(image.file, write=image.file.writable, repair=True).inherit(own_image(image))

    def create(self, fs: FileSystem, path: str, size: int, options: Mapping[str, str], *,
               cache: str = "writeback", unfinished: str | None = None, secrets: Secrets = NO_SECRETS,
               ready: Callable[[], None] = lambda: None) -> None:
        from safeimg.drivers.formats.qcow2.create import create

        create(fs, path, size, options, cache=cache, unfinished=unfinished, secrets=secrets, ready=ready)

    def planner(self, image: Image) -> Planner:
        from safeimg.drivers.formats.qcow2.planner import Qcow2Planner

        return Qcow2Planner(own_image(image))

    def fence(self, image: Image) -> Changes:
        from safeimg.drivers.formats.qcow2.fence import fence

        own = own_image(image)
        return fence(own.file, own.header.version)

    def unfence(self, image: Image) -> Sequence[Patch]:
        from safeimg.drivers.formats.qcow2.create import finish_patch
        from safeimg.drivers.formats.qcow2.fence import unfence

        own = own_image(image)
        if own.header.incompatible_features & UNFINISHED:
            return (finish_patch(own.file),)
        return unfence(own.file, own.header.version)

    def referenced(self, image: Image, ranges: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        from safeimg.drivers.formats.qcow2.usage import referenced

        return referenced(own_image(image), ranges)

    def used_end(self, image: Image) -> int:
        from safeimg.drivers.formats.qcow2.usage import used_end

        return used_end(own_image(image))

    def undercounted(
        self, image: Image, wanted: Image, ranges: Sequence[tuple[int, int]]
    ) -> Sequence[tuple[int, int]]:
        from safeimg.drivers.formats.qcow2.usage import undercounted

        return undercounted(own_image(image), own_image(wanted), ranges)

    def check(self, image: Image) -> CheckResult:
        from safeimg.drivers.formats.qcow2.check import check

        return check(own_image(image))

    def specific_info(self, image: Image) -> Mapping[str, object]:
        from safeimg.drivers.formats.qcow2.info import specific_info

        return specific_info(own_image(image))


def own_image(image: Image) -> Qcow2Image:
    if not isinstance(image, Qcow2Image):
        raise TypeError(f"{image.file.path} was not opened by the qcow2 driver")
    return image


def _own_entry(entry: SnapshotEntry) -> Snapshot:
    if not isinstance(entry, Snapshot):
        raise TypeError("the snapshot was not listed by the qcow2 driver")
    return entry


def own_planner(planner: Planner) -> Qcow2Planner:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner

    if not isinstance(planner, Qcow2Planner):
        raise TypeError("the planner is not of the qcow2 driver")
    return planner


driver = Qcow2Driver()
