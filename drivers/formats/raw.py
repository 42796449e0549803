"""Raw images: the guest disk is the file. Nothing is allocated, so every write is in place.

The virtual size is the file's length in whole sectors of 512 bytes, as in QEMU: a started last sector counts,
and what it lacks reads as zeroes. """

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from errno import EINVAL

from safeimg.drivers.errors import StorageError, UsageError
from safeimg.drivers.formats.api import (
    PLAIN,
    Changes,
    CreateOption,
    Driver,
    Extent,
    Image,
    Kind,
    Opening,
    RuntimeOption,
)
from safeimg.drivers.formats.features import Measured, Measuring
from safeimg.drivers.formats.new_file import fill_anew, new_file
from safeimg.drivers.formats.options import refuse_metadata, storage_preallocation
from safeimg.drivers.formats.plain import FlatPlanner, PlainDriver, PlainImage
from safeimg.drivers.formats.protocols import check_window
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import File, FileSystem

SECTOR = 512
BLOCK = 4096  # no disk has larger sectors


def _sectors(length: int) -> int:
    return -(-length // SECTOR) * SECTOR


class RawImage(PlainImage):
    """Implements `api.Image`. The guest disk may be a part of the file: from `offset` on, with a `fixed` size in
    bytes."""

    format = "raw"

    def __init__(self, file: File, offset: int = 0, fixed: int | None = None) -> None:
        super().__init__(file)
        self.offset = offset
        self.fixed = fixed

    @property
    def size(self) -> int:
        if self.fixed is not None:
            return self.fixed
        return _sectors(max(_sectors(self._file.length()) - self.offset, 0))

    @property
    def cluster_size(self) -> int:
        return 1

    @property
    def data_may_be_holes(self) -> bool:
        """Holes are told by `extents`."""
        return False

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """Holes are zeroes with an offset, as in `qemu-img map`: they are there to be written into."""
        end = min(start + length, self.size)
        position = start
        for span in self._file.spans(self.offset + start, end - start) if end > start else ():
            kind = Kind.DATA if span.is_data else Kind.ZERO
            yield Extent(span.start - self.offset, span.length, kind, span.start, allocated=span.allocated)
            position = span.start - self.offset + span.length
        if position < end:
            yield Extent(position, end - position, Kind.ZERO, self.offset + position)


class RawPlanner(FlatPlanner):
    """Implements `api.Planner`. What the file grows by reads as zeroes."""

    def __init__(self, image: RawImage) -> None:
        super().__init__(image, image.offset)
        self._fixed = image.fixed is not None
        self._remote = self._found.is_device and not self._found.is_here

    @property
    def cluster_size(self) -> int:
        return 1

    @property
    def granularity(self) -> int:
        return 1

    def prepare_resize(self, size: int) -> Sequence[Changes]:
        if self._fixed and size != self._size:
            raise UsageError("Cannot resize fixed-size raw disks")
        if self._remote and size != self._capacity:
            raise UsageError("Cannot resize NBD nodes")
        return super().prepare_resize(size)

    def shrink(self, size: int) -> Sequence[Changes]:
        if self._remote:
            raise UsageError("Cannot resize NBD nodes")
        if self._fixed:
            raise UsageError("Cannot resize fixed-size raw disks")
        return super().shrink(size)


class RawMeasuring:
    """Implements `features.Measuring`."""

    def measure(
        self,
        size: int,
        options: Mapping[str, str],
        data: Iterable[tuple[int, int]] | None,
        source: Image | None,
        secrets: Secrets,
    ) -> Measured:
        return Measured(_sectors(size), _sectors(size))


class RawDriver(PlainDriver):
    """Implements `api.Driver`."""

    name = "raw"
    shared = True
    measuring: Measuring | None = RawMeasuring()
    create_options: Sequence[CreateOption] = (
        CreateOption("size", "size", "Virtual disk size"),
        CreateOption("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
        CreateOption("preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)"),
    )
    runtime_options: Sequence[RuntimeOption] = (
        RuntimeOption("offset", "size", strong=True),
        RuntimeOption("size", "size", strong=True),
    )

    def probe(self, head: bytes, path: str) -> int:
        """What nobody else recognises is raw."""
        return 1

    def open(self, file: File, *, write: bool = False, repair: bool = False, given: Opening = PLAIN) -> Image:
        offset, size = given.options.get("offset", 0), given.options.get("size")
        assert isinstance(offset, int) and isinstance(size, int | None)
        return RawImage(file, offset, check_window(_sectors(file.length()), offset, size))

    def reopen(self, image: Image) -> Image:
        own = _own(image)
        return RawImage(own.file, own.offset, own.fixed)

    def planner(self, image: Image) -> RawPlanner:
        return RawPlanner(_own(image))

    def referenced(self, image: Image, ranges: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        return ()

    def used_end(self, image: Image) -> int | None:
        return None

    def specific_info(self, image: Image) -> Mapping[str, object] | None:
        return None

    def create(self, fs: FileSystem, path: str, size: int, options: Mapping[str, str], *,
               cache: str = "writeback", unfinished: str | None = None, secrets: Secrets = NO_SECRETS,
               ready: Callable[[], None] = lambda: None) -> None:
        """A hole of `size` bytes; with preallocation `falloc` its space is reserved, with `full` written. The first
        block is there in any case, as with QEMU: what alignment O_DIRECT needs shows only where there is data."""
        preallocation = storage_preallocation(path, options)
        length = _sectors(size)
        with new_file(fs, path, cache=cache) as file:
            if length >> 63:
                raise StorageError(path, "truncate", OSError(EINVAL, os.strerror(EINVAL)))
            refuse_metadata(path, preallocation)
            ready()
            fill_anew(file, length, preallocation)
            if preallocation == "off":
                file.pwrite(0, bytes(min(length, BLOCK)))


def _own(image: Image) -> RawImage:
    if not isinstance(image, RawImage):
        raise TypeError("the image is not of the raw driver")
    return image


driver: Driver = RawDriver()
