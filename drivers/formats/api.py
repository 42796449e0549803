"""What a format driver answers: *where* guest data lives, and *what to patch* to put it elsewhere.

A driver never copies guest data in bulk: the transfer core does, from the extents and placements given here.
Drivers are plain synchronous code over `storage.api.File`. Offsets and lengths are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from safeimg.drivers.records import NamedTuple
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import Buffer, File, FileSystem

if TYPE_CHECKING:
    from safeimg.drivers.formats.features import (
        Amending,
        Bitmapping,
        Measuring,
        Rebasing,
        Repairing,
        Snapshotting,
    )


class Kind(Enum):
    """How a guest range is stored in one image."""

    DATA = "data"  # at `offset` of the image's `data` file, encrypted if the image has a `cipher`
    ZERO = "zero"  # reads as zeroes; `offset` is the preallocated host range, if there is one
    COMPRESSED = "compressed"  # `offset`: where the compressed data starts; one extent is one cluster
    UNALLOCATED = "unallocated"  # not in this image: the backing image's, or zeroes; `offset` as with ZERO


class Extent(NamedTuple):
    """A guest range stored one way. Adjacent extents that continue each other are merged (not compressed ones)."""

    start: int  # guest
    length: int
    kind: Kind
    offset: int | None = None  # host: in the image's `data` file; COMPRESSED: in the image's own file
    stored: int = 0  # COMPRESSED: upper bound of the compressed bytes at `offset`
    allocated: bool | None = None  # of raw images: see `storage.api.Span`


class Patch(NamedTuple):
    """Bytes of an image's file to change. `before` is None for space that nobody references yet."""

    offset: int
    before: bytes | None
    after: bytes


class Changes(NamedTuple):
    """A step's metadata changes to one image: `allocate` is made durable before any of `link` is written."""

    allocate: tuple[Patch, ...] = ()
    link: tuple[Patch, ...] = ()
    length: int | None = None  # the file is made at least this long together with `allocate`
    # Host ranges (offset, length): clusters that lose one reference, and parts of clusters that nothing refers to any
    # more; see `release`.
    unlinked: tuple[tuple[int, int], ...] = ()
    # New structures (offset, content) in space that nobody references, too large for a log: like guest data they are
    # written before the step, which knows them by their digests.
    fresh: tuple[tuple[int, bytes], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.allocate or self.link or self.fresh or self.length is not None)


class Placement(NamedTuple):
    """Where a guest range is to be written."""

    start: int  # guest
    length: int
    offset: int  # host: in the image's `data` file
    fresh: bool  # True: nobody references this space until `link` is applied. False: it is live, written in place


class Cipher(Protocol):
    """Encrypts the guest data of an open image: whole sectors of 512 bytes, in place, in several threads at once.

    What a sector becomes depends on where it lies: `host` is the offset in the image's `data` file, `guest` that
    of the virtual disk at which `buffer` starts, both multiples of 512 as is its length."""

    @property
    def missing(self) -> str | None:
        """The option that names the secret, if nobody gave it: both methods raise `SecretMissing` then."""
        ...

    def encrypt(self, buffer: memoryview, host: int, guest: int) -> None: ...
    def decrypt(self, buffer: memoryview, host: int, guest: int) -> None: ...


class Image(Protocol):
    """An open image of some format: one layer, without its backing images."""

    @property
    def file(self) -> File: ...
    @property
    def data(self) -> File:
        """Where DATA extents and placements lie: the image's own `file`, unless it has an external data file."""
        ...

    @property
    def cipher(self) -> Cipher | None:
        """What the guest data in `data` is encrypted with; None if it is not."""
        ...

    @property
    def format(self) -> str: ...
    @property
    def size(self) -> int:
        """Virtual size."""
        ...

    @property
    def cluster_size(self) -> int:
        """Granularity of allocation; 1 where there is none (raw)."""
        ...

    @property
    def data_may_be_holes(self) -> bool:
        """Whether space that DATA extents lead to may well be holes of the file, because it was taken before there was
        data: `map` looks for them then, as qemu-img does."""
        ...

    @property
    def backing_file(self) -> str | None:
        """As written in the image (raw has none)."""
        ...

    @property
    def backing_format(self) -> str | None: ...
    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """The range, clipped to `size`, in guest order without gaps or overlaps. Reads metadata as it goes.

        Raises `FormatError` for entries that the format does not allow."""
        ...

    def decompress(self, extent: Extent, stored: Buffer) -> bytes:
        """One cluster's guest data (`extent.length` bytes) from the bytes at `extent.offset`; `FormatError` if bad.

        Thread-safe and bounded: never inflates past a cluster."""
        ...

    def close(self) -> None: ...


