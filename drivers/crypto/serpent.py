"""Serpent, many blocks at once (Anderson, Biham, Knudsen: "Serpent: A Proposal for the Advanced Encryption Standard").

A block is four words; each step of the cipher is done on the same word of all blocks. The S-boxes take four bits, one
of each word: they are evaluated as polynomials over GF(2) (sums of products of these words), which are worked out from
their tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, reduce
from operator import xor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Words = NDArray[np.uint32]

BLOCK = 16
ROUNDS = 32

_BOXES = (
    (3, 8, 15, 1, 10, 6, 5, 11, 14, 13, 4, 2, 7, 0, 9, 12),
    (15, 12, 2, 7, 9, 0, 5, 10, 1, 11, 14, 8, 6, 13, 3, 4),
    (8, 6, 7, 9, 3, 12, 10, 15, 13, 1, 14, 4, 0, 11, 5, 2),
    (0, 15, 11, 8, 12, 9, 6, 3, 13, 1, 2, 4, 10, 7, 5, 14),
    (1, 15, 8, 3, 12, 0, 11, 6, 2, 5, 4, 10, 9, 14, 7, 13),
    (15, 5, 2, 11, 4, 10, 9, 12, 0, 3, 14, 8, 13, 6, 7, 1),
    (7, 2, 12, 5, 8, 4, 6, 11, 14, 9, 1, 15, 13, 3, 10, 0),
    (1, 13, 15, 0, 14, 8, 2, 11, 7, 4, 12, 10, 9, 3, 5, 6),
)
_INVERSE = tuple(tuple(box.index(value) for value in range(16)) for box in _BOXES)
_GOLDEN = 0x9E3779B9
_MASK = (1 << 32) - 1


class Serpent:
    """With its key, of 16, 24 or 32 bytes."""

    def __init__(self, key: bytes) -> None:
        self._keys = _schedule(key)

    def encrypt(self, source: Any, target: Any) -> None:
        """Whole blocks of `source` into `target`, which is at least as long."""
        _run(source, target, self._encrypt)

    def decrypt(self, source: Any, target: Any) -> None:
        _run(source, target, self._decrypt)

    def _encrypt(self, words: list[Words]) -> list[Words]:
        for number in range(ROUNDS):
            words = _box(_BOXES[number % 8], _mixed(words, self._keys[number]))
            if number < ROUNDS - 1:
                _spread(words)
        return _mixed(words, self._keys[ROUNDS])

    def _decrypt(self, words: list[Words]) -> list[Words]:
        words = _mixed(words, self._keys[ROUNDS])
        for number in reversed(range(ROUNDS)):
            if number < ROUNDS - 1:
                _gather(words)
            words = _mixed(_box(_INVERSE[number % 8], words), self._keys[number])
        return words


def _run(source: Any, target: Any, work: Callable[[list[Words]], list[Words]]) -> None:
    import numpy as np

    blocks = np.frombuffer(source, "<u4").reshape(-1, 4)
    words = work([blocks[:, index].astype(np.uint32) for index in range(4)])
    found = np.frombuffer(target, "<u4")[: blocks.size].reshape(-1, 4)
    for index, word in enumerate(words):
        found[:, index] = word


def _mixed(words: Sequence[Words], key: Sequence[int]) -> list[Words]:
    import numpy as np

    return [word ^ np.uint32(part) for word, part in zip(words, key, strict=True)]


def _spread(words: list[Words]) -> None:
    """The linear transformation, in place."""
    a, b, c, d = words
    a = _left(a, 13)
    c = _left(c, 3)
    b = _left(b ^ a ^ c, 1)
    d = _left(d ^ c ^ _shifted(a, 3), 7)
    a = _left(a ^ b ^ d, 5)
    c = _left(c ^ d ^ _shifted(b, 7), 22)
    words[:] = a, b, c, d


def _gather(words: list[Words]) -> None:
    """Its inverse."""
    a, b, c, d = words
    c = _left(c, 10) ^ d ^ _shifted(b, 7)
    a = _left(a, 27) ^ b ^ d
    d = _left(d, 25) ^ c ^ _shifted(a, 3)
    b = _left(b, 31) ^ a ^ c
    words[:] = _left(a, 19), b, _left(c, 29), d


def _shifted(word: Words, bits: int) -> Words:
    import numpy as np

    return word << np.uint32(bits)


def _left(word: Words, bits: int) -> Words:
    """Rotated."""
    import numpy as np

    return word << np.uint32(bits) | word >> np.uint32(32 - bits)


def _box(box: tuple[int, ...], words: Sequence[Words]) -> list[Words]:
    """The S-box on bit n of the four words, for each n."""
    import numpy as np

    constant, *terms = _polynomials(box)
    products = {1 << index: word for index, word in enumerate(words)}
    found: list[Words] = []
    for bit in range(4):
        total = np.full_like(words[0], _MASK if constant >> bit & 1 else 0)
        for term, wanted in enumerate(terms, 1):
            if wanted >> bit & 1:
                if term not in products:
                    products[term] = reduce(
                        np.bitwise_and, [words[index] for index in range(4) if term >> index & 1]
                    )
                total ^= products[term]
        found.append(total)
    return found


@cache
def _polynomials(box: tuple[int, ...]) -> tuple[int, ...]:
    """For each product of inputs (a set of them, as bits), the outputs that it is a term of, as bits."""
    return tuple(reduce(xor, (box[part] for part in range(16) if part & term == part)) for term in range(16))


def _schedule(key: bytes) -> list[list[int]]:
    """The subkeys of the 33 mixings, four words each."""
    import numpy as np

    padded = key if len(key) == 32 else (key + b"\1").ljust(32, b"\0")
    words = [int.from_bytes(padded[at : at + 4], "little") for at in range(0, 32, 4)]
    for index in range(4 * (ROUNDS + 1)):
        mixed = words[-8] ^ words[-5] ^ words[-3] ^ words[-1] ^ _GOLDEN ^ index
        words.append((mixed << 11 | mixed >> 21) & _MASK)
    keys = []
    for number in range(ROUNDS + 1):
        part = [np.array([word], np.uint32) for word in words[8 + 4 * number : 12 + 4 * number]]
        keys.append([int(word[0]) for word in _box(_BOXES[(3 - number) % 8], part)])
    return keys
