"""Plans writes into a LUKS image: nothing is allocated, so every write is in place, as in raw images."""

from __future__ import annotations

from collections.abc import Sequence

from safeimg.drivers.formats.api import Changes
from safeimg.drivers.formats.luks.image import LuksImage
from safeimg.drivers.formats.options import check_offset
from safeimg.drivers.formats.plain import FlatPlanner

BLOCK = 4096  # whole sectors, which are encrypted as one, and no smaller than those of any disk


class LuksPlanner(FlatPlanner):
    """Implements `api.Planner`."""

    def __init__(self, image: LuksImage) -> None:
        super().__init__(image, image.header.payload_offset)

    @property
    def cluster_size(self) -> int:
        return BLOCK

    @property
    def granularity(self) -> int:
        return BLOCK

    def noise(self, size: int) -> Sequence[tuple[int, int]]:
        """What the file grows by is a hole, which is noise once it is decrypted."""
        return [(self._size, size - self._size)] if size > self._size else []

    def prepare_resize(self, size: int) -> Sequence[Changes]:
        check_offset(self._offset + size)
        return super().prepare_resize(size)
