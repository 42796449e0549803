"""Places in an external data file: every guest cluster has one, at its own offset, that is nobody else's.

Spec: docs/interop/qcow2, "External data file". In a raw data file everything has to be what the guest sees, so all
writes are in place, and zeroes are written like data: only rollback needs to know what was there. In others, what is
not allocated is nobody's; so is what reads as zeroes, unless it does so since this operation has begun.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Patch, Placement
from safeimg.drivers.formats.placements import add_placement
from safeimg.drivers.formats.qcow2.entries import COMPRESSED, COPIED
from safeimg.drivers.formats.qcow2.placing import mask_of

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner


class OutsidePlacer:
    """Like `placing.Placer`."""

    def __init__(self, planner: Qcow2Planner) -> None:
        self._planner = planner
        self._l2 = planner.header.l2
        self._size = planner.header.cluster_size
        self._raw = planner.header.data_file_is_raw
        self._zeroed: dict[int, int] = {}  # guest cluster → subclusters that this operation made zero

    def place(self, start: int, end: int) -> list[Placement]:
        """See `api.Planner.place`."""
        placements: list[Placement] = []
        for cluster, entry, left, right in self._clusters(start, end):
            allocated, zeroes = self._masks(cluster, entry)
            unit, base = self._l2.subcluster_size, cluster * self._size
            first, behind = (left - base) // unit, -(-(right - base) // unit)
            for number in range(first, behind):
                low, high = base + number * unit, min(base + (number + 1) * unit, self._planner.size)
                if self._raw or allocated >> number & 1:
                    low, high = max(left, low), min(right, high)
                fresh = not self._raw and not (allocated | self._zeroed.get(cluster, 0)) >> number & 1
                add_placement(placements, Placement(low, high - low, low, fresh))
            touched = mask_of(first, behind)
            if touched & ~allocated:
                entry = self._l2.with_masks(base | COPIED, allocated | touched, zeroes & ~touched)
                self._planner.tables.put(cluster, [entry])
        return placements

    def zero(self, start: int, end: int) -> list[Placement]:
        """See `api.Planner.zero`."""
        if self._raw:
            return self.place(start, end)
        placements: list[Placement] = []
        for cluster, entry, left, right in self._clusters(start, end):
            allocated, zeroes = self._masks(cluster, entry)
            unit, base = self._l2.subcluster_size, cluster * self._size
            behind = self._l2.subclusters if right == self._planner.size else (right - base) // unit
            whole = mask_of(-(-(left - base) // unit), behind)
            reads_zero = self._planner.tables.reads_zero(cluster, entry)
            if whole & ~self._planner.tables.says_zero(entry):  # not left to the images below: there may be others soon
                self._zeroed[cluster] = self._zeroed.get(cluster, 0) | (whole & allocated)
                has_place = base | COPIED if allocated or entry & COPIED else 0
                entry = self._l2.with_masks(has_place, allocated & ~whole, zeroes | whole)
                self._planner.tables.put(cluster, [entry])
            for low, high in self._left_over(base, left, right, whole | reads_zero):
                placements += self.place(low, high)
        return placements

    def take_tails(self) -> tuple[Patch, ...]:
        """What lies behind the virtual disk is not in this file."""
        return ()

    def take_vacated(self) -> tuple[tuple[int, int], ...]:
        return ()

    def recall(self, offset: int, length: int) -> None:
        """Nothing to know: no space changes hands."""

    def _clusters(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Each guest cluster of a range with its entry and the part of the range in it."""
        for first, entries in self._planner.tables.entries(start, end - start):
            for cluster, entry in enumerate(entries, first):
                if entry & COMPRESSED:
                    raise FormatError(self._planner.path, "compressed cluster in an image with a data file")
                yield cluster, entry, max(start, cluster * self._size), min(end, (cluster + 1) * self._size)

    def _masks(self, cluster: int, entry: int) -> tuple[int, int]:
        """What of a cluster is allocated, and what reads as zeroes; of an entry that is checked."""
        self._planner.tables.standard(cluster, entry)
        return self._l2.masks(entry)

    def _left_over(self, base: int, left: int, right: int, done: int) -> Iterator[tuple[int, int]]:
        """The parts of left…right that are in none of the `done` subclusters."""
        unit = self._l2.subcluster_size
        for number in range((left - base) // unit, -(-(right - base) // unit)):
            if not done >> number & 1:
                yield max(left, base + number * unit), min(right, base + (number + 1) * unit)
