"""Block ciphers by QEMU's names, over the cryptography package. Serpent and Twofish it does not have."""

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


def algorithm(name: str, key_bytes: int) -> str | None:
    """The option's name of a cipher that a LUKS header names."""
    for found, known in ALGORITHMS.items():
        if known == (name, key_bytes):
            return found
    return None


def supported(name: str) -> bool:
    """Whether there is a block cipher of this name (one of `ALGORITHMS`)."""
    return ALGORITHMS[name][0] in ("aes", "cast5")


class Block:
    """A block cipher with its key; implements `sectors.BlockCipher`."""

    def __init__(self, name: str, key: bytes) -> None:
        """`name`: one that is `supported`."""
        self.block = 16 if ALGORITHMS[name][0] == "aes" else 8
        self._cipher = _ecb(name, key)

    def encryptor(self) -> Ecb:
        context = self._cipher.encryptor()
        return context.update_into  # type: ignore[no-any-return]

    def decryptor(self) -> Ecb:
        context = self._cipher.decryptor()
        return context.update_into  # type: ignore[no-any-return]


def _ecb(name: str, key: bytes) -> Any:
    from cryptography.hazmat.decrepit.ciphers.algorithms import CAST5
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import ECB

    kind: Callable[[bytes], Any] = AES if ALGORITHMS[name][0] == "aes" else CAST5
    return Cipher(kind(key), ECB())