class Planner(Protocol):
    """Plans writes into one image: hands out places and collects the metadata patches of the step under way.

    Reads go through its own buffered view of the metadata, so later plans build on earlier ones whether or not
    they are on disk yet. It never writes to the file. Not thread-safe: the caller holds a lock.

    Rules it guarantees: space freed while planning is not handed out again (`release` frees it at the end);
    clusters shared with an internal snapshot are never written in place; a compressed cluster's host space is
    never shared between two steps; after every `take` a reader of any crash state sees a valid image.
    """

    @property
    def cluster_size(self) -> int:
        """What `reserve` counts in, and what is compressed as a whole."""
        ...

    @property
    def granularity(self) -> int:
        """Fresh placements begin and end at multiples of it, or at the end of the virtual disk: a cluster, or a part
        of one where the format allocates smaller parts."""
        ...

    @property
    def pending(self) -> int:
        """Bytes of metadata that the step under way changes, roughly: a step should not collect too many."""
        ...

    def reserve(self, clusters: int) -> Changes:
        """Makes metadata (refcount blocks, table) ready for `clusters` more fresh clusters, and L2 tables for them.

        Changes that are not empty must be made durable as a step of their own before any further plan."""
        ...

    def place(self, start: int, length: int) -> Sequence[Placement]:
        """Places for data, in guest order without gaps. In-place parts cover just the range asked for; fresh parts
        are widened, at most to whole clusters, and the caller writes all of them."""
        ...

    def place_compressed(self, start: int, sizes: Sequence[int]) -> Sequence[int]:
        """Offsets in the image's own file for consecutive clusters from `start` on, compressed to `sizes` bytes: fresh
        places, each as long as what is stored there."""
        ...

    def zero(self, start: int, length: int) -> Sequence[Placement]:
        """Makes whole clusters, or parts of them where the format has those, read as zeroes by metadata alone; what
        cannot be done so comes back as placements that the caller fills (with the new content: zeroes inside the
        range, old data outside)."""
        ...

    def marking_clusters(self, ranges: Sequence[tuple[int, int]]) -> int:
        """How many fresh clusters `mark_dirty` needs."""
        ...

    def mark_dirty(self, ranges: Sequence[tuple[int, int]]) -> Changes:
        """Sets the bits of guest ranges (start, length) in every enabled persistent bitmap. A step of its own,
        before any data of the ranges, and after growing if they reach past the present size."""
        ...

    def prepare_resize(self, size: int) -> Sequence[Changes]:
        """Makes the tables large enough to plan for `size` bytes; the virtual disk keeps its size. Each of the
        changes is a step of its own. Refuses what cannot grow."""
        ...

    def exposed(self, size: int, backing_size: int) -> Sequence[tuple[int, int]]:
        """Guest ranges (start, length) behind the present end that would not read as zeroes after growing to
        `size` over a backing image of `backing_size` bytes: to be zeroed before `resize`."""
        ...

    def noise(self, size: int) -> Sequence[tuple[int, int]]:
        """Guest ranges (start, length) that growing to `size` makes read as anything, since nothing can be written
        there before: QEMU leaves them as they are."""
        ...

    def resize(self, size: int) -> Sequence[Changes]:
        """Grows the virtual disk, after `prepare_resize`: the last of the changes does it. Each is a step of its
        own (nothing else planned since `take`)."""
        ...

    def shrink(self, size: int) -> Sequence[Changes]:
        """The virtual disk becomes smaller, by the last of the changes, each a step of its own. Refuses what cannot
        shrink."""
        ...

    def forget(self, start: int, most: int) -> int | None:
        """After `shrink`: unmaps what lies behind the end of the virtual disk, at guest offset `start` and behind, in
        up to `most` tables. Where it stopped; None if there is nothing left. (`reserve(most)` first.)"""
        ...

    def take(self) -> Changes:
        """The changes collected since the last `take`."""
        ...

    def recall(self, unlinked: Sequence[tuple[int, int]]) -> None:
        """Tells a new planner what the operation's earlier steps unlinked (their `Changes.unlinked`, joined)."""
        ...

    def release(self) -> Changes:
        """The final phase: refcounts of everything that earlier steps unlinked go down. A step of its own.

        A refcount that is zero already stays so: somebody may have run `check -r leaks` in between."""
        ...

    def freed(self) -> Sequence[tuple[int, int]]:
        """Host ranges (offset, length) that nobody references once `release` is durable: may be discarded."""
        ...

    def empty(self) -> Changes:
        """Makes every guest range unallocated by one switch: new structures in unreferenced space, then one sector
        of `link`. Snapshots, bitmaps and everything else stay. A step of its own."""
        ...

    def compact(self) -> tuple[Changes, int]:
        """After `empty`, when nothing of the old structures is needed any more: moves the metadata to the front of
        the file by a second switch. Also the length that the file may be truncated to once that is durable."""
        ...


