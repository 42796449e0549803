"""LUKS headers: made, read again, opened by their passwords; hostile ones in QEMU's words."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safeimg.drivers.crypto import luks
from safeimg.drivers.errors import DriverError, FormatError, UnsupportedError, UsageError

FAST = {"iter-time": "0"}


@pytest.fixture(scope="module")
def made() -> tuple[luks.Luks, bytes]:
    return luks.create(luks.choice(FAST), b"password")


def opened(header: luks.Luks, data: bytes, password: bytes) -> bytes:
    return luks.unlock(header, lambda offset, length: data[offset : offset + length], password, "disk")


def test_a_password_opens_the_disk(made: tuple[luks.Luks, bytes]) -> None:
    header, data = made
    assert luks.parse(data, "disk") == header
    assert len(data) == header.payload_offset == 2068480
    assert len(opened(header, data, b"password")) == 64
    with pytest.raises(UsageError, match="Invalid password, cannot unlock any keyslot"):
        opened(header, data, b"Password")


def test_more_passwords_and_fewer(made: tuple[luks.Luks, bytes]) -> None:
    header, data = made
    key = opened(header, data, b"password")
    header, material = luks.add_key(header, 5, key, b"another", 0)
    at = header.slots[5].offset
    changed = bytearray(data)
    changed[at : at + len(material)] = material
    changed[: luks.HEADER_BYTES] = header.pack()
    assert opened(header, bytes(changed), b"another") == key == opened(header, bytes(changed), b"password")
    header = luks.without_key(header, 0)
    assert opened(header, bytes(changed), b"another") == key
    with pytest.raises(UsageError):
        opened(header, bytes(changed), b"password")


@pytest.mark.parametrize(
    "options",
    [
        {"cipher-alg": "aes-192"},
        {"cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha1"},
        {"cipher-alg": "cast5-128", "cipher-mode": "cbc", "ivgen-alg": "plain", "hash-alg": "sha512"},
    ],
)
def test_other_ciphers(options: dict[str, str]) -> None:
    header, data = luks.create(luks.choice({**options, **FAST}), b"")
    assert luks.parse(data, "disk") == header
    assert len(opened(header, data, b"")) == header.key_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cipher-alg": "foo"}, "Parameter 'cipher-alg' does not accept value 'foo'"),
        ({"cipher-alg": "3des"}, "Algorithm '3des' not supported"),
        ({"cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha1"},
         "No AES cipher with key size 20 available"),
        ({"cipher-alg": "cast5-128"}, "Unsupported cipher mode xts"),
    ],
)
def test_what_cannot_be_made(options: dict[str, str], message: str) -> None:
    with pytest.raises((UsageError, UnsupportedError)) as caught:
        luks.create(luks.choice({**options, **FAST}), b"")
    assert str(caught.value) == message


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"X", "Volume is not in LUKS format"),
        (6, b"\0\2", "LUKS version 2 is not supported"),
        (8, b"foo\0", "Algorithm 'foo' with key size 32 bytes not supported"),
        (8, b"a" * 32, "LUKS header cipher name is not NUL terminated"),
        (40, b"xts\0", "Unexpected cipher mode string format 'xts'"),
        (40, b"xts-foo\0", "IV generator 'foo' not supported"),
        (40, b"foo-plain64\0", "Cipher mode 'foo' not supported"),
        (40, b"cbc-essiv:foo\0", "Hash algorithm 'foo' not supported"),
        (72, b"foo\0", "Hash algorithm 'foo' not supported"),
        (104, u32(0), "LUKS payload is overlapping with the header"),
        (104, u32(100), "Keyslot 0 is overlapping with the encrypted payload"),
        (164, u32(0), "LUKS key iteration count is zero"),
        (208, u32(5), "Keyslot 0 state (active/disable) is corrupted"),
        (212, u32(0), "Keyslot 0 iteration count is zero"),
        (248, u32(0), "Keyslot 0 is overlapping with the LUKS header"),
        (252, u32(1 << 31), "Keyslot 0 is corrupted (stripes -2147483648 != 4000)"),
        (296, u32(8), "Keyslots 0 and 1 are overlapping in the header"),
    ],
)
def test_damage(made: tuple[luks.Luks, bytes], offset: int, data: bytes, message: str) -> None:
    """The messages are those of qemu-img 7.2 for the same bytes."""
    damaged = bytearray(made[1][: luks.HEADER_BYTES])
    damaged[offset : offset + len(data)] = data
    with pytest.raises(FormatError) as caught:
        luks.parse(bytes(damaged), "disk")
    assert caught.value.problem == message


@given(st.lists(st.tuples(st.integers(0, luks.HEADER_BYTES - 1), st.binary(min_size=1, max_size=8)), max_size=6))
def test_any_header_is_refused_or_sound(changes: list[tuple[int, bytes]]) -> None:
    damaged = bytearray(_SOUND)
    for offset, data in changes:
        damaged[offset : offset + len(data)] = data
    try:
        header = luks.parse(bytes(damaged[: luks.HEADER_BYTES]), "disk")
    except DriverError:
        return
    assert all(slot.offset + header.material_bytes <= header.payload_offset for slot in header.slots)
    assert luks.parse(header.pack(), "disk") == header


_SOUND = luks.create(luks.choice(FAST), b"")[1][: luks.HEADER_BYTES]
