"""What some formats can do and others cannot. A driver without the feature has None in its place.

Each plans with the image's `Planner` and answers changes to be made durable one after the other, every one a step of
its own. The last one is the switch that makes the difference; planning anew after any of those before it leads to the
same end, so that an interrupted command can start over. What loses its last reference is only unlinked: the caller's
`Planner.release` frees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from safeimg.drivers.formats.api import Changes, CheckResult, CreateOption, Image, Patch, Planner
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.secrets import Secrets


class Rebasing(Protocol):
    """Formats with backing images."""

    def set_backing(
        self, image: Image, planner: Planner, filename: str | None, fmt: str | None
    ) -> Iterable[Changes]:
        """Makes `filename` the backing image that the header names, or none. Guest data is not looked at.

        Raises `UnsupportedError` if the header has no room for the name."""
        ...

    def marks_zeroes(self, image: Image) -> bool:
        """Whether what has no space can be zero, whatever a backing image shows there."""
        ...

    def accepts(self, image: Image, filename: str) -> bool:
        """Whether the image can have a backing image, of that name, as far as that can be told beforehand."""
        ...


class Amendment(Protocol):
    """One thing that `amend` does. Plans nothing where the image is like that already."""

    def __call__(self, image: Image, planner: Planner) -> Iterable[Changes]: ...


class Amending(Protocol):
    """Formats whose options can be changed on images that exist."""

    options: Sequence[CreateOption]  # what `-o` takes, as `amend -o help` lists them

    def check(self, image: Image, values: Mapping[str, str], *, force: bool) -> None:
        """Refuses what cannot be made of the image: `UsageError` in QEMU's words. Writes nothing."""
        ...

    def erased(self, image: Image, values: Mapping[str, str]) -> Sequence[tuple[int, int]]:
        """Host ranges (offset, length) that the amendments replace and that hold keys: they are overwritten before
        they are free."""
        ...

    def amendments(self, values: Mapping[str, str]) -> Sequence[Amendment]:
        """What the options ask for, in the order of doing; the size is not theirs. Does not depend on the image: an
        interrupted command asks again."""
        ...


class Measured(NamedTuple):
    """What `measure` answers, in bytes."""

    required: int
    fully_allocated: int
    bitmaps: int | None = None  # what copying the source's persistent bitmaps takes on top; None: it cannot have any


class Measuring(Protocol):
    """Formats that can tell how large an image's file will be."""

    def measure(
        self,
        size: int,
        options: Mapping[str, str],
        data: Iterable[tuple[int, int]] | None,
        source: Image | None,
        secrets: Secrets,
    ) -> Measured:
        """For a virtual disk of `size` bytes, created with these options. `data`: the guest ranges (start, length)
        that are copied into it, in order; None: nothing is. `source`: the image that they come from. Raises
        `UsageError` in QEMU's words for options that make no sense."""
        ...


class SnapshotEntry(Protocol):
    """An internal snapshot, as an image lists it."""

    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def date_sec(self) -> int:
        """When it was taken: seconds since the epoch."""
        ...

    @property
    def date_nsec(self) -> int: ...
    @property
    def vm_clock_nsec(self) -> int: ...
    @property
    def vm_state_size(self) -> int: ...
    @property
    def disk_size(self) -> int: ...
    @property
    def icount(self) -> int | None:
        """Instructions that the machine had executed; None: not recorded."""
        ...


