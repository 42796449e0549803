"""Where guest data is written: a file, and what it is encrypted with there."""

from __future__ import annotations

from safeimg.drivers.formats.api import Cipher
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import File
from safeimg.drivers.transfer.buffers import BufferPool
from safeimg.drivers.transfer.zero import fill_zero, zeroes

CHUNK = 1 << 20  # bytes of zeroes that are encrypted at once


class Target(NamedTuple):
    """A file that holds guest data. Offsets are the file's; `guest` is the guest offset of the same byte.

    With a cipher, all of them and the lengths are multiples of 512."""

    file: File
    cipher: Cipher | None = None

    def write(self, content: memoryview, offset: int, guest: int) -> None:
        """Writes guest data. `content` holds what is on disk afterwards: it is encrypted in place."""
        if self.cipher is not None:
            self.cipher.encrypt(content, offset, guest)
        self.file.pwrite(offset, content)

    def zero(self, offset: int, length: int, guest: int, buffers: BufferPool) -> None:
        """Writes `length` bytes that a guest reads as zeroes."""
        done = 0
        while done < length:
            size = min(length - done, CHUNK)
            if self.cipher is None:
                piece = zeroes(size)
            else:
                piece = buffers.get(size, slot=3)
                fill_zero(piece)
            self.write(piece, offset + done, guest + done)
            done += size
