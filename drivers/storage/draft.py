"""A file as it would become: changes are made in memory, and taken as patches once they are decided."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from safeimg.drivers.errors import UnsupportedError
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import Buffer, File
from safeimg.drivers.storage.patched import PatchedFile

MAX_BYTES = 256 << 20  # of pages that differ from the file, or did since the last `take`
JOIN = 64  # changes that are not further apart are one


class Change(NamedTuple):
    """Bytes that differ. `before` is None where the file did not reach."""

    offset: int
    before: bytes | None
    after: bytes


class DraftFile(PatchedFile):
    """Like `file`, which is only read, and must not change meanwhile. Not thread-safe.

    Raises `UnsupportedError` when more is changed than memory should hold."""

    def __init__(self, file: File) -> None:
        super().__init__(file, ())
        self._length = self._taken_length = file.length()
        self._before: dict[int, bytes] = {}  # pages changed since `take`, as they were then

    @property
    def writable(self) -> bool:
        return True

    def length(self) -> int:
        return self._length

    def pwrite(self, offset: int, data: Buffer) -> None:
        content = bytes(data)
        for start in range(offset // self.PAGE * self.PAGE, offset + len(content), self.PAGE):
            if start not in self._before:
                self._before[start] = self.pread(start, self.PAGE)
            if start not in self._pages:
                insort(self._starts, start)
                self._pages[start] = bytearray(self._before[start])
        if (len(self._pages) + len(self._before)) * self.PAGE > MAX_BYTES:
            raise UnsupportedError(f"{self.path}: there is more to be changed than memory should hold")
        self._patch(offset, content)
        self._length = max(self._length, offset + len(content))

    def truncate(self, length: int) -> None:
        if length < self._length:
            raise NotImplementedError("a draft only grows")
        self._length = length

    def take(self) -> tuple[list[Change], int | None]:
        """The changes since the last `take`, in the order of their offsets, and the length of the file if it grew."""
        found = [change for start in sorted(self._before) for change in self._changes(start)]
        length = self._length if self._length > self._taken_length else None
        self._taken_length = self._length
        self._before = {}
        return _joined(found), length

    def _changes(self, start: int) -> Iterator[Change]:
        """Changed bytes of a page, apart where the file ended."""
        after = bytes(self._pages[start])
        before = self._before[start].ljust(len(after), b"\0")
        edge = min(max(self._taken_length - start, 0), len(after))
        for low, high in _differences(before[:edge], after[:edge]):
            yield Change(start + low, before[low:high], after[low:high])
        for low, high in _differences(before[edge:], after[edge:]):
            yield Change(start + edge + low, None, after[edge + low : edge + high])


def _differences(before: bytes, after: bytes) -> Iterator[tuple[int, int]]:
    """Where two strings of one length differ: (start, end)."""
    if before == after:
        return
    start = end = -1
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        if old == new:
            continue
        if start >= 0 and index - end <= JOIN:
            end = index + 1
            continue
        if start >= 0:
            yield start, end
        start, end = index, index + 1
    if start >= 0:
        yield start, end


def _joined(changes: list[Change]) -> list[Change]:
    """Changes that continue each other, across pages, as one."""
    joined: list[list[Change]] = []
    for change in changes:
        if joined:
            last = joined[-1][-1]
            if last.offset + len(last.after) == change.offset and (last.before is None) == (change.before is None):
                joined[-1].append(change)
                continue
        joined.append([change])
    return [
        Change(
            group[0].offset,
            None if group[0].before is None else b"".join(part.before or b"" for part in group),
            b"".join(part.after for part in group),
        )
        for group in joined
    ]