class CreateOption(NamedTuple):
    """One `-o` option of a format, as `-o help` lists it (by name)."""

    name: str
    kind: str  # "size", "str", "bool", "num"
    help: str
    default: str | None = None


class RuntimeOption(NamedTuple):
    """What a format can be told when an image is opened: one member of `json:{…}` and `--image-opts`."""

    name: str
    kind: str = "bool"  # "bool", "size", "num", "str"; "file": a file beside the image, described by members
    strong: bool = False  # changes what the guest sees: belongs to the image's name


class Opening(NamedTuple):
    """With what an image is opened."""

    options: Mapping[str, str | int | bool] = MappingProxyType({})  # those of `runtime_options` that are given
    secrets: Secrets = NO_SECRETS
    # Options of kind "file" that are given, and what opens the file that such options describe, for the same use as
    # the image. None: nobody will look at guest data, so neither files nor secrets are needed.
    files: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
    open_file: Callable[[Mapping[str, Any]], File] | None = None


PLAIN = Opening()


class Driver(Protocol):
    """A format: one module (or package) that offers these. `registry.py` lists the drivers."""

    name: str
    create_options: Sequence[CreateOption]  # in the order in which "Formatting …" names them
    runtime_options: Sequence[RuntimeOption]
    rebasing: Rebasing | None  # what only some formats can do: see `features.py`
    snapshots: Snapshotting | None
    bitmaps: Bitmapping | None

    repairing: Repairing | None
    shared: bool  # others may write to the file while it is read: it holds guest data, and no tables

    @property
    def amending(self) -> Amending | None: ...
    @property
    def measuring(self) -> Measuring | None: ...

    def probe(self, head: bytes, path: str) -> int:
        """How sure (0 to 100) the driver is that a file with this beginning (up to 2048 bytes) is its format."""
        ...

    def open(self, file: File, *, write: bool = False, repair: bool = False, given: Opening = PLAIN) -> Image:
        """Parses and validates the header. With `write`, refuses what must not be written (QEMU's messages).
        Everything read from the file is checked before use; `FormatError`, `UnsupportedError`."""
        ...

    def reopen(self, image: Image) -> Image:
        """The same open files with the metadata read afresh, fences notwithstanding; `image` is not to be used any
        more, nor closed."""
        ...

    def create(self, fs: FileSystem, path: str, size: int, options: Mapping[str, str], *, cache: str = "writeback",
               unfinished: str | None = None, secrets: Secrets = NO_SECRETS,
               ready: Callable[[], None] = lambda: None) -> None:
        """Writes an empty image. `unfinished` names the command for which it is fenced until `finish`. `secrets`:
        those that options name. `ready` is called once all that is asked for is found possible, and may refuse it:
        a file that was there is unchanged until then (some formats remove it, as QEMU does: not under `unfinished`),
        one that was not is gone again."""
        ...

    def planner(self, image: Image) -> Planner: ...
    def fence(self, image: Image) -> Changes:
        """Keeps writers away from a live image while it is half-changed (one sector of `link`); empty if there is
        no such thing in this format or version."""
        ...

    def unfence(self, image: Image) -> Sequence[Patch]:
        """Takes the fence of a live or of an unfinished image down: the patches, made from what is on disk now."""
        ...

    def referenced(self, image: Image, ranges: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """Those of the host ranges (offset, length) that the image's metadata refers to; none where it has none."""
        ...

    def used_end(self, image: Image) -> int | None:
        """Where the last byte ends that the image's metadata refers to; None where there is no telling (raw)."""
        ...

    def undercounted(
        self, image: Image, wanted: Image, ranges: Sequence[tuple[int, int]]
    ) -> Sequence[tuple[int, int]]:
        """Those of the host ranges whose refcounts in `image` are below the references that `wanted` makes (the same
        file as it will be); none where there are no refcounts."""
        ...

    def check(self, image: Image) -> CheckResult | None:
        """What is wrong with the image's metadata; None if the format has no checks."""
        ...

    def specific_info(self, image: Image) -> Mapping[str, object] | None:
        """What `info` prints under "Format specific information" (the JSON's `data`)."""
        ...


class CheckResult(NamedTuple):
    """What `check` found, with qemu-img's counters."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    messages: tuple[str, ...] = ()  # one line each, in qemu-img's words ("ERROR …", "Leaked …")
