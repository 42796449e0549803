"""What every patched sector of an image may hold, by the log: the composite of all steps' metadata patches.

Several steps may patch one sector (hazard 10), so a sector is judged against the newest values, not patch by patch::

    step 1 (solid)      refcounts  .A......      the solid steps, oldest first, make the value that must be there;
    step 2 (solid)      refcounts  .B.C....      each step in flux then adds one more value that may be there,
    step 3 (in flux)    refcounts  .B.CD...      first with its `allocate` patches, then with its `link` patches

    allowed on disk: .B.C with D's place as before, or .B.CD

A disk writes 512-byte sectors whole or not at all, so every sector holds exactly one of its values. Bytes that no
patch covers belong to others and are not compared.

But where several steps in flux patch one sector, values mix: the patches of the older one may be lost when the newer
one's are taken back, which puts there what the older one had made of these bytes and of no others. Of such a sector
each byte has to be one of those that it had in any value.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from safeimg.journal.state import LiveStep

SECTOR = 512


@dataclass(slots=True)
class _Value:
    """Bytes known of a sector: `mask` has 0xff where `data` counts."""

    data: bytearray
    mask: bytearray

    def copy(self) -> _Value:
        return _Value(bytearray(self.data), bytearray(self.mask))

    def matches(self, sector: bytes) -> bool:
        mask = int.from_bytes(self.mask, "little")
        return (int.from_bytes(sector, "little") ^ int.from_bytes(self.data, "little")) & mask == 0


@dataclass(slots=True)
class Sector:
    """The values that one sector may hold, oldest first; the last one is that after all steps."""

    current: _Value = field(default_factory=lambda: _Value(bytearray(SECTOR), bytearray(SECTOR)))
    earlier: list[_Value] = field(default_factory=list)
    unsettled: set[int] = field(default_factory=set)  # the steps in flux that patch it

    def write(self, start: int, before: bytes | None, after: bytes, *, step: int, in_flux: bool) -> None:
        """Applies a patch's bytes from `start` of the sector on: certain ones to every value, others make a new one."""
        end = start + len(after)
        if in_flux:
            self.unsettled.add(step)
        changed = [self.current]
        if in_flux:
            old = self.current.copy()
            if before is not None:
                for value in (*self.earlier, old):
                    _fill(value, start, before)
            self.earlier.append(old)
        else:
            changed += self.earlier
        for value in changed:
            value.data[start:end] = after
            value.mask[start:end] = b"\xff" * len(after)

    def allows(self, sector: bytes) -> bool:
        values = (self.current, *self.earlier)
        if any(value.matches(sector) for value in values):
            return True
        return len(self.unsettled) > 1 and all(
            any(not value.mask[at] or value.data[at] == byte for value in values) for at, byte in enumerate(sector)
        )


def _fill(value: _Value, start: int, known: bytes) -> None:
    """Notes bytes of a sector's value that nothing was known of yet."""
    for index, byte in enumerate(known, start):
        if not value.mask[index]:
            value.data[index] = byte
            value.mask[index] = 0xFF


def composite(steps: Sequence[LiveStep], image: int) -> dict[int, Sector]:
    """The sectors of `image` that the steps (oldest first) patched, by sector number.

    A fence may be down although its step is solid: `qemu-img check -r` takes it down (hazard 19)."""
    sectors: dict[int, Sector] = {}
    for step in steps:
        uncertain = step.in_flux or step.prepared.name == "fence"
        for group in (step.prepared.allocate, step.prepared.link):
            for patch in group:
                if patch.image != image:
                    continue
                for number, start, low, high in _pieces(patch.offset, len(patch.after)):
                    sector = sectors.setdefault(number, Sector())
                    before = None if patch.before is None else patch.before[low:high]
                    sector.write(start, before, patch.after[low:high], step=step.prepared.number, in_flux=uncertain)
            if group is step.prepared.allocate:
                _forget(sectors, step, image)
    return sectors


def _forget(sectors: dict[int, Sector], step: LiveStep, image: int) -> None:
    """What the step puts in place as data is judged as data, whatever older steps patched there: an undo brings back
    space that held metadata as a whole."""
    for move in step.prepared.moves:
        if move.image == image and sectors:
            first, last = move.offset // SECTOR, (move.offset + move.length - 1) // SECTOR
            if last - first < len(sectors):
                for number in range(first, last + 1):
                    sectors.pop(number, None)
            else:
                for number in [each for each in sectors if first <= each <= last]:
                    del sectors[number]


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """A range cut at sectors: sector number, offset in the sector, and the slice of the range."""
    done = 0
    while done < length:
        number, start = divmod(offset + done, SECTOR)
        size = min(SECTOR - start, length - done)
        yield number, start, done, done + size
        done += size


def runs(numbers: Iterable[int], limit: int = 2048) -> Iterator[tuple[int, int]]:
    """Sorted sector numbers as runs (first, count) of at most `limit` sectors, for reading."""
    first = count = 0
    for number in sorted(numbers):
        if count and number == first + count and count < limit:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count
