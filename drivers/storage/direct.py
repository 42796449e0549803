"""Positional I/O past the page cache.

O_DIRECT moves whole blocks between the disk and memory at block-aligned addresses. A request is cut so:

              block             block             block             block
    ├──────────┼─────────────────┼─────────────────┼──────────┼──────────┤
               :   head ┌────────╫─────────────────╫──────┐ tail
                        │buffered║     O_DIRECT    ║ buff.│

The ends go through a second, buffered descriptor: no read-modify-write that could take back what another
thread writes next to it, and no file made longer than asked for. The kernel keeps both views of a file
coherent as long as no page is written both ways at once, so a block is never smaller here than a page.
"""

from __future__ import annotations

import errno
import mmap
import os

from safeimg.drivers.storage.buffered import BufferedIO

PAGE = mmap.PAGESIZE
_BOUNCE = 1 << 20
_LARGEST_BLOCK = 1 << 16


class DirectIO:
    """Past the page cache. `fd` was opened with O_DIRECT, `buffered` is the same file without."""

    def __init__(self, fd: int, buffered: int) -> None:
        self._fd = fd
        self._buffered = BufferedIO(buffered)
        self._spare: list[mmap.mmap] = []  # page-aligned bounce buffers, one for each thread at work
        self.alignment = self._probe()

    def _probe(self) -> int:
        """The smallest block that a read accepts. An empty file may accept anything: then the page size is a
        guess, and a refused request goes through the buffered descriptor."""
        with mmap.mmap(-1, _LARGEST_BLOCK) as memory, memoryview(memory) as view:
            block = PAGE
            while block < _LARGEST_BLOCK:
                try:
                    os.preadv(self._fd, [view[:block]], block)
                    return block
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        return PAGE
                block *= 2
        return block

    def read_into(self, offset: int, view: memoryview) -> int:
        if (offset | len(view)) % self.alignment == 0:
            try:
                return self._read_aligned(offset, view)
            except OSError as error:
                if error.errno != errno.EINVAL:  # the buffer's address is not aligned
                    raise
        return self._read_bounced(offset, view)

    def _read_aligned(self, offset: int, view: memoryview) -> int:
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            done += count
            if count == 0 or done % self.alignment:  # only the end of the file cuts a block
                break
        return done

    def _read_bounced(self, offset: int, view: memoryview) -> int:
        memory = self._borrow()
        try:
            with memoryview(memory) as bounce:
                done = 0
                while done < len(view):
                    skip = (offset + done) % self.alignment
                    start = offset + done - skip
                    need = -(-(skip + len(view) - done) // self.alignment) * self.alignment
                    want = min(need, _BOUNCE)
                    try:
                        count = self._read_aligned(start, bounce[:want])
                    except OSError as error:
                        if error.errno != errno.EINVAL:
                            raise
                        return done + self._buffered.read_into(offset + done, view[done:])
                    size = min(max(count - skip, 0), len(view) - done)
                    view[done : done + size] = bounce[skip : skip + size]
                    done += size
                    if count < want:
                        break
                return done
        finally:
            self._spare.append(memory)

    def write(self, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        first = min(end, -(-offset // self.alignment) * self.alignment)
        last = max(first, end // self.alignment * self.alignment)
        if offset < first:
            self._buffered.write(offset, view[: first - offset])
        if first < last:
            self._write_aligned(first, view[first - offset : last - offset])
        if last < end:
            self._buffered.write(last, view[last - offset :])

    def _write_aligned(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view) and done % self.alignment == 0:
            try:
                count = os.pwrite(self._fd, view[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._write_bounced(offset + done, view[done:])
                return
            if count == 0:
                raise OSError(errno.EIO, "nothing written")
            done += count
        # A disk that filled up can cut a block; the buffered descriptor then gets to say so.
        self._buffered.write(offset + done, view[done:])

    def _write_bounced(self, offset: int, view: memoryview) -> None:
        memory = self._borrow()
        try:
            with memoryview(memory) as bounce:
                done = 0
                while done < len(view):
                    size = min(len(view) - done, _BOUNCE)
                    bounce[:size] = view[done : done + size]
                    try:
                        count = os.pwrite(self._fd, bounce[:size], offset + done)
                    except OSError as error:
                        if error.errno != errno.EINVAL:
                            raise
                        count = 0
                    if count % self.alignment or count == 0:
                        self._buffered.write(offset + done + count, view[done + count :])
                        return
                    done += count
        finally:
            self._spare.append(memory)

    def _borrow(self) -> mmap.mmap:
        try:
            return self._spare.pop()
        except IndexError:
            return mmap.mmap(-1, _BOUNCE)
