"""Digests of guest data: what a step wrote is recognised by BLAKE3-256 of each started 64 KiB."""

from __future__ import annotations

from functools import lru_cache

from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import Buffer

BLOCK = 64 * 1024  # bytes each digest covers; the last one of a range covers what is left
SIZE = 32  # bytes of one digest


class Written(NamedTuple):
    """Guest data that now lies in space which nobody references yet, or in its final place where nobody needs what
    was there."""

    image: int  # as steps number them: 0 is the home image
    offset: int
    length: int
    digests: bytes  # BLAKE3-256 of each started 64 KiB, joined; empty if none were made
    live: bool = False  # the image's metadata refers to the space already


def digests(buffer: Buffer) -> bytes:
    """The digests of `buffer`'s started 64 KiB, joined: 32 bytes each. Releases the interpreter lock."""
    from blake3 import blake3

    view = memoryview(buffer)
    if len(view) <= BLOCK:
        return blake3(view).digest() if len(view) else b""
    return b"".join(blake3(view[at : at + BLOCK]).digest() for at in range(0, len(view), BLOCK))


def zero_digests(length: int) -> bytes:
    """`digests` of `length` zero bytes, without hashing them."""
    whole, rest = divmod(length, BLOCK)
    return _zeroes(BLOCK) * whole + (_zeroes(rest) if rest else b"")


@lru_cache(maxsize=64)
def _zeroes(length: int) -> bytes:
    return digests(bytes(length))
