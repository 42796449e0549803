"""What formats have in common that know no refcounts, snapshots, bitmaps, compression and backing images.

Such a format says where guest data is (`extents`) and where it goes (`place`, `zero`, `take`, `resize`); of much else
that `api` asks for, it has nothing, and answers so.
"""

from __future__ import annotations

from collections.abc import Sequence

from safeimg.drivers.errors import UnsupportedError, UsageError
from safeimg.drivers.formats.api import (
    Changes,
    CheckResult,
    Cipher,
    Extent,
    Image,
    Patch,
    Placement,
    RuntimeOption,
)
from safeimg.drivers.formats.features import (
    Amending,
    Bitmapping,
    Measuring,
    Rebasing,
    Repairing,
    Snapshotting,
)
from safeimg.drivers.storage.api import Buffer, File


class PlainImage:
    """The part of `api.Image` that plain formats have in common."""

    format: str

    def __init__(self, file: File) -> None:
        self._file = file

    @property
    def file(self) -> File:
        return self._file

    @property
    def data(self) -> File:
        return self._file

    @property
    def cipher(self) -> Cipher | None:
        return None

    @property
    def backing_file(self) -> str | None:
        return None

    @property
    def backing_format(self) -> str | None:
        return None

    def decompress(self, extent: Extent, stored: Buffer) -> bytes:
        raise UnsupportedError(f"{self._file.path}: {self.format} images hold nothing compressed")

    def close(self) -> None:
        self._file.close()


class PlainPlanner:
    """The part of `api.Planner` that a plain format answers with nothing."""

    def __init__(self, image: Image) -> None:
        self._path = image.file.path
        self._format = image.format
        self._size = image.size

    def reserve(self, clusters: int) -> Changes:
        return Changes()

    def place_compressed(self, start: int, sizes: Sequence[int]) -> Sequence[int]:
        raise UnsupportedError(f"{self._path}: {self._format} images cannot hold compressed data")

    def marking_clusters(self, ranges: Sequence[tuple[int, int]]) -> int:
        return 0

    def mark_dirty(self, ranges: Sequence[tuple[int, int]]) -> Changes:
        return Changes()

    def exposed(self, size: int, backing_size: int) -> Sequence[tuple[int, int]]:
        return ()

    def noise(self, size: int) -> Sequence[tuple[int, int]]:
        return ()

    def forget(self, start: int, most: int) -> int | None:
        return None

    def recall(self, unlinked: Sequence[tuple[int, int]]) -> None:
        pass

    def release(self) -> Changes:
        return Changes()

    def freed(self) -> Sequence[tuple[int, int]]:
        return ()

    def empty(self) -> Changes:
        raise UnsupportedError(f"{self._path}: a {self._format} image cannot be emptied")

    def compact(self) -> tuple[Changes, int]:
        raise UnsupportedError(f"{self._path}: a {self._format} image cannot be emptied")

    def _check_range(self, start: int, length: int) -> None:
        if start < 0 or length < 0 or start + length > self._size:
            raise ValueError(f"{self._path}: guest range {start:#x}+{length:#x} is not in {self._size:#x}")


class FlatPlanner(PlainPlanner):
    """The part of `api.Planner` of formats whose guest disk is one stretch of the file, from `offset` on: nothing is
    allocated, so every write is in place, and the disk is resized with the file."""

    def __init__(self, image: Image, offset: int) -> None:
        super().__init__(image)
        self._offset = offset
        self._capacity = image.size
        self._found = image.file.stat()

    @property
    def pending(self) -> int:
        return 0

    def place(self, start: int, length: int) -> Sequence[Placement]:
        self._check_range(start, length)
        return [Placement(start, length, self._offset + start, False)] if length else []

    def zero(self, start: int, length: int) -> Sequence[Placement]:
        return self.place(start, length)

    def prepare_resize(self, size: int) -> Sequence[Changes]:
        if self._found.is_device and size > self._capacity:
            raise UsageError(f"{self._path}: cannot grow device files")
        return ()

    def resize(self, size: int) -> Sequence[Changes]:
        """Nothing but the length of the file."""
        self.prepare_resize(size)
        self._size = size
        return (Changes(length=self._offset + size),)

    def shrink(self, size: int) -> Sequence[Changes]:
        """Nothing but the length of the file, which is cut at the very end."""
        if self._found.is_device:
            raise UsageError(f"{self._path}: cannot resize device files")
        self._size = size
        return ()

    def take(self) -> Changes:
        return Changes()


class PlainDriver:
    """The part of `api.Driver` that a plain format answers with nothing."""

    rebasing: Rebasing | None = None
    bitmaps: Bitmapping | None = None
    runtime_options: Sequence[RuntimeOption] = ()
    snapshots: Snapshotting | None = None
    repairing: Repairing | None = None
    shared = False

    @property
    def amending(self) -> Amending | None:
        return None

    @property
    def measuring(self) -> Measuring | None:
        return None

    def fence(self, image: Image) -> Changes:
        return Changes()

    def unfence(self, image: Image) -> Sequence[Patch]:
        return ()

    def check(self, image: Image) -> CheckResult | None:
        return None

    def undercounted(
        self, image: Image, wanted: Image, ranges: Sequence[tuple[int, int]]
    ) -> Sequence[tuple[int, int]]:
        return ()
