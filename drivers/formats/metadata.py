"""A buffered view of an image's metadata: what it holds once every step planned so far is applied.

The planner reads and changes tables here, and `take` turns the changes into the fewest patches. Nothing is
ever written to the file: that is the engine's part, at a time of its own choosing. Offsets and lengths are
bytes. """

from __future__ import annotations

from collections import OrderedDict
from enum import Enum

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Patch
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import File

PAGE_BYTES = 4096  # or a cluster, where that is smaller: a page never holds two structures
CLEAN_BYTES = 8 << 20  # pages kept only because they may be read again
TAKEN_BYTES = 8 << 20  # pages that differ from the file as far as we know; see `_forget_written`


class Phase(Enum):
    """When a change is written (see `api.Changes`)."""

    ALLOCATE = "allocate"
    LINK = "link"


class Patches(NamedTuple):
    allocate: tuple[Patch, ...]
    link: tuple[Patch, ...]


class _Page:
    """A page that the step under way changes."""

    __slots__ = ("before", "blank", "data", "phase", "spans")

    def __init__(
        self, before: bytes | None, data: bytearray, phase: Phase, *, blank: bool = False
    ) -> None:
        self.before = before  # None: nobody refers to it yet
        self.blank = blank  # zeroes are there already
        self.data = data
        self.phase = phase
        self.spans: list[tuple[int, int]] = []  # changed ranges (start, end), not normalised

    def note(self, start: int, end: int) -> None:
        if self.spans:
            last_start, last_end = self.spans[-1]
            if start <= last_end and end >= last_start:
                self.spans[-1] = (min(start, last_start), max(end, last_end))
                return
        self.spans.append((start, end))

    def changes(self) -> list[tuple[int, int]]:
        """Changed ranges in order, without overlaps."""
        if self.before is None and not self.blank:
            return [(0, len(self.data))]
        merged: list[tuple[int, int]] = []
        for start, end in sorted(self.spans):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        old = self.before if self.before is not None else bytes(len(self.data))
        return [(start, end) for start, end in merged if old[start:end] != self.data[start:end]]


