"""Encrypted guest data, whatever the format: the ciphers of open images, and the options of LUKS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NoReturn

from safeimg.drivers.errors import SecretMissing
from safeimg.drivers.formats.api import CreateOption

if TYPE_CHECKING:
    from safeimg.drivers.crypto.sectors import SectorCipher

SECTOR = 512


class Locked:
    """The cipher of an image that was opened without its secret. Implements `api.Cipher`, as the others do."""

    def __init__(self, option: str) -> None:
        """`option`: the one that names the secret."""
        self.missing = option

    def encrypt(self, buffer: memoryview, host: int, guest: int) -> NoReturn:
        raise SecretMissing(self.missing)

    decrypt = encrypt


class HostSectors:
    """Sectors are numbered by their place in the file."""

    missing = None

    def __init__(self, sectors: SectorCipher, key: bytes) -> None:
        self._sectors = sectors
        self.key = key  # the master key: new key slots hold it too

    def encrypt(self, buffer: memoryview, host: int, guest: int) -> None:
        self._sectors.encrypt(buffer, host // SECTOR)

    def decrypt(self, buffer: memoryview, host: int, guest: int) -> None:
        self._sectors.decrypt(buffer, host // SECTOR)


class GuestSectors:
    """Sectors are numbered by their place on the virtual disk."""

    missing = None

    def __init__(self, sectors: SectorCipher, key: bytes) -> None:
        self._sectors = sectors
        self.key = key

    def encrypt(self, buffer: memoryview, host: int, guest: int) -> None:
        self._sectors.encrypt(buffer, guest // SECTOR)

    def decrypt(self, buffer: memoryview, host: int, guest: int) -> None:
        self._sectors.decrypt(buffer, guest // SECTOR)


def luks_create_options(prefix: str = "") -> tuple[CreateOption, ...]:
    """What a LUKS header is made with, apart from the secret. `prefix`: of the options' names."""
    return (
        CreateOption(f"{prefix}cipher-alg", "str", "Name of encryption cipher algorithm"),
        CreateOption(f"{prefix}cipher-mode", "str", "Name of encryption cipher mode"),
        CreateOption(f"{prefix}ivgen-alg", "str", "Name of IV generator algorithm"),
        CreateOption(f"{prefix}ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
        CreateOption(f"{prefix}hash-alg", "str", "Name of encryption hash algorithm"),
        CreateOption(f"{prefix}iter-time", "num", "Time to spend in PBKDF in milliseconds"),
    )


def luks_amend_options(prefix: str = "") -> tuple[CreateOption, ...]:
    """What is said of the key slots of a LUKS header that exists."""
    return (
        CreateOption(f"{prefix}iter-time", "num", "Time to spend in PBKDF in milliseconds"),
        CreateOption(f"{prefix}keyslot", "num", "Select a single keyslot to modify explicitly"),
        CreateOption(
            f"{prefix}new-secret", "str", "New secret to set in the matching keyslots. Empty string to erase"
        ),
        CreateOption(f"{prefix}old-secret", "str", "Select all keyslots that match this password"),
        CreateOption(f"{prefix}state", "str", "Select new state of affected keyslots (active/inactive)"),
    )


def named(options: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Those whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in options.items() if name.startswith(prefix)}
