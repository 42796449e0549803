"""What of a file an image refers to: asked by recovery before it takes anything back, and before it cuts a file."""

from __future__ import annotations

from collections.abc import Sequence

from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.planner import Qcow2Planner
from safeimg.drivers.formats.qcow2.references import count_everything


def referenced(image: Qcow2Image, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the host ranges (offset, length) that any of the image's metadata refers to. `FormatError`."""
    bits = image.header.cluster_bits
    references = count_everything(Qcow2Planner(image))
    return [
        (offset, length)
        for offset, length in ranges
        if any(references.get(cluster) for cluster in range(offset >> bits, -(-(offset + length) >> bits)))
    ]


def used_end(image: Qcow2Image) -> int:
    """Where the last cluster ends that anything refers to."""
    return count_everything(Qcow2Planner(image)).end() << image.header.cluster_bits


def undercounted(image: Qcow2Image, wanted: Qcow2Image, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the host ranges with fewer references counted in `image` than `wanted`, the same file as it will be,
    makes."""
    bits = image.header.cluster_bits
    references = count_everything(Qcow2Planner(wanted))
    refcounts = Qcow2Planner(image).refcounts
    return [
        (start, size)
        for start, size in ranges
        if any(refcounts.get(c) < references.get(c) for c in range(start >> bits, -(-(start + size) >> bits)))
    ]
