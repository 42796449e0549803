"""What of a file an image refers to: asked by recovery before it takes anything back, and before it cuts a file.

Damaged tables that lead out of the file were there before, and say nothing of what is in it: what was begun on such an
image can be taken back."""

from __future__ import annotations

from collections.abc import Sequence

from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.planner import Qcow2Planner
from safeimg.drivers.formats.qcow2.references import count_everything


def referenced(image: Qcow2Image, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the host ranges (offset, length) that any of the image's metadata refers to. `FormatError`.

    Parts that are not allocated yet of a cluster that has its place already do not count."""
    size = image.header.cluster_size
    planner = Qcow2Planner(image)
    references = count_everything(planner, within=True)
    hits = {
        cluster
        for offset, length in ranges
        for cluster in range(offset // size, -(-(offset + length) // size))
        if references.get(cluster)
    }
    partly = _partly_used(planner, hits) if hits else {}

    def is_read(offset: int, end: int) -> bool:
        for cluster in range(offset // size, -(-end // size)):
            if cluster not in hits:
                continue
            if cluster not in partly or references.get(cluster) > 1:
                return True
            first = max(offset - cluster * size, 0) // planner.granularity
            behind = -(-min(end - cluster * size, size) // planner.granularity)
            if partly[cluster] >> first & (1 << (behind - first)) - 1:
                return True
        return False

    return [(offset, length) for offset, length in ranges if is_read(offset, offset + length)]


def _partly_used(planner: Qcow2Planner, wanted: set[int]) -> dict[int, int]:
    """Of the `wanted` host clusters those that are not allocated as a whole, with the masks of what is."""
    import numpy
    from safeimg.drivers.formats.qcow2.l2_arrays import partly_used

    bits, among = planner.header.cluster_bits, numpy.array(sorted(wanted), numpy.uint64) << planner.header.cluster_bits
    found: dict[int, int] = {}
    if planner.header.has_data_file:  # its data lies elsewhere
        return found
    for l1_index in range(planner.l1_size):
        table, copied = planner.tables.l2_table(l1_index)
        if table and copied:
            words = numpy.frombuffer(planner.view.read(table, planner.cluster_size), ">u8").astype(numpy.uint64)
            hosts, masks = partly_used(planner.header.l2, words)
            chosen = numpy.isin(hosts, among)
            found.update(zip((hosts[chosen] >> bits).tolist(), masks[chosen].tolist(), strict=True))
    return found


def used_end(image: Qcow2Image) -> int:
    """Where the last cluster ends that anything refers to."""
    return count_everything(Qcow2Planner(image), within=True).end() << image.header.cluster_bits


def undercounted(image: Qcow2Image, wanted: Qcow2Image, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the host ranges with fewer references counted in `image` than `wanted`, the same file as it will be,
    makes."""
    bits = image.header.cluster_bits
    references = count_everything(Qcow2Planner(wanted), within=True)
    refcounts = Qcow2Planner(image).refcounts
    return [
        (start, size)
        for start, size in ranges
        if any(refcounts.get(c) < references.get(c) for c in range(start >> bits, -(-(start + size) >> bits)))
    ]