class MetadataView:
    """Not thread-safe, like the planner that owns it."""

    def __init__(self, file: File, cluster_size: int) -> None:
        self._file = file
        self._page = min(cluster_size, PAGE_BYTES)
        self._clean: OrderedDict[int, bytes] = OrderedDict()
        self._taken: OrderedDict[int, bytes] = OrderedDict()
        self._dirty: dict[int, _Page] = {}
        self._length = self._taken_length = file.length()
        self._blank_from = -(-self._length // self._page)  # pages behind the file read as zeroes
        self._blank: set[int] = set()  # those of them that are `fresh` in this step, and nothing else yet

    @property
    def path(self) -> str:
        return self._file.path

    @property
    def length(self) -> int:
        """Length of the file once everything planned is applied."""
        return self._length

    @property
    def pending(self) -> int:
        """Bytes of metadata that the step under way changes, roughly."""
        return len(self._dirty) * self._page

    def extend(self, length: int) -> None:
        """The step under way needs the file to be at least this long."""
        self._length = max(self._length, length)

    def read(self, offset: int, length: int) -> bytes:
        """The range; what lies past the end of the file reads as zeroes. `FormatError` if all of it does."""
        if offset >= self._length and length:
            raise FormatError(self.path, "metadata lies past the end of the file", offset=offset)
        number, start = divmod(offset, self._page)
        if start + length <= self._page:
            return bytes(self._current(number)[start:start + length])
        return self._read_long(offset, length)

    def write(self, offset: int, data: bytes, phase: Phase) -> None:
        """Changes bytes of a structure. In space that is `fresh` in this step, whatever the phase, they join
        it."""
        position = 0
        while position < len(data):
            number, start = divmod(offset + position, self._page)
            piece = data[position:position + self._page - start]
            page = self._dirty.get(number)
            if page is None:
                page = self._dirty[number] = self._touched(number, phase)
            elif page.before is not None and page.phase is not phase:
                raise RuntimeError(f"{self.path}: page {number} is changed in both phases of one step")
            page.data[start:start + len(piece)] = piece
            page.note(start, start + len(piece))
            position += len(piece)

    def fresh(self, offset: int, data: bytes) -> None:
        """Puts a new structure into space that nobody refers to. `offset` is a multiple of a page, and zeroes fill what
        the structure leaves of its last page.

        Zeroes behind the end of the file are there already and need no patch."""
        if offset % self._page:
            raise RuntimeError(f"{self.path}: new structure at {offset:#x} is not aligned")
        data = data.ljust(-(-len(data) // self._page) * self._page, b"\0")
        for position in range(0, len(data), self._page):
            number, content = (offset + position) // self._page, data[position:position + self._page]
            if number >= self._blank_from and content.count(0) == self._page:
                self._blank.add(number)
            else:
                self._dirty[number] = _Page(None, bytearray(content), Phase.ALLOCATE)
        self.extend(offset + len(data))

    def take(self) -> tuple[Patches, int | None]:
        """The patches since the last `take`, and the length that the file has to have for them if it
        grows."""
        collected: dict[Phase, list[Patch]] = {Phase.ALLOCATE: [], Phase.LINK: []}
        for phase, patches in collected.items():
            runs = _Runs(patches)
            for number in sorted(number for number, page in self._dirty.items() if page.phase is phase):
                page = self._dirty[number]
                for start, end in page.changes():
                    before = None if page.before is None else page.before[start:end]
                    runs.add(number * self._page + start, before, page.data[start:end])
            runs.finish()
        for number, page in self._dirty.items():
            self._clean.pop(number, None)
            self._taken.pop(number, None)
            self._taken[number] = bytes(page.data)
        self._forget_written(2 * len(self._dirty) + 16)
        self._dirty.clear()
        self._blank.clear()
        length = self._length if self._length > self._taken_length else None
        self._taken_length = self._length
        return Patches(tuple(collected[Phase.ALLOCATE]), tuple(collected[Phase.LINK])), length

    def _touched(self, number: int, phase: Phase) -> _Page:
        if number in self._blank:
            return _Page(None, bytearray(self._page), Phase.ALLOCATE, blank=True)
        current = bytes(self._current(number))
        return _Page(current, bytearray(current), phase)

    def _current(self, number: int) -> bytes | bytearray:
        dirty = self._dirty.get(number)
        if dirty is not None:
            return dirty.data
        content = self._taken.get(number)
        if content is not None:
            return content
        content = self._clean.get(number)
        if content is None:
            content = self._file.pread(number * self._page, self._page).ljust(self._page, b"\0")
            self._clean[number] = content
            if len(self._clean) * self._page > CLEAN_BYTES:
                self._clean.popitem(last=False)
        else:
            self._clean.move_to_end(number)
        return content

    def _read_long(self, offset: int, length: int) -> bytes:
        """Several pages, straight from the file, so that whole tables do not flush the cache."""
        first, start = divmod(offset, self._page)
        count = -(-(start + length) // self._page)
        data = bytearray(self._file.pread(first * self._page, count * self._page))
        data.extend(bytes(count * self._page - len(data)))
        for number in range(first, first + count):
            page = self._dirty.get(number)
            content: bytes | bytearray | None = self._taken.get(number) if page is None else page.data
            if content is not None:
                at = (number - first) * self._page
                data[at:at + self._page] = content
        return bytes(memoryview(data)[start:start + length])

    def _forget_written(self, most: int) -> None:
        """Keeps memory bounded. A page is dropped once the file holds it: nobody tells us when that is, so
        look."""
        for number in list(self._taken)[:most]:
            if len(self._taken) * self._page <= TAKEN_BYTES:
                return
            on_disk = self._file.pread(number * self._page, self._page).ljust(self._page, b"\0")
            if on_disk == self._taken[number]:
                del self._taken[number]
            else:
                self._taken.move_to_end(number)


class _Runs:
    """Joins changed ranges that continue each other (across pages) into one patch."""

    def __init__(self, patches: list[Patch]) -> None:
        self._patches = patches
        self._offset = 0
        self._before: bytearray | None = None
        self._after = bytearray()

    def add(self, offset: int, before: bytes | None, after: bytearray) -> None:
        joins = offset == self._offset + len(self._after) and (before is None) == (self._before is None)
        if self._after and not joins:
            self.finish()
        if not self._after:
            self._offset = offset
            self._before = None if before is None else bytearray()
        if before is not None and self._before is not None:
            self._before += before
        self._after += after

    def finish(self) -> None:
        if self._after:
            before = None if self._before is None else bytes(self._before)
            self._patches.append(Patch(self._offset, before, bytes(self._after)))
        self._after = bytearray()
