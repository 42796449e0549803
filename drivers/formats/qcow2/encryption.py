"""Encrypted qcow2 images: the guest data of LUKS images and of the old AES format (spec: "Data encryption").

The IV of a sector is made of its number: in LUKS images of its place in the file, in AES images of the guest's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from safeimg.drivers.errors import FormatError, SecretMissing, UsageError
from safeimg.drivers.formats.api import Cipher
from safeimg.drivers.formats.encryption import GuestSectors, HostSectors, named
from safeimg.drivers.formats.options import bool_option
from safeimg.drivers.formats.qcow2.extensions import EncryptionHeader
from safeimg.drivers.formats.qcow2.header import AES, LUKS, Header
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import File

if TYPE_CHECKING:
    from safeimg.drivers.crypto.luks import Choice, Luks

PREFIX = "encrypt."  # of options
KEY_SECRET = PREFIX + "key-secret"
AES_KEY = 16  # bytes of the password that are the key


def read_luks(file: File, header: Header) -> Luks:
    """The LUKS header of an image that has one. Raises `FormatError` in QEMU's words."""
    from safeimg.drivers.crypto.luks import HEADER_BYTES, parse

    place = header.encryption
    if place is None:
        raise FormatError(file.path, "Missing CRYPTO header for crypt method 2")
    if place.length < HEADER_BYTES:
        raise FormatError(file.path, "Request for data outside of extension header")
    if place.offset >= 1 << 63:
        raise FormatError(file.path, "Could not read encryption header: Input/output error")
    return parse(file.pread(place.offset, HEADER_BYTES), file.path)


def unlocked(file: File, header: Header, password: bytes) -> Cipher:
    """The cipher of an encrypted image. Raises `UsageError` for a wrong password, `UnsupportedError`."""
    if header.crypt_method == AES:
        from safeimg.drivers.crypto.ciphers import Block
        from safeimg.drivers.crypto.sectors import SectorCipher

        key = password[:AES_KEY].ljust(AES_KEY, b"\0")
        return GuestSectors(SectorCipher("cbc", "plain64", Block("aes-128", key)), key)
    from safeimg.drivers.crypto.luks import sector_cipher, unlock

    luks, place = read_luks(file, header), header.encryption
    assert place is not None

    key = unlock(luks, partial(read_material, file, place), password, file.path)
    return HostSectors(sector_cipher(luks, key), key)


def read_material(file: File, place: EncryptionHeader, offset: int, length: int) -> bytes:
    """A part of the LUKS header at `place`."""
    if offset + length > place.length:
        raise FormatError(file.path, "Request for data outside of extension header")
    return file.pread(place.offset + offset, length)


class Wanted(NamedTuple):
    """How an image is to be encrypted."""

    luks: Choice | None  # None: legacy AES
    secret: str | None  # its id


def asked_encryption(path: str, options: Mapping[str, str]) -> Wanted | None:
    """What create's options ask for. `UsageError` in QEMU's words."""
    given = named(options, PREFIX)
    kind = given.pop("format", "aes" if bool_option(path, options, "encryption") else None)
    if kind is None:
        if given:
            raise UsageError(f"{path}: Parameter 'encrypt.format' is missing")
        return None
    if kind not in ("aes", "luks"):
        raise UsageError(f"{path}: Parameter 'format' does not accept value '{kind}'")
    unexpected = sorted(given.keys() - {"key-secret"}) if kind == "aes" else []
    if unexpected:
        raise UsageError(f"{path}: Parameter 'encrypt.{unexpected[0]}' is unexpected")
    from safeimg.drivers.crypto import luks

    return Wanted(luks.choice(given) if kind == "luks" else None, given.get("key-secret"))


def refuse_two_methods(path: str, options: Mapping[str, str]) -> None:
    """The old and the new way to ask for encryption exclude each other, whatever else is asked for."""
    if PREFIX + "format" in options and bool_option(path, options, "encryption"):
        raise UsageError(f"{path}: 'encrypt.format' and its alias 'encryption' can't be used at the same time")


def new_encryption(wanted: Wanted | None, secrets: Secrets) -> tuple[int, bytes]:
    """The encryption method of a new image, and its LUKS header with key material. `SecretMissing`, `UsageError`."""
    if wanted is None:
        return 0, b""
    if wanted.secret is None:
        raise SecretMissing(KEY_SECRET)
    password = secrets.password(wanted.secret)
    if wanted.luks is None:
        return AES, b""
    from safeimg.drivers.crypto import luks

    return LUKS, luks.create(wanted.luks, password)[1]
