"""Plans writes into a VDI image: a fresh block for what has none, everything else in place.

Implements `api.Planner`. A new block takes two sectors: the header's, which counts the blocks, and one of the map. The
count is `allocate`, the map's entry `link`: lost between the two, a block counts that nobody refers to, and is taken
the next time. The other way round QEMU would give a block that is in use to the next guest that asks (`qemu-img check`
calls either an error; it knows no leaks in this format).

No block is ever given back, as in QEMU: what is zeroed is zeroed in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from safeimg.drivers.errors import UnsupportedError
from safeimg.drivers.formats.api import Changes, Placement
from safeimg.drivers.formats.metadata import MetadataView, Phase
from safeimg.drivers.formats.placements import add_placement
from safeimg.drivers.formats.plain import PlainPlanner
from safeimg.drivers.formats.vdi.header import BLOCK, BLOCKS_ALLOCATED_OFFSET, DISCARDED, ENTRY, SECTOR
from safeimg.drivers.formats.vdi.image import VdiImage
from safeimg.drivers.formats.vdi.usage import used_blocks

NO_RESIZE = "Image format driver does not support resize"


class VdiPlanner(PlainPlanner):
    """Plans need an image that was opened for writing (`open_image` checks what they rely on)."""

    def __init__(self, image: VdiImage) -> None:
        super().__init__(image)
        self._image = image
        self._header = image.header
        self._view = MetadataView(image.file, SECTOR)
        self._used: bytearray | None = None  # by number of block: 1 if the map refers to it
        self._free_from = 0  # no free block lies before it
        self._entries = 0  # of the map, that refer to blocks
        self._allocated = image.header.allocated  # what the header says

    @property
    def cluster_size(self) -> int:
        return BLOCK

    @property
    def granularity(self) -> int:
        return BLOCK

    @property
    def pending(self) -> int:
        return self._view.pending

    def place(self, start: int, length: int) -> Sequence[Placement]:
        placements: list[Placement] = []
        for block, low, high in self._blocks(start, length):
            place = self._present(block, low, high)
            if place is None:
                begin = block * BLOCK
                place = Placement(begin, min(BLOCK, self._size - begin), self._allocate(block), True)
            add_placement(placements, place)
        return placements

    def zero(self, start: int, length: int) -> Sequence[Placement]:
        placements: list[Placement] = []
        for block, low, high in self._blocks(start, length):
            place = self._present(block, low, high)
            if place is not None:
                add_placement(placements, place)
        return placements

    def prepare_resize(self, size: int) -> Sequence[Changes]:
        raise UnsupportedError(NO_RESIZE)

    def resize(self, size: int) -> Sequence[Changes]:
        raise UnsupportedError(NO_RESIZE)

    def shrink(self, size: int) -> Sequence[Changes]:
        raise UnsupportedError(NO_RESIZE)

    def take(self) -> Changes:
        patches, length = self._view.take()
        return Changes(patches.allocate, patches.link, length)

    def _blocks(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        """The range by blocks: number, and from where to where in the guest."""
        self._check_range(start, length)
        for low in range(start - start % BLOCK if length else start, start + length, BLOCK):
            yield low // BLOCK, max(start, low), min(start + length, low + BLOCK)

    def _present(self, block: int, low: int, high: int) -> Placement | None:
        """Where a part of the block lies, if it lies anywhere."""
        self._survey()
        entry = int.from_bytes(self._view.read(self._header.map_offset + ENTRY * block, ENTRY), "little")
        if entry >= DISCARDED:
            return None
        return Placement(low, high - low, self._host(entry) + low - block * BLOCK, False)

    def _survey(self) -> bytearray:
        """Before any plan: which blocks are in use, each by one entry of the map."""
        if self._used is None:
            self._used = used_blocks(self._image)
            self._entries = self._used.count(1)
        return self._used

    def _allocate(self, block: int) -> int:
        """Takes the first block that is not in use; its offset. There is one: a map has as many blocks as entries."""
        used = self._survey()
        number = self._free_from = used.index(0, self._free_from)
        used[number] = 1
        self._entries += 1
        needed = max(self._allocated, self._entries, number + 1)
        if needed != self._allocated:
            self._allocated = needed
            self._view.write(BLOCKS_ALLOCATED_OFFSET, needed.to_bytes(4, "little"), Phase.ALLOCATE)
        self._view.write(self._header.map_offset + ENTRY * block, number.to_bytes(ENTRY, "little"), Phase.LINK)
        self._view.extend(self._host(number) + BLOCK)
        return self._host(number)

    def _host(self, number: int) -> int:
        return self._header.data_offset + number * BLOCK
