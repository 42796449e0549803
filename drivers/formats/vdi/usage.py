"""Which blocks an image refers to: asked before writing, and by recovery."""

from __future__ import annotations

from collections.abc import Sequence

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.vdi.header import BLOCK, DISCARDED, ENTRY
from safeimg.drivers.formats.vdi.image import VdiImage, read_map


def used_blocks(image: VdiImage) -> bytearray:
    """By number of block: 1 if an entry of the map refers to it, else 0.

    Raises `FormatError` if two do, or one refers to a block that the image cannot have: writing to such blocks would
    change more than was asked for."""
    header = image.header
    used = bytearray(header.blocks)
    for first, entries in read_map(image.file, header, 0, header.blocks):
        for index, entry in enumerate(entries):
            if entry >= DISCARDED:
                continue
            if entry >= header.blocks or used[entry]:
                what = "is used twice" if entry < header.blocks else f"is one of {header.blocks}"
                offset = header.map_offset + ENTRY * (first + index)
                raise FormatError(image.file.path, f"the block map is damaged: block {entry} {what}", offset=offset)
            used[entry] = 1
    return used


def referenced(image: VdiImage, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the host ranges (offset, length) that header, map or used blocks lie in. `FormatError`."""
    used, data = used_blocks(image), image.header.data_offset
    return [
        (offset, length)
        for offset, length in ranges
        if offset < data or any(used[(offset - data) // BLOCK : -(-(offset + length - data) // BLOCK)])
    ]


def used_end(image: VdiImage) -> int:
    """Where the last used block ends, or the map if there is none. `FormatError`."""
    return image.header.data_offset + (used_blocks(image).rfind(1) + 1) * BLOCK
