"""Where compressed clusters go: byte by byte behind each other, within one step.

Spec: docs/interop/qcow2, "Compressed Clusters Descriptor". A host cluster's refcount is the number of
compressed clusters that touch it, so the width of refcounts limits how many may share one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safeimg.drivers.formats.metadata import Phase

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner


class Packer:
    """Places compressed data. `finish` at the end of a step: no host cluster is shared between two."""

    def __init__(self, planner: Qcow2Planner) -> None:
        self._planner = planner
        self._next: tuple[int, int] | None = None  # the next free byte, and the host cluster that it is in

    def finish(self) -> None:
        self._next = None

    def place(self, stored: int) -> int:
        """Host offset for `stored` bytes, fewer than a cluster's."""
        refcounts, size = self._planner.refcounts, self._planner.cluster_size
        if self._next is not None and refcounts.get(self._next[1]) < self._planner.layout.maximum:
            offset, cluster = self._next
            if (offset + stored - 1) // size == cluster:
                refcounts.raise_one(cluster, Phase.ALLOCATE)
                return self._use(offset, stored, cluster)
            following, _ = self._planner.allocator.allocate(1)
            if following == cluster + 1:
                refcounts.raise_one(cluster, Phase.ALLOCATE)
            else:
                offset = following * size
            return self._use(offset, stored, following)
        cluster, _ = self._planner.allocator.allocate(1)
        return self._use(cluster * size, stored, cluster)

    def _use(self, offset: int, stored: int, cluster: int) -> int:
        end = offset + stored
        self._next = (end, cluster) if end < (cluster + 1) * self._planner.cluster_size else None
        return offset
