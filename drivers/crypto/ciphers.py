"""Block ciphers by QEMU's names: AES and CAST5 of the cryptography package, and those that it does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safeimg.drivers.crypto.sectors import Ecb

# Names as options have them: the name in a LUKS header, bytes of the key
ALGORITHMS = {
    "aes-128": ("aes", 16), "aes-192": ("aes", 24), "aes-256": ("aes", 32), "des": ("des", 8), "3des": ("3des", 24),
    "cast5-128": ("cast5", 16), "serpent-128": ("serpent", 16), "serpent-192": ("serpent", 24),
    "serpent-256": ("serpent", 32), "twofish-128": ("twofish", 16), "twofish-192": ("twofish", 24),
    "twofish-256": ("twofish", 32),
}  # fmt: skip

SHOWN = {"aes": "AES", "cast5": "CAST5", "serpent": "Serpent", "twofish": "Twofish"}  # as QEMU's messages call them


def algorithm(name: str, key_bytes: int) -> str | None:
    """The option's name of a cipher that a LUKS header names."""
    for found, known in ALGORITHMS.items():
        if known == (name, key_bytes):
            return found
    return None


def supported(name: str) -> bool:
    """Whether there is a block cipher of this name (one of `ALGORITHMS`)."""
    return ALGORITHMS[name][0] in SHOWN


class Block:
    """A block cipher with its key; implements `sectors.BlockCipher`."""

    def __init__(self, name: str, key: bytes) -> None:
        """`name`: one that is `supported`."""
        family = ALGORITHMS[name][0]
        self.block = 8 if family == "cast5" else 16
        self._encryptor, self._decryptor = _WAYS[family](family, key)

    def encryptor(self) -> Ecb:
        return self._encryptor()

    def decryptor(self) -> Ecb:
        return self._decryptor()


Way = tuple[Callable[[], Ecb], Callable[[], Ecb]]  # what makes an encryptor, and a decryptor


def _of_openssl(family: str, key: bytes) -> Way:
    from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import ECB

    kind: Callable[[bytes], Any] = AES if family == "aes" else CAST5
    cipher: Any = Cipher(kind(key), ECB())
    return lambda: cipher.encryptor().update_into, lambda: cipher.decryptor().update_into


def _of_arrays(family: str, key: bytes) -> Way:
    from safeimg.drivers.crypto.serpent import Serpent
    from safeimg.drivers.crypto.twofish import Twofish

    cipher = Serpent(key) if family == "serpent" else Twofish(key)
    return lambda: cipher.encrypt, lambda: cipher.decrypt


_WAYS: dict[str, Callable[[str, bytes], Way]] = {
    "aes": _of_openssl, "cast5": _of_openssl, "serpent": _of_arrays, "twofish": _of_arrays,
}  # fmt: skip
