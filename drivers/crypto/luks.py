"""The LUKS header, version 1: what a disk is encrypted with, and eight slots that hold its key under passwords.

Source: "LUKS1 On-Disk Format Specification" of cryptsetup; limits and messages are QEMU's. Offsets and lengths are
bytes from the start of the header. Knows nothing of where the header lies: raw LUKS disks begin with it, qcow2 images
have it in clusters of their own.

    header (592 bytes) | key material of slot 0 | … of slot 7 | payload

A slot's key material is the master key, split into 4000 stripes of which all are needed to get it back (so that
erasing any of them is enough), encrypted with a key derived from the password.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from safeimg.drivers.crypto.ciphers import ALGORITHMS, SHOWN, Block, algorithm, supported
from safeimg.drivers.crypto.sectors import IV_GENERATORS, MODES, SECTOR, SectorCipher
from safeimg.drivers.crypto.splitter import STRIPES, merge, split
from safeimg.drivers.errors import FormatError, UnsupportedError, UsageError

MAGIC = b"LUKS\xba\xbe"
HEADER_BYTES = 592
SLOTS = 8
DEFAULT_ITER_TIME = 2000  # milliseconds
MIN_ITERATIONS = 1000
UNFINISHED = "safeimg-unfinished:"  # before the name of the hash: an unknown one to every other program

HASH_OFFSET, HASH_BYTES = 72, 32  # the field of the hash's name

_ALIGN = 4096  # of key material
_DIGEST = 20
_SALT = 32
_ACTIVE, _INACTIVE = 0x00AC71F3, 0x0000DEAD
_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_SLOT = struct.Struct(">II32sII")
_HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
_MAX_NUMBER = (1 << 32) - 1

Read = Callable[[int, int], bytes]  # (offset, length)


@dataclass(frozen=True, slots=True)
class Slot:
    """A key slot."""

    active: bool
    iterations: int
    salt: bytes
    offset: int  # of its key material
    stripes: int

    def pack(self) -> bytes:
        state = _ACTIVE if self.active else _INACTIVE
        return _SLOT.pack(state, self.iterations, self.salt, self.offset // SECTOR, self.stripes)


@dataclass(frozen=True, slots=True)
class Luks:
    """A valid header."""

    cipher: str  # one of `ALGORITHMS`
    mode: str
    ivgen: str
    ivgen_hash: str | None
    hash: str
    payload_offset: int
    key_bytes: int
    digest: bytes  # of the master key
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[Slot, ...]
    unfinished: bool = False  # the disk is being made, and every other program refuses it

    @property
    def material_bytes(self) -> int:
        """Of one slot's key material, whole sectors."""
        return -(-self.key_bytes * STRIPES // SECTOR) * SECTOR

    def pack(self) -> bytes:
        mode = f"{self.mode}-{self.ivgen}" + ("" if self.ivgen_hash is None else f":{self.ivgen_hash}")
        hash_name = (UNFINISHED if self.unfinished else "") + self.hash
        fixed = _HEADER.pack(
            MAGIC, 1, ALGORITHMS[self.cipher][0].encode(), mode.encode(), hash_name.encode(),
            self.payload_offset // SECTOR, self.key_bytes, self.digest, self.digest_salt, self.digest_iterations,
            os.fsencode(self.uuid),
        )  # fmt: skip
        return fixed + b"".join(slot.pack() for slot in self.slots)


def parse(data: bytes, path: str, *, unfinished: bool = False) -> Luks:
    """The header in the first `HEADER_BYTES` of `data`, or with `unfinished` that of a disk which is being made.
    `FormatError` for what QEMU refuses."""

    def wrong(problem: str) -> FormatError:
        """In one line, whatever names the header has."""
        return FormatError(path, "".join("?" if letter < " " else letter for letter in problem))

    data = data.ljust(HEADER_BYTES, b"\0")
    if data[: len(MAGIC)] != MAGIC:
        raise wrong("Volume is not in LUKS format")
    fields = _HEADER.unpack_from(data)
    _, version, cipher, mode_field, hash_field, payload, key_bytes, digest, salt, iterations, uuid = fields
    if version != 1:
        raise wrong(f"LUKS version {version} is not supported")
    texts: list[str] = []
    for field, name in ((cipher, "cipher name"), (mode_field, "cipher mode"), (hash_field, "hash spec")):
        if b"\0" not in field:
            raise wrong(f"LUKS header {name} is not NUL terminated")
        texts.append(os.fsdecode(field.split(b"\0", 1)[0]))
    cipher_name, mode_text, hash_name = texts
    is_marked = unfinished and hash_name.startswith(UNFINISHED)
    if is_marked:
        hash_name = hash_name.removeprefix(UNFINISHED)
    slots = tuple(
        Slot(state == _ACTIVE, count, slot_salt, sector * SECTOR, stripes)
        for state, count, slot_salt, sector, stripes in _SLOT.iter_unpack(data[_HEADER.size : HEADER_BYTES])
    )
    _check_places(data, payload * SECTOR, key_bytes, iterations, slots, wrong)
    mode, separator, generator = mode_text.partition("-")
    if not separator:
        raise wrong(f"Unexpected cipher mode string format '{mode_text}'")
    ivgen, colon, ivgen_hash = generator.partition(":")
    if colon and ivgen_hash not in _HASHES:
        raise wrong(f"Hash algorithm '{ivgen_hash}' not supported")
    if mode not in MODES:
        raise wrong(f"Cipher mode '{mode}' not supported")
    cipher_bytes = key_bytes // 2 if mode == "xts" else key_bytes
    found = algorithm(cipher_name, cipher_bytes)
    if found is None or (ivgen == "essiv" and not colon):
        size = cipher_bytes if found is None else key_bytes
        raise wrong(f"Algorithm '{cipher_name}' with key size {size} bytes not supported")
    if hash_name not in _HASHES:
        raise wrong(f"Hash algorithm '{hash_name}' not supported")
    if ivgen not in IV_GENERATORS:
        raise wrong(f"IV generator '{ivgen}' not supported")
    return Luks(
        found, mode, ivgen, ivgen_hash if colon else None, hash_name, payload * SECTOR, key_bytes, digest, salt,
        iterations, os.fsdecode(uuid.split(b"\0", 1)[0]), slots, is_marked,
    )  # fmt: skip


def _check_places(
    data: bytes, payload: int, key_bytes: int, iterations: int, slots: tuple[Slot, ...],
    wrong: Callable[[str], FormatError],
) -> None:  # fmt: skip
    """Key material must lie between header and payload, without overlaps."""
    if payload < HEADER_BYTES:
        raise wrong("LUKS payload is overlapping with the header")
    if iterations == 0:
        raise wrong("LUKS key iteration count is zero")
    length = -(-key_bytes * STRIPES // SECTOR) * SECTOR
    for index, slot in enumerate(slots):
        if slot.stripes != STRIPES:
            shown = slot.stripes - (1 << 32) if slot.stripes >> 31 else slot.stripes
            raise wrong(f"Keyslot {index} is corrupted (stripes {shown} != {STRIPES})")
        if slot.offset < HEADER_BYTES:
            raise wrong(f"Keyslot {index} is overlapping with the LUKS header")
        state = int.from_bytes(data[_HEADER.size + index * _SLOT.size :][:4], "big")
        if state not in (_ACTIVE, _INACTIVE):
            raise wrong(f"Keyslot {index} state (active/disable) is corrupted")
        if slot.active and slot.iterations == 0:
            raise wrong(f"Keyslot {index} iteration count is zero")
        if slot.offset + length > payload:
            raise wrong(f"Keyslot {index} is overlapping with the encrypted payload")
        for other, second in enumerate(slots[index + 1 :], index + 1):
            if slot.offset < second.offset + length and second.offset < slot.offset + length:
                raise wrong(f"Keyslots {index} and {other} are overlapping in the header")


def slot_place(index: int) -> tuple[int, int]:
    """Where the header describes slot `index`: offset and length, of which the first word says whether it is active."""
    return _HEADER.size + index * _SLOT.size, _SLOT.size


def describe(luks: Luks, *, format: str | None = None) -> dict[str, object]:
    """The header as in qemu-img's JSON, in its order; `format` names it where it is one of several."""
    slots = [
        {"active": True, "iters": slot.iterations, "key-offset": slot.offset, "stripes": slot.stripes}
        if slot.active
        else {"active": False, "key-offset": slot.offset}
        for slot in luks.slots
    ]
    return {
        "ivgen-alg": luks.ivgen,
        "hash-alg": luks.hash,
        "cipher-alg": luks.cipher,
        "uuid": luks.uuid,
        **({"ivgen-hash-alg": luks.ivgen_hash} if luks.ivgen == "essiv" else {}),
        **({} if format is None else {"format": format}),
        "cipher-mode": luks.mode,
        "slots": slots,
        "payload-offset": luks.payload_offset,
        "master-key-iters": luks.digest_iterations,
    }


# Passwords and keys


def unlock(luks: Luks, read: Read, password: bytes, path: str) -> bytes:
    """The master key. `read` reads key material. `UsageError` in QEMU's words if the password opens no slot."""
    for index, slot in enumerate(luks.slots):
        if slot.active:
            key = open_slot(luks, index, read(slot.offset, luks.material_bytes), password, path)
            if key is not None:
                return key
    raise UsageError("Invalid password, cannot unlock any keyslot")


def open_slot(luks: Luks, index: int, material: bytes, password: bytes, path: str) -> bytes | None:
    """The master key, if the password is that of slot `index`, whose key material is given."""
    slot = luks.slots[index]
    if len(material) < luks.material_bytes:
        raise FormatError(path, "Failed to read key material")
    derived = _pbkdf2(luks.hash, password, slot.salt, slot.iterations, luks.key_bytes)
    content = bytearray(material)
    sector_cipher(luks, derived).decrypt(memoryview(content), 0)
    key = merge(luks.hash, bytes(content[: luks.key_bytes * STRIPES]), luks.key_bytes)
    return key if _digest_of(luks, key) == luks.digest else None


def sector_cipher(luks: Luks, key: bytes) -> SectorCipher:
    """What sectors are encrypted with. Raises `UnsupportedError` in QEMU's words."""
    if luks.mode == "xts" and luks.key_bytes % 2:
        raise UnsupportedError("XTS cipher key length should be a multiple of 2")
    if not supported(luks.cipher):
        raise UnsupportedError(f"Algorithm '{luks.cipher}' not supported")
    essiv = None
    if luks.ivgen == "essiv":
        assert luks.ivgen_hash is not None
        hashed = _hash(luks.ivgen_hash, key)
        name = algorithm(ALGORITHMS[luks.cipher][0], len(hashed))
        if name is None:
            shown = SHOWN[ALGORITHMS[luks.cipher][0]]
            raise UnsupportedError(f"No {shown} cipher with key size {len(hashed)} available")
        essiv = Block(name, hashed)
    if luks.mode != "xts":
        return SectorCipher(luks.mode, luks.ivgen, Block(luks.cipher, key), essiv=essiv)
    half = luks.key_bytes // 2
    tweak = Block(luks.cipher, key[half:])
    return SectorCipher("xts", luks.ivgen, Block(luks.cipher, key[:half]), tweak=tweak, essiv=essiv)


# New headers and new passwords


@dataclass(frozen=True, slots=True)
class Choice:
    """What a new disk is encrypted with."""

    cipher: str = "aes-256"
    mode: str = "xts"
    ivgen: str | None = None  # plain64 where the mode needs any
    ivgen_hash: str | None = None
    hash: str = "sha256"
    iter_time: int = DEFAULT_ITER_TIME


def choice(options: Mapping[str, str]) -> Choice:
    """From the options `cipher-alg`, `cipher-mode`, `ivgen-alg`, `ivgen-hash-alg`, `hash-alg`, `iter-time`.
    `UsageError` in QEMU's words."""
    for name, allowed in (
        ("cipher-alg", tuple(ALGORITHMS)), ("cipher-mode", MODES), ("ivgen-alg", IV_GENERATORS),
        ("ivgen-hash-alg", _HASHES), ("hash-alg", _HASHES),
    ):  # fmt: skip
        if name in options and options[name] not in allowed:
            raise UsageError(f"Parameter '{name}' does not accept value '{options[name]}'")
    return Choice(
        options.get("cipher-alg", "aes-256"), options.get("cipher-mode", "xts"), options.get("ivgen-alg"),
        options.get("ivgen-hash-alg"), options.get("hash-alg", "sha256"),
        int(options.get("iter-time", DEFAULT_ITER_TIME)),
    )  # fmt: skip


def header_bytes(wanted: Choice) -> int:
    """Where the payload of a disk that is made so begins. Raises `UnsupportedError` for what cannot be made."""
    luks = _blank(wanted)
    sector_cipher(luks, bytes(luks.key_bytes))
    return luks.payload_offset


def _key_bytes(wanted: Choice) -> int:
    return ALGORITHMS[wanted.cipher][1] * (2 if wanted.mode == "xts" else 1)


def _stride(key_bytes: int) -> int:
    """Bytes that a slot's key material takes."""
    return -(-key_bytes * STRIPES // _ALIGN) * _ALIGN


def _blank(wanted: Choice) -> Luks:
    """A new header without keys."""
    import uuid

    ivgen = wanted.ivgen or "plain64"
    ivgen_hash = wanted.ivgen_hash
    if ivgen == "essiv" and ivgen_hash is None:
        ivgen_hash = "sha256"
    key_bytes = _key_bytes(wanted)
    stride = _stride(key_bytes)
    slots = tuple(Slot(False, 0, bytes(_SALT), _ALIGN + index * stride, STRIPES) for index in range(SLOTS))
    return Luks(
        wanted.cipher, wanted.mode, ivgen, ivgen_hash, wanted.hash, _ALIGN + SLOTS * stride, key_bytes,
        bytes(_DIGEST), os.urandom(_SALT), 1, str(uuid.uuid4()), slots,
    )  # fmt: skip


def create(wanted: Choice, password: bytes, *, unfinished: bool = False) -> tuple[Luks, bytes]:
    """A new header with a new master key in slot 0, and everything up to the payload as bytes.

    Takes the processor time that `iter_time` asks for. `UsageError`, `UnsupportedError`."""
    luks = replace(_blank(wanted), unfinished=unfinished)
    key = os.urandom(luks.key_bytes)
    sector_cipher(luks, key)  # refuses what cannot be
    luks = replace(luks, digest_iterations=_iterations(luks.hash, _DIGEST, wanted.iter_time, share=8))
    luks = replace(luks, digest=_digest_of(luks, key))
    luks, material = add_key(luks, 0, key, password, wanted.iter_time)
    head = luks.pack().ljust(_ALIGN, b"\0") + material
    return luks, head.ljust(luks.payload_offset, b"\0")


def add_key(luks: Luks, index: int, key: bytes, password: bytes, iter_time: int) -> tuple[Luks, bytes]:
    """The header with slot `index` opened by `password`, and the slot's key material."""
    iterations = _iterations(luks.hash, luks.key_bytes, iter_time)
    salt = os.urandom(_SALT)
    derived = _pbkdf2(luks.hash, password, salt, iterations, luks.key_bytes)
    material = bytearray(split(luks.hash, key).ljust(luks.material_bytes, b"\0"))
    sector_cipher(luks, derived).encrypt(memoryview(material), 0)
    slot = replace(luks.slots[index], active=True, iterations=iterations, salt=salt)
    return _with_slot(luks, index, slot), bytes(material)


def without_key(luks: Luks, index: int) -> Luks:
    """The header with slot `index` inactive; its key material is to be overwritten."""
    return _with_slot(luks, index, replace(luks.slots[index], active=False, iterations=0, salt=bytes(_SALT)))


def _with_slot(luks: Luks, index: int, slot: Slot) -> Luks:
    return replace(luks, slots=(*luks.slots[:index], slot, *luks.slots[index + 1 :]))


def _hash(name: str, data: bytes) -> bytes:
    return hashlib.new(name, data, usedforsecurity=False).digest()


def _pbkdf2(name: str, password: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    return hashlib.pbkdf2_hmac(name, password, salt, iterations, length)


def _digest_of(luks: Luks, key: bytes) -> bytes:
    return _pbkdf2(luks.hash, key, luks.digest_salt, luks.digest_iterations, _DIGEST)


def _iterations(name: str, length: int, milliseconds: int, *, share: int = 1) -> int:
    """Iterations that take so much processor time, divided by `share`."""
    second = _a_second_of(name, length)
    if milliseconds and second > (1 << 64) // milliseconds - 1:
        raise UsageError(f"PBKDF iterations {second} too large to scale: Numerical result out of range")
    wanted = second * milliseconds // 1000 // share
    if wanted > _MAX_NUMBER:
        raise UsageError(f"PBKDF iterations {wanted} larger than {_MAX_NUMBER}")
    return max(wanted, MIN_ITERATIONS)


def _a_second_of(name: str, length: int) -> int:
    """How many iterations a second of processor time has."""
    count = 1 << 14
    while True:
        started = time.thread_time()
        _pbkdf2(name, b"password", bytes(_SALT), count, length)
        taken = time.thread_time() - started
        if taken > 0.05:
            return int(count / taken)
        count *= 2
