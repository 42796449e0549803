"""Sparse bytes in memory: the content of a simulated file. Pages of 4 KiB; what is not there is a hole.

Cloning is copy-on-write, so thousands of crash states of one image share its pages. There is no end of file
here: everything that was never written reads as zeroes, and the owner keeps the length.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator

PAGE = 4096
_ZERO_PAGE = bytes(PAGE)

Runs = tuple[tuple[int, int], ...]  # half-open, sorted, disjoint


def _with_run(runs: Runs, first: int, last: int) -> Runs:
    merged: list[tuple[int, int]] = []
    for start, end in runs:
        if end < first or start > last:
            merged.append((start, end))
        else:
            first, last = min(first, start), max(last, end)
    merged.append((first, last))
    return tuple(sorted(merged))


def _without_run(runs: Runs, first: int, last: int) -> Runs:
    rest: list[tuple[int, int]] = []
    for start, end in runs:
        if start < first:
            rest.append((start, min(end, first)))
        if end > last:
            rest.append((max(start, last), end))
    return tuple(run for run in rest if run[0] < run[1])


@functools.lru_cache(1 << 16)
def _digest(page: bytes) -> bytes:
    return hashlib.blake2b(page, digest_size=16).digest()


class SparseBytes:
    """Bytes at offsets, with holes. Not thread-safe."""

    __slots__ = ("_digest", "_pages", "_reserved", "_shared")

    def __init__(self) -> None:
        self._pages: dict[int, bytes] = {}
        self._reserved: Runs = ()  # pages that occupy space though they may hold nothing (fallocate)
        self._shared = False  # the dictionary belongs to a clone too: copy it before changing it
        self._digest: bytes | None = None  # of the pages, if known

    def clone(self) -> SparseBytes:
        other = SparseBytes.__new__(SparseBytes)
        other._pages = self._pages
        other._reserved = self._reserved
        other._shared = self._shared = True
        other._digest = self._digest
        return other

    def _own(self) -> dict[int, bytes]:
        if self._shared:
            self._pages = dict(self._pages)
            self._shared = False
        self._digest = None
        return self._pages

    def __eq__(self, other: object) -> bool:
        """Same bytes and the same space occupied."""
        if not isinstance(other, SparseBytes):
            return NotImplemented
        return self._pages == other._pages and self._reserved == other._reserved

    __hash__ = None  # type: ignore[assignment]

    def digest(self) -> bytes:
        """Of the bytes and of where the holes are; the same in every process. Cheap where little has changed."""
        if self._digest is None:
            hasher = hashlib.blake2b(digest_size=16)
            for number in sorted(self._pages):
                hasher.update(number.to_bytes(8, "little") + _digest(self._pages[number]))
            self._digest = hasher.digest()
        return self._digest

    def read(self, offset: int, length: int) -> bytes:
        if length <= 0:
            return b""
        first, skip = divmod(offset, PAGE)
        last = (offset + length - 1) // PAGE
        get = self._pages.get
        if first == last:
            return get(first, _ZERO_PAGE)[skip : skip + length]
        if not self._pages:
            return bytes(length)
        whole = b"".join([get(page, _ZERO_PAGE) for page in range(first, last + 1)])
        return whole if len(whole) == length else whole[skip : skip + length]

    def write(self, offset: int, data: bytes) -> None:
        pages = self._own()
        position, length = 0, len(data)
        page, skip = divmod(offset, PAGE)
        if skip or length < PAGE:
            part = data[: PAGE - skip]
            old = pages.get(page, _ZERO_PAGE)
            pages[page] = b"".join((old[:skip], part, old[skip + len(part) :]))
            position, page = len(part), page + 1
        while length - position >= PAGE:
            pages[page] = data[position : position + PAGE]
            position, page = position + PAGE, page + 1
        if position < length:
            pages[page] = data[position:] + pages.get(page, _ZERO_PAGE)[length - position :]

    def erase(self, offset: int, length: int) -> None:
        """Makes the range read as zeroes. Whole pages become holes; what is reserved stays reserved."""
        if length <= 0:
            return
        end = offset + length
        pages = self._own()
        for page in self._present(-(-offset // PAGE), end // PAGE):
            del pages[page]
        for page in {offset // PAGE, (end - 1) // PAGE}:
            old = pages.get(page)
            if old is not None:
                start, stop = max(offset - page * PAGE, 0), min(end - page * PAGE, PAGE)
                pages[page] = b"".join((old[:start], bytes(stop - start), old[stop:]))

    def punch(self, offset: int, length: int) -> None:
        """Like `erase`, and the whole pages give their space back."""
        self.erase(offset, length)
        first, last = -(-offset // PAGE), (offset + length) // PAGE
        if first < last and self._reserved:
            self._reserved = _without_run(self._reserved, first, last)

    def reserve(self, offset: int, length: int) -> None:
        if length:
            self._reserved = _with_run(self._reserved, offset // PAGE, -(-(offset + length) // PAGE))

    def cut(self, length: int) -> None:
        """Forgets everything at and after `length`, reserved space included."""
        end = self.end()
        if end > length:
            self.punch(length, end - length)

    def end(self) -> int:
        """Nothing is stored or reserved at or after this offset (a multiple of the page size)."""
        pages = max(self._pages, default=-1) + 1
        return max(pages, self._reserved[-1][1] if self._reserved else 0) * PAGE

    def has_page(self, offset: int) -> bool:
        return offset // PAGE in self._pages

    def _present(self, first: int, last: int) -> list[int]:
        if last - first > len(self._pages):
            return sorted(page for page in self._pages if first <= page < last)
        return [page for page in range(first, last) if page in self._pages]

    def data_runs(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts of a range that hold data (start, end), in order, in whole pages clipped to the range."""
        start = stop = -1
        for page in self._present(offset // PAGE, -(-end // PAGE)):
            if page != stop:
                if start >= 0:
                    yield max(start * PAGE, offset), stop * PAGE
                start = page
            stop = page + 1
        if start >= 0:
            yield max(start * PAGE, offset), min(stop * PAGE, end)

    def allocated(self) -> int:
        """Bytes of space occupied."""
        pages = len(self._pages)
        for first, last in self._reserved:
            pages += last - first - len(self._present(first, last))
        return pages * PAGE

    def growth(self, offset: int, length: int) -> int:
        """Bytes of space that writing the range would newly occupy."""
        if length <= 0:
            return 0
        first, last = offset // PAGE, -(-(offset + length) // PAGE)
        missing = last - first - len(self._present(first, last))
        for start, end in self._reserved:
            start, end = max(start, first), min(end, last)
            if start < end:
                missing -= end - start - len(self._present(start, end))
        return missing * PAGE