class Snapshotting(Protocol):
    """Formats with internal snapshots. Ids are unique within an image, names need not be.

    What an image does not allow is a `RefusedError` with QEMU's error number."""

    def entries(self, image: Image) -> Sequence[SnapshotEntry]:
        """In the image's own order. `FormatError`."""
        ...

    def at(self, image: Image, entry: SnapshotEntry) -> Image:
        """The guest content of a snapshot, as an image of the present virtual size on the same open files: closing
        either closes both. For reading. `SnapshotDamaged` if the entry cannot be right, `FormatError`."""
        ...

    def refuse(self, image: Image, *, applying: bool) -> None:
        """Raises `RefusedError` if no snapshot of the image can be applied, or none be taken."""
        ...

    def create(self, image: Image, planner: Planner, name: str, seconds: int, nanoseconds: int) -> Iterable[Changes]:
        """Takes a snapshot, with the next id and the given date."""
        ...

    def apply(self, image: Image, planner: Planner, entry: SnapshotEntry) -> Iterable[Changes]:
        """Makes the guest content, and the virtual size, that of the snapshot, which stays."""
        ...

    def delete(self, image: Image, planner: Planner, entry: SnapshotEntry) -> Iterable[Changes]: ...


def inconsistent(name: str) -> str:
    """QEMU's message where a bitmap is asked for whose bits mean nothing."""
    return (
        f"Bitmap '{name}' is inconsistent and cannot be used\n"
        "Try block-dirty-bitmap-remove to delete this bitmap from disk"
    )


class BitmapState(NamedTuple):
    """A persistent bitmap, without its bits."""

    name: str
    granularity: int  # guest bytes that one bit stands for
    enabled: bool  # writes are recorded in it
    inconsistent: bool  # it was not saved properly: its bits mean nothing


class BitmapBits(Protocol):
    """The bits of a persistent bitmap: bit n is bit n % 8 (the lowest is 0) of byte n // 8."""

    @property
    def granularity(self) -> int:
        """Guest bytes that one bit stands for."""
        ...

    @property
    def size(self) -> int:
        """Guest bytes that the bitmap covers."""
        ...

    def read(self, start: int, length: int) -> bytes:
        """`length` of its bytes from byte `start` on; zeroes behind its end. `FormatError` where it is damaged."""
        ...


class WantedBitmap(NamedTuple):
    """A persistent bitmap as it is to be."""

    state: BitmapState
    kept: bool  # it begins with the bits that the image has under this name; else all are clear
    merged: Sequence[BitmapBits] = ()  # bits to be set besides, of whatever granularity


class Bitmapping(Protocol):
    """Formats with persistent bitmaps."""

    def supported(self, image: Image) -> bool:
        """Whether the image can have any: not in each version of a format."""
        ...

    def listed(self, image: Image) -> Sequence[BitmapState]:
        """The image's bitmaps, in the image's order. `FormatError` if their directory is damaged."""
        ...

    def bits(self, image: Image, name: str) -> BitmapBits:
        """Of a bitmap that is `listed`. `FormatError` if its table is damaged."""
        ...

    def refusal(self, image: Image, name: str, granularity: int) -> str | None:
        """Why such a bitmap cannot be stored in this image, in QEMU's words; None if it can."""
        ...

    def store(self, image: Image, planner: Planner, wanted: Sequence[WantedBitmap]) -> Iterable[Changes]:
        """Makes the image's bitmaps those that are wanted, in this order. Nothing, where they are already."""


class Repair(NamedTuple):
    """What `check -r` finds and does: `report`, and the changes, each a step of its own."""

    report: CheckResult
    changes: tuple[Changes, ...]


class Repairing(Protocol):
    """Formats whose metadata can be put right. The images may be broken in any way, and are opened for that."""

    def plan(self, image: Image, *, errors: bool) -> Repair:
        """Repairs leaks, and with `errors` all that can be. Planned anew after any of the changes, the rest of them
        comes out. Raises `CheckFailed`."""
        ...

    def is_marked(self, image: Image) -> bool:
        """Whether the image is marked as corrupt (as a fence would mark it)."""
        ...

    def is_suspect(self, image: Image) -> bool:
        """Whether it bears any mark that a repair takes away."""
        ...

    def conclude(self, image: Image, *, sound: bool, marked: bool) -> Sequence[Patch]:
        """The marks after a repair: none if nothing is wrong any more; else the image is as corrupt as it was."""
        ...
