"""Passwords and keys that images are opened with, by the ids that `--object secret` gives them.

Nothing here shows a secret: not `repr`, not an error. Contents may be encrypted themselves (AES-256-CBC), with a
key that is another secret: QEMU's manual, "Secret objects"."""

from __future__ import annotations

from safeimg.drivers.errors import UsageError

_KEY_BYTES = 32
_BLOCK = 16
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_DIGITS = {byte: value for value, byte in enumerate(_ALPHABET)} | {ord("="): 0}


class Secrets:
    """A store of secrets."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: dict[str, bytes] = {}

    def __repr__(self) -> str:
        return f"<{len(self._held)} secrets>"

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def add(self, name: str, content: bytes) -> None:
        """Replaces nothing: the caller has seen to it that the id is new."""
        self._held[name] = content

    def lookup(self, name: str) -> bytes:
        """The secret; `UsageError` in QEMU's words if there is none of this id."""
        try:
            return self._held[name]
        except KeyError:
            raise UsageError(f"No secret with id '{name}'") from None

    def password(self, name: str) -> bytes:
        """The secret as a password: `UsageError` if it is not UTF-8."""
        content = self.lookup(name)
        try:
            content.decode()
        except UnicodeDecodeError:
            raise UsageError(f"Data from secret {name} is not valid UTF-8") from None
        return content


NO_SECRETS = Secrets()


def decode_base64(text: bytes) -> bytes:
    """Base64 as lenient as QEMU's: line ends are skipped, an incomplete last group is dropped, padding may stand
    anywhere. `UsageError` for other bytes."""
    digits = text.replace(b"\n", b"")
    if any(byte not in _DIGITS for byte in digits):
        raise UsageError("Base64 data contains invalid characters")
    decoded = bytearray()
    for at in range(0, len(digits) - 3, 4):
        group = digits[at : at + 4]
        value = 0
        for byte in group:
            value = value << 6 | _DIGITS[byte]
        decoded += value.to_bytes(3, "big")[: 1 if group[2:3] == b"=" else 2 if group[3:4] == b"=" else 3]
    return bytes(decoded)


def decrypt(content: bytes, key: bytes, iv: bytes) -> bytes:
    """What an encrypted secret holds. `UsageError` in QEMU's words."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import AES
    from cryptography.hazmat.primitives.ciphers.modes import CBC

    if len(key) != _KEY_BYTES:
        raise UsageError(f"Key should be {_KEY_BYTES} bytes in length")
    if len(iv) != _BLOCK:
        raise UsageError(f"IV should be {_BLOCK} bytes in length not {len(iv)}")
    if len(content) % _BLOCK:
        raise UsageError(f"Length {len(content)} must be a multiple of block size {_BLOCK}")
    decryptor = Cipher(AES(key), CBC(iv)).decryptor()
    plain = decryptor.update(content) + decryptor.finalize()
    padding = plain[-1] if plain else 0
    if not plain or padding > _BLOCK or padding > len(plain):
        raise UsageError(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    return plain[: len(plain) - padding]
