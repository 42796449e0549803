"""Twofish, many blocks at once (Schneier, Kelsey, Whiting, Wagner, Hall, Ferguson: "Twofish: A 128-Bit Block Cipher").

A block is four words; each step of the cipher is done on the same word of all blocks. The S-boxes depend on the key:
they are worked out once, as tables of words that include the multiplication with the MDS matrix.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Words = NDArray[np.uint32]

BLOCK = 16
ROUNDS = 16

# The permutations q0 and q1, as four tables of four bits each
_NIBBLES = (
    ("817d6f320b59eca4", "ecb81235f4a6709d", "ba5e6d90c8f32471", "d7f4126e9b3085ca"),
    ("28bdf76e31940ac5", "1e2b4c376da5f908", "4c75169a0ed82b3f", "b951c3de647f208a"),
)
_MDS = ((0x01, 0xEF, 0x5B, 0x5B), (0x5B, 0xEF, 0xEF, 0x01), (0xEF, 0x5B, 0x01, 0xEF), (0xEF, 0x01, 0xEF, 0x5B))
_RS = (
    (0x01, 0xA4, 0x55, 0x87, 0x5A, 0x58, 0xDB, 0x9E), (0xA4, 0x56, 0x82, 0xF3, 0x1E, 0xC6, 0x68, 0xE5),
    (0x02, 0xA1, 0xFC, 0xC1, 0x47, 0xAE, 0x3D, 0x19), (0xA4, 0x55, 0x87, 0x5A, 0x58, 0xDB, 0x9E, 0x03),
)  # fmt: skip
_MDS_POLYNOMIAL, _RS_POLYNOMIAL = 0x169, 0x14D
# For each byte of a word, which permutation it goes through: at first, and after each mixing of key bytes; of keys of
# 32, 24 and 16 bytes the first two, one and none are left out.
_ORDER = ((1, 1, 0, 0, 1), (0, 1, 1, 0, 0), (0, 0, 0, 1, 1), (1, 0, 1, 1, 0))
_RHO = 0x01010101
_MASK = (1 << 32) - 1


class Twofish:
    """With its key, of 16, 24 or 32 bytes."""

    def __init__(self, key: bytes) -> None:
        import numpy as np

        even = [key[at : at + 4] for at in range(0, len(key), 8)]
        odd = [key[at : at + 4] for at in range(4, len(key), 8)]
        seeds = [
            bytes(_times(row, key[at : at + 8], _RS_POLYNOMIAL) for row in _RS) for at in range(0, len(key), 8)
        ]
        self._keys: list[int] = []
        for index in range(0, 2 * ROUNDS + 8, 2):
            a = _h(index * _RHO, even)
            b = _rotated(_h((index + 1) * _RHO, odd), 8)
            self._keys += [(a + b) & _MASK, _rotated((a + 2 * b) & _MASK, 9)]
        self._boxes = [
            np.array([_column(place, value, seeds[::-1]) for value in range(256)], np.uint32) for place in range(4)
        ]

    def encrypt(self, source: Any, target: Any) -> None:
        """Whole blocks of `source` into `target`, which is at least as long."""
        a, b, c, d = _words(source, self._keys[:4])
        for number in range(ROUNDS):
            first, second = self._mixed(a, b, number)
            a, b, c, d = _right(c ^ first), _left(d) ^ second, a, b
        _put(target, (c, d, a, b), self._keys[4:8])

    def decrypt(self, source: Any, target: Any) -> None:
        c, d, a, b = _words(source, self._keys[4:8])
        for number in reversed(range(ROUNDS)):
            first, second = self._mixed(c, d, number)
            a, b, c, d = c, d, _left(a) ^ first, _right(b ^ second)
        _put(target, (a, b, c, d), self._keys[:4])

    def _mixed(self, a: Words, b: Words, number: int) -> tuple[Words, Words]:
        """What a round adds to the other half."""
        import numpy as np

        first, second = self._g(a, 0), self._g(b, 1)
        low, high = (np.uint32(self._keys[8 + 2 * number + index]) for index in range(2))
        total = first + second
        return total + low, total + second + high

    def _g(self, word: Words, turned: int) -> Words:
        """`turned`: the word is one rotated to the left by so many bytes."""
        import numpy as np

        places = word.view(np.uint8).reshape(-1, 4)
        found: Words = self._boxes[turned][places[:, 0]]
        for index in range(1, 4):
            found ^= self._boxes[(index + turned) % 4][places[:, index]]
        return found


def _words(source: Any, key: list[int]) -> list[Words]:
    """The blocks' words, whitened."""
    import numpy as np

    blocks = np.frombuffer(source, "<u4").reshape(-1, 4)
    return [blocks[:, index].astype("<u4") ^ np.uint32(part) for index, part in enumerate(key)]


def _put(target: Any, words: tuple[Words, ...], key: list[int]) -> None:
    import numpy as np

    found = np.frombuffer(target, "<u4")[: 4 * len(words[0])].reshape(-1, 4)
    for index, (word, part) in enumerate(zip(words, key, strict=True)):
        found[:, index] = word ^ np.uint32(part)


def _left(word: Words) -> Words:
    """Rotated by a bit."""
    import numpy as np

    return word << np.uint32(1) | word >> np.uint32(31)


def _right(word: Words) -> Words:
    import numpy as np

    return word >> np.uint32(1) | word << np.uint32(31)


def _h(word: int, key: list[bytes]) -> int:
    """The function h of the specification; `key`: its words, least significant byte first."""
    found = 0
    for place in range(4):
        found ^= _column(place, word >> 8 * place & 0xFF, key)
    return found


def _column(place: int, value: int, key: list[bytes]) -> int:
    """What a byte at a place of a word becomes: its permutations, and a column of the MDS matrix."""
    order = _ORDER[place]
    value = _permutation(order[4 - len(key)])[value]
    for number, word in enumerate(reversed(key)):
        value = _permutation(order[5 - len(key) + number])[value ^ word[place]]
    return sum(_product(row[place], value, _MDS_POLYNOMIAL) << 8 * index for index, row in enumerate(_MDS))


@cache
def _permutation(which: int) -> bytes:
    """q0 or q1."""
    one, two, three, four = ([int(digit, 16) for digit in table] for table in _NIBBLES[which])
    found = []
    for value in range(256):
        a, b = value >> 4, value & 15
        a, b = a ^ b, (a ^ (b >> 1 | b << 3) ^ 8 * a) & 15
        a, b = one[a], two[b]
        a, b = a ^ b, (a ^ (b >> 1 | b << 3) ^ 8 * a) & 15
        found.append(four[b] << 4 | three[a])
    return bytes(found)


def _times(row: tuple[int, ...], column: bytes, polynomial: int) -> int:
    found = 0
    for first, second in zip(row, column, strict=True):
        found ^= _product(first, second, polynomial)
    return found


@cache
def _product(first: int, second: int, polynomial: int) -> int:
    """In GF(2^8)."""
    found = 0
    while second:
        if second & 1:
            found ^= first
        first <<= 1
        if first & 0x100:
            first ^= polynomial
        second >>= 1
    return found


def _rotated(word: int, bits: int) -> int:
    return (word << bits | word >> 32 - bits) & _MASK
