"""Serpent and Twofish: the published test vectors, and many blocks at once as one by one."""

from __future__ import annotations

import random

import pytest
from safeimg.drivers.crypto.ciphers import ALGORITHMS, Block

# Of a key and a block of zeroes
ZEROES = {
    "serpent-128": "3620b17ae6a993d09618b8768266bae9",
    "serpent-256": "49672ba898d98df95019180445491089",
    "twofish-128": "9f589f5cf6122c32b6bfec2f2ae8c35a",
    "twofish-192": "efa71f788965bd4453f860178fc19101",
    "twofish-256": "57ff739d4dc92c1bd7fc01700cc8216f",
}


def through(name: str, key: bytes, data: bytes, *, back: bool = False) -> bytes:
    cipher = Block(name, key)
    target = bytearray(len(data) + 32)
    (cipher.decryptor() if back else cipher.encryptor())(data, target)
    return bytes(target[: len(data)])


@pytest.mark.parametrize("name", ZEROES)
def test_published_vectors(name: str) -> None:
    key = bytes(ALGORITHMS[name][1])
    assert through(name, key, bytes(16)).hex() == ZEROES[name]
    assert through(name, key, bytes.fromhex(ZEROES[name]), back=True) == bytes(16)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name.startswith(("serpent", "twofish"))])
def test_many_blocks(name: str) -> None:
    rng = random.Random(3)
    key, data = rng.randbytes(ALGORITHMS[name][1]), rng.randbytes(16 * 7)
    found = through(name, key, data)
    assert found == b"".join(through(name, key, data[at : at + 16]) for at in range(0, len(data), 16))
    assert through(name, key, found, back=True) == data
