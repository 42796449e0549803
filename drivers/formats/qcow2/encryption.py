"""Encrypted qcow2 images: the guest data of LUKS images and of the old AES format (spec: "Data encryption").

The IV of a sector is made of its number: in LUKS images of its place in the file, in AES images of the guest's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from safeimg.drivers.errors import FormatError, SecretMissing, UsageError
from safeimg.drivers.formats.api import Cipher
from safeimg.drivers.formats.options import bool_option
from safeimg.drivers.formats.qcow2.header import AES, LUKS, EncryptionHeader, Header
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import File

if TYPE_CHECKING:
    from safeimg.drivers.crypto.luks import Luks
    from safeimg.drivers.crypto.sectors import SectorCipher

SECTOR = 512
AES_KEY = 16  # bytes of the password that are the key


class Locked:
    """The cipher of an image that was opened without its secret."""

    ready = False

    def encrypt(self, buffer: memoryview, host: int, guest: int) -> NoReturn:
        raise SecretMissing

    decrypt = encrypt


class HostSectors:
    """LUKS: sectors are numbered by their place in the file."""

    ready = True

    def __init__(self, sectors: SectorCipher, key: bytes) -> None:
        self._sectors = sectors
        self.key = key  # the master key: new key slots hold it too

    def encrypt(self, buffer: memoryview, host: int, guest: int) -> None:
        self._sectors.encrypt(buffer, host // SECTOR)

    def decrypt(self, buffer: memoryview, host: int, guest: int) -> None:
        self._sectors.decrypt(buffer, host // SECTOR)


class GuestSectors:
    """The old AES format: sectors are numbered by their place on the virtual disk."""

    ready = True

    def __init__(self, sectors: SectorCipher) -> None:
        self._sectors = sectors

    def encrypt(self, buffer: memoryview, host: int, guest: int) -> None:
        self._sectors.encrypt(buffer, guest // SECTOR)

    def decrypt(self, buffer: memoryview, host: int, guest: int) -> None:
        self._sectors.decrypt(buffer, guest // SECTOR)


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
        return GuestSectors(SectorCipher("cbc", "plain64", Block("aes-128", key)))
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


def new_encryption(path: str, options: Mapping[str, str], secrets: Secrets) -> tuple[int, bytes]:
    """The encryption method that create's options ask for, and the LUKS header with its key material. `UsageError` in
    QEMU's words, `SecretMissing`."""
    prefix = "encrypt."
    given = {name[len(prefix):]: value for name, value in options.items() if name.startswith(prefix)}
    is_old = bool_option(path, options, "encryption")
    if "format" in given and is_old:
        raise UsageError(f"{path}: 'encrypt.format' and its alias 'encryption' can't be used at the same time")
    kind = given.pop("format", "aes" if is_old else None)
    if kind is None:
        if given:
            raise UsageError(f"{path}: Parameter 'encrypt.format' is missing")
        return 0, b""
    if kind not in ("aes", "luks"):
        raise UsageError(f"{path}: Parameter 'format' does not accept value '{kind}'")
    unexpected = sorted(given.keys() - {"key-secret"}) if kind == "aes" else []
    if unexpected:
        raise UsageError(f"{path}: Parameter 'encrypt.{unexpected[0]}' is unexpected")
    from safeimg.drivers.crypto import luks

    wanted = luks.choice(given)
    if "key-secret" not in given:
        raise SecretMissing
    password = secrets.password(given["key-secret"])
    return (AES, b"") if kind == "aes" else (LUKS, luks.create(wanted, password)[1])
