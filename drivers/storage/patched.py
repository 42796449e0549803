"""A file as it would be with some bytes changed: for looking at an image before anything is written to it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NoReturn

from safeimg.drivers.storage.api import Buffer, File, FileStat, Span


class PatchedFile:
    """Reads through to `file`, with `patches` (offset, bytes) applied in their order. Cannot be written."""

    def __init__(self, file: File, patches: Iterable[tuple[int, bytes]]) -> None:
        self._file = file
        self._pages: dict[int, bytearray] = {}
        for offset, data in patches:
            self._patch(offset, data)
        self._starts = sorted(self._pages)
        self._end = max((start + len(page) for start, page in self._pages.items()), default=0)

    PAGE = 4096

    def _patch(self, offset: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            start = (offset + done) // self.PAGE * self.PAGE
            page = self._pages.get(start)
            if page is None:
                page = bytearray(self._file.pread(start, self.PAGE))
                self._pages[start] = page
            low = offset + done - start
            size = min(self.PAGE - low, len(data) - done)
            if len(page) < low + size:
                page.extend(bytes(low + size - len(page)))
            page[low : low + size] = data[done : done + size]
            done += size

    @property
    def path(self) -> str:
        return self._file.path

    @property
    def writable(self) -> bool:
        return False

    @property
    def alignment(self) -> int:
        return self._file.alignment

    def length(self) -> int:
        return max(self._file.length(), self._end)

    def pread(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        return bytes(buffer[: self.pread_into(offset, memoryview(buffer))])

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        size = min(len(buffer), max(self.length() - offset, 0))
        got = self._file.pread_into(offset, buffer[:size])
        buffer[got:size] = bytes(size - got)
        index = max(bisect_right(self._starts, offset) - 1, 0)
        for start in self._starts[index:]:
            if start >= offset + size:
                break
            page = self._pages[start]
            low, high = max(start, offset), min(start + len(page), offset + size)
            if low < high:
                buffer[low - offset : high - offset] = page[low - start : high - start]
        return size

    def spans(self, offset: int, length: int) -> Iterator[Span]:
        end = min(offset + length, self.length())
        if offset < end:
            yield Span(offset, end - offset, True)

    def stat(self) -> FileStat:
        return self._file.stat()

    def get_attribute(self, name: str) -> bytes | None:
        return self._file.get_attribute(name)

    def pwrite(self, offset: int, data: Buffer) -> None:
        raise NotImplementedError("a patched view is only read")

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> NoReturn:
        raise NotImplementedError("a patched view is only read")

    def discard(self, offset: int, length: int) -> NoReturn:
        raise NotImplementedError("a patched view is only read")

    def preallocate(self, offset: int, length: int, *, keep_size: bool) -> NoReturn:
        raise NotImplementedError("a patched view is only read")

    def truncate(self, length: int) -> None:
        raise NotImplementedError("a patched view is only read")

    def set_attribute(self, name: str, value: bytes) -> bool:
        raise NotImplementedError("a patched view is only read")

    def remove_attribute(self, name: str) -> None:
        raise NotImplementedError("a patched view is only read")

    def sync(self) -> None:
        """Nothing to do: it is only read."""

    def sync_all(self) -> None:
        """Nothing to do: it is only read."""

    def start_writeback(self, offset: int, length: int) -> None:
        """Nothing to do: it is only read."""

    def close(self) -> None:
        """The file underneath is its owner's."""
