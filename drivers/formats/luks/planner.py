"""Plans writes into a LUKS image: nothing is allocated, so every write is in place, as in raw images."""

from __future__ import annotations

from collections.abc import Sequence

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import Changes, Placement
from safeimg.drivers.formats.luks.image import LuksImage
from safeimg.drivers.formats.options import check_offset
from safeimg.drivers.formats.plain import PlainPlanner

BLOCK = 4096  # whole sectors, which are encrypted as one, and no smaller than those of any disk


class LuksPlanner(PlainPlanner):
    """Implements `api.Planner`."""

    def __init__(self, image: LuksImage) -> None:
        super().__init__(image)
        self._payload = image.header.payload_offset
        self._device = image.file.stat().is_device

    @property
    def cluster_size(self) -> int:
        return BLOCK

    @property
    def granularity(self) -> int:
        return BLOCK

    @property
    def pending(self) -> int:
        return 0

    def place(self, start: int, length: int) -> Sequence[Placement]:
        self._check_range(start, length)
        return [Placement(start, length, self._payload + start, False)] if length else []

    def zero(self, start: int, length: int) -> Sequence[Placement]:
        return self.place(start, length)

    def exposed(self, size: int, backing_size: int) -> Sequence[tuple[int, int]]:
        """What the file grows by is a hole, which is noise once it is decrypted."""
        return [(self._size, size - self._size)] if size > self._size else []

    def prepare_resize(self, size: int) -> Sequence[Changes]:
        check_offset(self._payload + size)
        if self._device and size > self._size:
            raise UsageError(f"{self._path}: cannot grow device files")
        return ()

    def resize(self, size: int) -> Sequence[Changes]:
        """Nothing but the length of the file."""
        self.prepare_resize(size)
        self._size = size
        return (Changes(length=self._payload + size),)

    def shrink(self, size: int) -> Sequence[Changes]:
        """Nothing but the length of the file, which is cut at the very end."""
        if self._device:
            raise UsageError(f"{self._path}: cannot resize device files")
        self._size = size
        return ()

    def take(self) -> Changes:
        return Changes()
