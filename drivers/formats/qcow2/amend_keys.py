"""Passwords of LUKS images: key slots filled and emptied by `amend -o encrypt.state=…`.

The LUKS header is made anew, in clusters of its own, with the slots as they will be, and the qcow2 header switched to
it. So the old passwords open the image up to one sector's write, and the new ones from then on. Key material is in no
log: of the new header it has digests, and the old one is overwritten before its clusters are free (`Change`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from safeimg.drivers.errors import FormatError, SecretMissing, UsageError
from safeimg.drivers.formats.api import Changes, Image, Planner
from safeimg.drivers.formats.qcow2.driver import own_image, own_planner
from safeimg.drivers.formats.qcow2.encryption import HostSectors, read_luks, read_material
from safeimg.drivers.formats.qcow2.header import EXT_ENCRYPTION, LUKS, EncryptionHeader
from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.rewrite import current_header, rewrite_header

if TYPE_CHECKING:
    from safeimg.drivers.crypto.luks import Luks

PREFIX = "encrypt."


def check_keys(image: Qcow2Image, values: Mapping[str, str], *, force: bool) -> None:
    """Refuses what cannot be done. `UsageError` in QEMU's words."""
    if not image.header.crypt_method:
        raise UsageError("Can't amend encryption options - encryption not present")
    if image.header.crypt_method != LUKS:
        raise UsageError("Only LUKS encryption options can be amended")
    chosen_slots(image, read_luks(image.file, image.header), values, force=force)


def chosen_slots(image: Qcow2Image, luks: Luks, values: Mapping[str, str], *, force: bool) -> list[int]:
    """The slots that the options are about."""
    from safeimg.drivers.crypto.luks import SLOTS

    given = {name[len(PREFIX):]: value for name, value in values.items() if name.startswith(PREFIX)}
    state = given.get("state")
    if state is None:
        raise UsageError("Parameter 'state' is missing")
    if state not in ("active", "inactive"):
        raise UsageError(f"Parameter 'state' does not accept value '{state}'")
    slot = int(given["keyslot"]) & 0xFFFF_FFFF if "keyslot" in given else None
    refused = ("old-secret",) if state == "active" else ("new-secret", "iter-time")
    what = "activating" if state == "active" else "erasing"
    if state == "active" and "new-secret" not in given:
        raise UsageError("'new-secret' is required to activate a keyslot")
    for name in refused:
        if name in given:
            raise UsageError(f"'{name}' must not be given when {what} keyslots")
    if state == "active":
        image.secrets.password(given["new-secret"])
        return [_free_slot(luks, slot, force=force)]
    old = image.secrets.password(given["old-secret"]) if "old-secret" in given else None
    if slot is not None and slot >= SLOTS:
        raise UsageError(f"Invalid keyslot {slot} specified, must be between 0 and {SLOTS - 1}")
    return _slots_to_erase(image, luks, slot, old, force=force)


def _free_slot(luks: Luks, slot: int | None, *, force: bool) -> int:
    if slot is None:
        free = next((index for index, each in enumerate(luks.slots) if not each.active), None)
        if free is None:
            raise UsageError("Can't add a keyslot - all keyslots are in use")
        return free
    if slot >= len(luks.slots):
        raise UsageError(f"Invalid keyslot {slot} specified, must be between 0 and {len(luks.slots) - 1}")
    if luks.slots[slot].active and not force:
        raise UsageError(f"Refusing to overwrite active keyslot {slot} - please erase it first")
    return slot


def _slots_to_erase(
    image: Qcow2Image, luks: Luks, slot: int | None, old: bytes | None, *, force: bool
) -> list[int]:
    active = [index for index, each in enumerate(luks.slots) if each.active]
    if slot is not None:
        if old is not None and not (slot in active and _opens(image, luks, slot, old)):
            raise UsageError(f"Given keyslot {slot} doesn't contain the given old password for erase operation")
        if slot not in active:
            raise UsageError(f"Given keyslot {slot} is already erased (inactive) ")
        if active == [slot] and not force:
            raise UsageError(
                f"Attempt to erase the only active keyslot {slot} which will erase all the data in the image "
                "irreversibly - refusing operation"
            )
        return [slot]
    if old is None:
        raise UsageError(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be "
            "given"
        )
    matching = [index for index in active if _opens(image, luks, index, old)]
    if not matching:
        raise UsageError("No keyslots match given (old) password for erase operation")
    if matching == active and not force:
        raise UsageError(
            "All the active keyslots match the (old) password that was given and erasing them will erase all the data "
            "in the image irreversibly - refusing operation"
        )
    return matching


def _opens(image: Qcow2Image, luks: Luks, index: int, password: bytes) -> bool:
    from safeimg.drivers.crypto.luks import open_slot

    material = _material(image)(luks.slots[index].offset, luks.material_bytes)
    return open_slot(luks, index, material, password, image.file.path) is not None


def _material(image: Qcow2Image) -> partial[bytes]:
    place = image.header.encryption
    assert place is not None
    return partial(read_material, image.file, place)


class Keys:
    """The amendment. Checked before: what it is asked for is done."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def __call__(self, image: Image, planner: Planner) -> Iterator[Changes]:
        own, plan = own_image(image), own_planner(planner)
        if not isinstance(own.cipher, HostSectors):
            raise SecretMissing
        size = own.header.cluster_size
        content = self._content(own, own.cipher.key)
        clusters = -(-len(content) // size)
        while plan.allocator.reserve_run(clusters):
            yield plan.take()
        offset = plan.allocator.allocate_run(clusters) * size
        written = ((offset, content.ljust(clusters * size, b"\0")),)
        yield replace(plan.take(), fresh=written)
        old = own.header.encryption
        assert old is not None
        if old.offset + old.length > own.file.length():
            raise FormatError(own.file.path, "the LUKS header lies past the end of the file", offset=old.offset)
        plan.unlink_clusters(old.offset // size, -(-old.length // size))
        place = EncryptionHeader(offset, len(content)).extension()
        yield from rewrite_header(plan, current_header(plan).with_extension(place, EXT_ENCRYPTION))

    def _content(self, image: Qcow2Image, key: bytes) -> bytes:
        """The new LUKS header with its key material."""
        from safeimg.drivers.crypto.luks import DEFAULT_ITER_TIME, HEADER_BYTES, add_key, without_key

        luks = read_luks(image.file, image.header)
        content = bytearray(_material(image)(0, luks.payload_offset))
        for slot in chosen_slots(image, luks, self._values, force=True):
            material = bytes(luks.material_bytes)
            if self._values[PREFIX + "state"] == "active":
                password = image.secrets.password(self._values[PREFIX + "new-secret"])
                iter_time = int(self._values.get(PREFIX + "iter-time", DEFAULT_ITER_TIME))
                luks, material = add_key(luks, slot, key, password, iter_time)
            else:
                luks = without_key(luks, slot)
            at = luks.slots[slot].offset
            content[at : at + len(material)] = material
        content[:HEADER_BYTES] = luks.pack()
        return bytes(content)
