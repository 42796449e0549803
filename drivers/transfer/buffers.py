"""Page-aligned buffers that a worker keeps for a whole transfer: fresh `bytes` a chunk would cost more than
reading."""

from __future__ import annotations

import mmap
from typing import Protocol


class BufferPool(Protocol):
    """What a work function borrows its memory from; nothing of it may be kept beyond the call."""

    def get(self, length: int, slot: int = 0) -> memoryview:
        """`length` writable bytes starting on a page boundary, with whatever an earlier call left in them.

        Each slot is memory of its own; asking for a slot again hands out the same bytes."""
        ...


class Buffers:
    """One worker's buffers: anonymous maps, which grow when more is asked for and are reused otherwise."""

    __slots__ = ("_maps",)

    def __init__(self) -> None:
        self._maps: dict[int, memoryview] = {}

    def get(self, length: int, slot: int = 0) -> memoryview:
        held = self._maps.get(slot)
        if held is None or len(held) < length:
            # Reading into a buffer that starts on a page is several times as fast as into one a byte further.
            held = memoryview(mmap.mmap(-1, max(mmap.PAGESIZE, length)))
            self._maps[slot] = held
        return held[:length]
