"""Passwords of LUKS images: key slots filled and emptied by `amend -o encrypt.state=…`.

The LUKS header is made anew, in clusters of its own, with the slots as they will be, and the qcow2 header switched to
it. So the old passwords open the image up to one sector's write, and the new ones from then on. Key material is in no
log: of the new header it has digests, and the old one is overwritten before its clusters are free (`Change`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

from safeimg.drivers.errors import FormatError, SecretMissing, UsageError
from safeimg.drivers.formats.api import Changes, Image, Planner
from safeimg.drivers.formats.encryption import HostSectors, named
from safeimg.drivers.formats.qcow2.driver import own_image, own_planner
from safeimg.drivers.formats.qcow2.encryption import KEY_SECRET, PREFIX, read_luks, read_material
from safeimg.drivers.formats.qcow2.extensions import EXT_ENCRYPTION, EncryptionHeader
from safeimg.drivers.formats.qcow2.header import LUKS
from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.rewrite import current_header, rewrite_header

if TYPE_CHECKING:
    from safeimg.drivers.crypto.keyslots import SlotChange
    from safeimg.drivers.crypto.luks import Luks


def check_encrypted(image: Qcow2Image) -> None:
    """Refuses images that have no key slots. `UsageError` in QEMU's words, as below."""
    if not image.header.crypt_method:
        raise UsageError("Can't amend encryption options - encryption not present")
    if image.header.crypt_method != LUKS:
        raise UsageError("Only LUKS encryption options can be amended")


def check_keys(image: Qcow2Image, values: Mapping[str, str], *, force: bool) -> None:
    """Refuses what the slots do not allow."""
    _change(image, read_luks(image.file, image.header), values, force=force)


def _change(image: Qcow2Image, luks: Luks, values: Mapping[str, str], *, force: bool) -> SlotChange:
    """What the options ask for."""
    from safeimg.drivers.crypto.keyslots import slot_change

    given = named(values, PREFIX)
    return slot_change(luks, _material(image), given, image.secrets, image.file.path, force=force)


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
            raise SecretMissing(KEY_SECRET)
        size = own.header.cluster_size
        content = self._content(own, own.cipher.key)
        clusters = -(-len(content) // size)
        while plan.allocator.reserve_run(clusters):
            yield plan.take()
        offset = plan.allocator.allocate_run(clusters) * size
        written = ((offset, content.ljust(clusters * size, b"\0")),)
        yield plan.take()._replace(fresh=written)
        old = own.header.encryption
        assert old is not None
        if old.offset + old.length > own.file.length():
            raise FormatError(own.file.path, "the LUKS header lies past the end of the file", offset=old.offset)
        plan.unlink_clusters(old.offset // size, -(-old.length // size))
        place = EncryptionHeader(offset, len(content)).extension()
        yield from rewrite_header(plan, current_header(plan).with_extension(place, EXT_ENCRYPTION))

    def _content(self, image: Qcow2Image, key: bytes) -> bytes:
        """The new LUKS header with its key material."""
        from safeimg.drivers.crypto.luks import HEADER_BYTES, add_key, without_key

        luks = read_luks(image.file, image.header)
        content = bytearray(_material(image)(0, luks.payload_offset))
        change = _change(image, luks, self._values, force=True)
        for slot in change.slots:
            material = bytes(luks.material_bytes)
            if change.password is not None:
                luks, material = add_key(luks, slot, key, change.password, change.iter_time)
            else:
                luks = without_key(luks, slot)
            at = luks.slots[slot].offset
            content[at : at + len(material)] = material
        content[:HEADER_BYTES] = luks.pack()
        return bytes(content)
