"""A digest of guest content: of what a disk shows, however its image stores that.

BLAKE3-256 of: the virtual size, 8 bytes; then for each MiB that is not all zero, in order, its number, 8 bytes, and
the BLAKE3-256 of it (of what there is of the last one). Integers are big-endian. Zeroes cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from safeimg.drivers.formats.api import Kind
from safeimg.drivers.transfer.buffers import BufferPool
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.crew import Turns
from safeimg.drivers.transfer.view import Source
from safeimg.drivers.transfer.zero import is_zero

PIECE = 1 << 20  # bytes


async def content_digest(view: Source, transfer: Transfer, look_up: Callable[[], None] = lambda: None) -> bytes:
    """The digest, 32 bytes. `look_up` is called for each MiB: it may raise what ends this. `FormatError`,
    `StorageError`."""
    from blake3 import blake3

    whole = blake3(view.size.to_bytes(8, "big"))
    turns = Turns()

    def add(piece: tuple[int, int], buffers: BufferPool) -> None:
        ticket, number = piece
        look_up()
        start = number * PIECE
        buffer = buffers.get(min(PIECE, view.size - start))
        view.read_into(start, buffer)
        digest = b"" if is_zero(buffer) else number.to_bytes(8, "big") + blake3(buffer).digest()
        with turns.turn(ticket):
            whole.update(digest)

    await transfer.each(enumerate(_pieces(view)), add, cost=lambda piece: PIECE, turns=turns)
    return whole.digest()


def _pieces(view: Source) -> Iterator[int]:
    """The numbers of those that may not be all zero."""
    after = 0
    for _, extent in view.extents(0, view.size):
        if extent.kind is not Kind.ZERO:
            first = max(after, extent.start // PIECE)
            after = -(-(extent.start + extent.length) // PIECE)
            yield from range(first, after)
