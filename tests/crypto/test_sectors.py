"""Sectors encrypted all at once against the cryptography package's own modes, a sector at a time."""

from __future__ import annotations

import hashlib
import random

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import CBC, CTR, ECB, XTS
from safeimg.drivers.crypto.ciphers import Block
from safeimg.drivers.crypto.sectors import AT_ONCE, SECTOR, SectorCipher
from safeimg.drivers.errors import UnsupportedError

KEY = hashlib.sha512(b"key").digest()


def one_by_one(mode: str, data: bytes, first: int, *, ivgen: str = "plain64") -> bytes:
    out = []
    for at in range(0, len(data), SECTOR):
        number = first + at // SECTOR
        if ivgen == "plain":
            number &= 0xFFFFFFFF
        iv = number.to_bytes(16, "little")
        if ivgen == "essiv":
            iv = Cipher(AES(hashlib.sha256(KEY[:32]).digest()), ECB()).encryptor().update(iv)
        key = KEY if mode == "xts" else KEY[:32]
        kind = ECB() if mode == "ecb" else {"cbc": CBC, "ctr": CTR, "xts": XTS}[mode](iv)
        out.append(Cipher(AES(key), kind).encryptor().update(data[at : at + SECTOR]))
    return b"".join(out)


def cipher_of(mode: str, ivgen: str) -> SectorCipher:
    tweak = Block("aes-256", KEY[32:]) if mode == "xts" else None
    essiv = Block("aes-256", hashlib.sha256(KEY[:32]).digest()) if ivgen == "essiv" else None
    return SectorCipher(mode, ivgen, Block("aes-256", KEY[:32]), tweak=tweak, essiv=essiv)


@pytest.mark.parametrize("ivgen", ["plain", "plain64", "essiv"])
@pytest.mark.parametrize("mode", ["ecb", "cbc", "ctr", "xts"])
def test_sectors_are_as_if_encrypted_one_by_one(mode: str, ivgen: str) -> None:
    sectors = cipher_of(mode, ivgen)
    for count, first in ((1, 0), (3, (1 << 32) - 2), (AT_ONCE + 5, 77)):
        data = random.Random(count).randbytes(count * SECTOR)
        buffer = bytearray(data)
        sectors.encrypt(memoryview(buffer), first)
        assert bytes(buffer) == one_by_one(mode, data, first, ivgen=ivgen)
        sectors.decrypt(memoryview(buffer), first)
        assert bytes(buffer) == data


def test_only_whole_sectors() -> None:
    with pytest.raises(ValueError, match="whole sectors"):
        cipher_of("xts", "plain64").encrypt(memoryview(bytearray(SECTOR + 16)), 0)


def test_xts_needs_blocks_of_16_bytes() -> None:
    cast5 = Block("cast5-128", KEY[:16])
    with pytest.raises(UnsupportedError, match="Unsupported cipher mode xts"):
        SectorCipher("xts", "plain64", cast5, tweak=cast5)
