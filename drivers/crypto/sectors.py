"""Encrypts and decrypts sectors of 512 bytes: ECB, CBC, CTR and XTS with the IV generators of LUKS and qcow2.

A sector is too little for a call of its own, so a run of them is done at once: the block cipher sees one long ECB
message, and everything that chains or tweaks blocks is arithmetic on arrays around it. In XTS (IEEE 1619) block j of
a sector is E(P ^ T·x^j) ^ T·x^j, where T is the encrypted IV and x^j a multiplication in GF(2^128); all sectors' tweaks
are multiplied at once. In CBC, decryption is one message too; encryption goes block by block, all sectors abreast.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from safeimg.drivers.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

SECTOR = 512
AT_ONCE = 1024  # sectors: what is worked on fits into a processor's cache
XTS_BLOCKS = SECTOR // 16

MODES = ("ecb", "cbc", "xts", "ctr")
IV_GENERATORS = ("plain", "plain64", "essiv")

Ecb = Callable[[Any, Any], None]  # (source, target): blocks of the source, encrypted or decrypted, into the target


class BlockCipher(Protocol):
    """A block cipher with its key."""

    @property
    def block(self) -> int:
        """Bytes: 8 or 16."""
        ...

    def encryptor(self) -> Ecb: ...
    def decryptor(self) -> Ecb: ...


class SectorCipher:
    """A mode of operation with its IVs. May be used by several threads at once.

    `cipher`: for the data. `tweak`: XTS's second key. `essiv`: what makes IVs of sector numbers, for that generator."""

    def __init__(self, mode: str, ivgen: str, cipher: BlockCipher, *, tweak: BlockCipher | None = None,
                 essiv: BlockCipher | None = None) -> None:
        if mode not in MODES or (mode == "xts" and tweak is None) or (ivgen == "essiv" and essiv is None):
            raise ValueError("not a way to encrypt sectors")
        if mode in ("xts", "ctr") and cipher.block != 16:
            raise UnsupportedError(f"Unsupported cipher mode {mode}")
        self._mode = mode
        self._ivgen = ivgen
        self._cipher = cipher
        self._tweak = tweak
        self._essiv = essiv
        self._local = threading.local()

    def encrypt(self, buffer: memoryview, sector: int) -> None:
        """Encrypts `buffer`, whole sectors of which the first has number `sector`, in place."""
        self._work(buffer, sector, encrypt=True)

    def decrypt(self, buffer: memoryview, sector: int) -> None:
        self._work(buffer, sector, encrypt=False)

    def _work(self, buffer: memoryview, sector: int, *, encrypt: bool) -> None:
        import numpy as np

        if len(buffer) % SECTOR:
            raise ValueError(f"{len(buffer)} bytes are no whole sectors")
        worker: _Worker | None = getattr(self._local, "worker", None)
        if worker is None:
            worker = self._local.worker = _Worker(self._cipher, self._tweak, self._essiv)
        words = np.frombuffer(buffer, np.uint64)
        run = getattr(worker, self._mode)
        per = SECTOR // 8
        for first in range(0, len(words) // per, AT_ONCE):
            part = words[first * per : (first + AT_ONCE) * per]
            count = len(part) // per
            numbers = np.arange(sector + first, sector + first + count, dtype=np.uint64)
            if self._ivgen == "plain":
                numbers &= np.uint64(0xFFFF_FFFF)
            run(part, count, numbers, encrypt)


class _Worker:
    """One thread's contexts and scratch memory: contexts of OpenSSL are not to be shared."""

    def __init__(self, cipher: BlockCipher, tweak: BlockCipher | None, essiv: BlockCipher | None) -> None:
        import numpy as np

        self._np = np
        self._block = cipher.block
        self._encryptor, self._decryptor = cipher.encryptor(), cipher.decryptor()
        self._tweaked = None if tweak is None else tweak.encryptor()
        self._essiv = None if essiv is None else essiv.encryptor()
        size = AT_ONCE * SECTOR
        self._source, self._target = bytearray(size), bytearray(size + 32)
        self._in = np.frombuffer(self._source, np.uint64)
        self._out = np.frombuffer(self._target, np.uint64)

    def _ecb(self, words: int, encrypt: bool) -> Words:
        """The first `words` words of the source through the block cipher; they are the target's afterwards."""
        length = 8 * words
        run = self._encryptor if encrypt else self._decryptor
        run(memoryview(self._source)[:length], self._target)
        found: Words = self._out[:words]
        return found

    def _ivs(self, numbers: Words) -> Words:
        """The IVs of sectors, a row of words each: the number, little-endian, and zeroes; encrypted for ESSIV."""
        np = self._np
        width = self._block // 8
        ivs: Words = np.zeros((len(numbers), width), np.uint64)
        ivs[:, 0] = numbers.astype("<u8", copy=False).view(np.uint64)
        if self._essiv is not None:
            ivs = _through(np, self._essiv, ivs)
        return ivs

    def ecb(self, data: Words, count: int, numbers: Words, encrypt: bool) -> None:
        self._in[: len(data)] = data
        data[:] = self._ecb(len(data), encrypt)

    def ctr(self, data: Words, count: int, numbers: Words, encrypt: bool) -> None:
        """The IV of a sector is its first counter, a big-endian number."""
        np = self._np
        ivs = self._ivs(numbers).view(">u8").astype(np.uint64)
        blocks = self._in[: len(data)].reshape(count, -1, 2)
        low = ivs[:, 1:] + np.arange(blocks.shape[1], dtype=np.uint64)
        high = ivs[:, :1] + (low < ivs[:, 1:])
        blocks[:, :, 0] = high.astype(">u8").view(np.uint64)
        blocks[:, :, 1] = low.astype(">u8").view(np.uint64)
        data ^= self._ecb(len(data), True)

    def cbc(self, data: Words, count: int, numbers: Words, encrypt: bool) -> None:
        np = self._np
        width = self._block // 8
        sectors = data.reshape(count, -1, width)
        ivs = self._ivs(numbers)
        if not encrypt:
            self._in[: len(data)] = data
            plain = self._ecb(len(data), False).reshape(sectors.shape)
            cipher = self._in[: len(data)].reshape(sectors.shape)
            np.bitwise_xor(plain[:, 1:], cipher[:, :-1], out=sectors[:, 1:])
            np.bitwise_xor(plain[:, 0], ivs, out=sectors[:, 0])
            return
        row = self._in[: count * width].reshape(count, width)
        before = ivs
        for block in range(sectors.shape[1]):
            np.bitwise_xor(sectors[:, block], before, out=row)
            sectors[:, block] = before = self._ecb(count * width, True).reshape(count, width)

    def xts(self, data: Words, count: int, numbers: Words, encrypt: bool) -> None:
        np = self._np
        assert self._tweaked is not None
        tweaks = self._tweaks(_through(np, self._tweaked, self._ivs(numbers)))
        np.bitwise_xor(data, tweaks, out=self._in[: len(data)])
        np.bitwise_xor(self._ecb(len(data), encrypt), tweaks, out=data)

    def _tweaks(self, first: Words) -> Words:
        """Of each sector's first tweak (a row of two little-endian words), those of all its blocks."""
        np = self._np
        count = len(first)
        tweaks = np.empty((count, XTS_BLOCKS, 2), np.uint64)
        low, high = first[:, 0].astype(np.uint64), first[:, 1].astype(np.uint64)
        one, top, poly = np.uint64(1), np.uint64(63), np.uint64(0x87)
        for block in range(XTS_BLOCKS):
            tweaks[:, block, 0] = low
            tweaks[:, block, 1] = high
            carry = high >> top
            high = high << one | low >> top
            low = low << one ^ carry * poly
        found: Words = tweaks.reshape(-1)
        return found


def _through(np: Any, run: Ecb, blocks: Words) -> Words:
    """Blocks, a row each, through a block cipher."""
    target = bytearray(blocks.nbytes + 32)
    run(blocks.tobytes(), target)
    found: Words = np.frombuffer(target, np.uint64)[: blocks.size].reshape(blocks.shape)
    return found
