"""Passwords: key slots filled and emptied by `amend -o state=…`.

The header cannot move, but which slots count is said in one sector: the new key material is written first, into space
of an empty slot, then that sector. So the old passwords open the image up to one sector's write, and the new ones from
then on. Key material is in no log: of what is new it has digests, and what is old is overwritten at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from safeimg.drivers.crypto.keyslots import SlotChange, refuse_overwriting, slot_change
from safeimg.drivers.crypto.luks import HEADER_BYTES, Luks, add_key, slot_place, without_key
from safeimg.drivers.errors import SecretMissing
from safeimg.drivers.formats.api import Changes, CreateOption, Image, Patch, Planner
from safeimg.drivers.formats.encryption import SECTOR, GuestSectors, luks_amend_options
from safeimg.drivers.formats.luks.driver import own_image
from safeimg.drivers.formats.luks.image import KEY_SECRET

if TYPE_CHECKING:
    from safeimg.drivers.formats.features import Amendment
    from safeimg.drivers.formats.luks.image import LuksImage


class LuksAmending:
    """Implements `formats.features.Amending`."""

    options: Sequence[CreateOption] = luks_amend_options()

    def check(self, image: Image, values: Mapping[str, str], *, force: bool) -> None:
        own = own_image(image)
        change = _change(own, values, force=force)
        if change.password is not None:
            _space(own.header, change.slots[0])

    def erased(self, image: Image, values: Mapping[str, str]) -> Sequence[tuple[int, int]]:
        own = own_image(image)
        header = own.header
        slots = [header.slots[index] for index in _change(own, values, force=True).slots]
        return [(slot.offset, header.material_bytes) for slot in slots if slot.active]

    def amendments(self, values: Mapping[str, str]) -> Sequence[Amendment]:
        return [_Keys(values)]


def _change(image: LuksImage, values: Mapping[str, str], *, force: bool) -> SlotChange:
    return slot_change(image.header, image.read, values, image.secrets, image.file.path, force=force)


class _Keys:
    """The amendment. Checked before: what it is asked for is done."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def __call__(self, image: Image, planner: Planner) -> Iterator[Changes]:
        own = own_image(image)
        change = _change(own, self._values, force=True)
        if change.password is None:
            return _empty(own, change.slots)
        return _fill(own, change.slots[0], change.password, change.iter_time)


def _fill(image: LuksImage, index: int, password: bytes, iter_time: int) -> Iterator[Changes]:
    if not isinstance(image.cipher, GuestSectors):
        raise SecretMissing(KEY_SECRET)
    old, slots = image.header, image.header.slots
    lender = _space(old, index)
    swapped = list(slots)
    swapped[index] = replace(slots[index], offset=slots[lender].offset)
    swapped[lender] = replace(slots[lender], offset=slots[index].offset)
    new, material = add_key(replace(old, slots=tuple(swapped)), index, image.cipher.key, password, iter_time)
    switch = _sector(index)
    unlinked = [(slots[index].offset, old.material_bytes)] if slots[index].active else []
    yield Changes(
        # What the other sector says of an empty slot means nothing yet.
        allocate=_patches(image, new, 1 - switch),
        link=_patches(image, new, switch),
        fresh=((slots[lender].offset, material),),
        unlinked=tuple(unlinked),
    )


def _empty(image: LuksImage, indexes: Sequence[int]) -> Iterator[Changes]:
    """Slots whose states lie in two sectors are emptied one sector after the other."""
    header = image.header
    for sector in (0, 1):
        here = [index for index in indexes if _sector(index) == sector]
        for index in here:
            header = without_key(header, index)
        if here:
            unlinked = [(header.slots[index].offset, header.material_bytes) for index in here]
            yield Changes(link=_patches(image, header, sector), unlinked=tuple(unlinked))


def _space(header: Luks, index: int) -> int:
    """The empty slot whose space takes the new key material of slot `index`: itself, or one that it is exchanged with.

    `UsageError` if no exchange can be made by one sector."""
    if not header.slots[index].active:
        return index
    ends = [place + length for place, length in map(slot_place, range(len(header.slots)))]
    for other, slot in enumerate(header.slots):
        if not slot.active and max(ends[index], ends[other]) <= SECTOR:
            return other
    raise refuse_overwriting(index)


def _sector(index: int) -> int:
    """Which sector of the header says whether a slot is active."""
    return slot_place(index)[0] // SECTOR


def _patches(image: LuksImage, new: Luks, sector: int) -> tuple[Patch, ...]:
    """What changes in one of the header's two sectors."""
    start, end = sector * SECTOR, min((sector + 1) * SECTOR, HEADER_BYTES)
    before, after = image.read(start, end - start), new.pack()[start:end]
    return (Patch(start, before, after),) if before != after else ()
