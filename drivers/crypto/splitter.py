"""The anti-forensic splitter of LUKS ("LUKS1 On-Disk Format Specification", section 2.4): a key as many stripes, all of
which are needed to get it back."""

from __future__ import annotations

import hashlib
import os

STRIPES = 4000


def split(name: str, key: bytes) -> bytes:
    length = len(key)
    stripes = os.urandom((STRIPES - 1) * length)
    return stripes + _xor(_folded(name, stripes, length), key)


def merge(name: str, material: bytes, length: int) -> bytes:
    return _xor(_folded(name, material[:-length], length), material[-length:])


def _folded(name: str, stripes: bytes, length: int) -> bytes:
    """All stripes but the last, diffused into one."""
    state = bytes(length)
    for at in range(0, len(stripes), length):
        state = _diffused(name, _xor(state, stripes[at : at + length]))
    return state


def _diffused(name: str, data: bytes) -> bytes:
    size = hashlib.new(name, usedforsecurity=False).digest_size
    return b"".join(
        _hash(name, number.to_bytes(4, "big") + data[at : at + size])[: len(data) - at]
        for number, at in enumerate(range(0, len(data), size))
    )


def _xor(first: bytes, second: bytes) -> bytes:
    return (int.from_bytes(first, "big") ^ int.from_bytes(second, "big")).to_bytes(len(first), "big")


def _hash(name: str, data: bytes) -> bytes:
    return hashlib.new(name, data, usedforsecurity=False).digest()
