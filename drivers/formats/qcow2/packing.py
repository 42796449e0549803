"""Where compressed clusters go: byte by byte behind each other, within one step.

Spec: docs/interop/qcow2, "Compressed Clusters Descriptor". A host cluster's refcount is the number of
compressed clusters that touch it, so the width of refcounts limits how many may share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from safeimg.drivers.formats.metadata import Phase
from safeimg.drivers.formats.qcow2.refcounts import add_run

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner


class Packer:
    """Places compressed data. `finish` at the end of a step: no host cluster is shared between two."""

    def __init__(self, planner: Qcow2Planner) -> None:
        self._planner = planner
        self._next: tuple[int, int] | None = None  # the next free byte, and the host cluster that it is in

    def finish(self) -> None:
        self._next = None

    def place(self, sizes: Sequence[int]) -> list[int]:
        """Host offsets for compressed clusters of so many bytes, each fewer than a cluster's."""
        refcounts, size, most = self._planner.refcounts, self._planner.cluster_size, self._planner.layout.maximum
        offset, cluster = self._next or (0, -1)
        counts = {} if self._next is None else {cluster: refcounts.get(cluster)}  # that host clusters will have
        following = unused = 0  # allocated clusters that nothing lies in yet: first, count
        left = sum(sizes)
        offsets: list[int] = []
        for stored in sizes:
            room = (cluster + 1) * size - offset if counts.get(cluster, most) < most else 0
            if stored > room and not unused:  # never more than what is left needs: all of them come to be used
                following, unused = self._planner.allocator.allocate(-(-(left - room) // size))
            if stored <= room or (room and following == cluster + 1):
                counts[cluster] += 1
            else:
                offset, room = following * size, 0
            if stored > room:
                cluster, following, unused = following, following + 1, unused - 1
                counts[cluster] = 1
            offsets.append(offset)
            offset, left = offset + stored, left - stored
        self._next = (offset, cluster) if offset < (cluster + 1) * size else None
        runs: list[tuple[int, int]] = []
        for touched in counts:
            add_run(runs, touched, 1)
        for first, count in runs:
            refcounts.set_run(first, [counts[touched] for touched in range(first, first + count)], Phase.ALLOCATE)
        return offsets
