"""Guest content as it is seen from the top of a backing chain.

Layers are open images, top first. The first layer that has a range decides its content; a layer that is
shorter than the one above it supplies zeroes beyond its end (QEMU's rule: what lies below it does not shine
through there); what no layer has reads as zeroes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

from safeimg.drivers.errors import FormatError, StorageError
from safeimg.drivers.formats.api import Extent, Image, Kind
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import Buffer, File
from safeimg.drivers.transfer.zero import fill_zero

SECTOR = 512  # bytes that are encrypted as one
STORED_AT_ONCE = 1 << 20  # bytes of compressed clusters


class LayerExtent(NamedTuple):
    """A guest range and the layer that decides its content."""

    layer: int  # index into the view's layers; their number where no layer has the range
    extent: Extent  # DATA, ZERO or COMPRESSED; a part of a compressed cluster where only that is visible


class Content(Protocol):
    """Bytes that data in place is copied from."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills `buffer` from offset `start`. Thread-safe."""
        ...


class Source(Content, Protocol):
    """Guest content that can be read: a `View`, or several joined (`ConcatenatedView`)."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def extents(self, start: int, length: int) -> Iterator[LayerExtent]:
        """The range, clipped to `size`, in order, without gaps or overlaps, merged. `FormatError`,
        `StorageError`."""
        ...

    def read_pieces(self, pieces: Iterable[LayerExtent], start: int, buffer: memoryview) -> None:
        """Fills `buffer` from guest offset `start` with the parts of `pieces` (from `extents`) that lie in
        it.

        Pieces must cover the buffer, and be in order. Thread-safe."""
        ...

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills `buffer` from guest offset `start`; zeroes beyond the end. Thread-safe."""
        ...


class View:
    """One chain seen from its top. `read_*` may be called from several threads at once."""

    def __init__(self, layers: Sequence[Image], size: int | None = None, *, floor: int | None = None) -> None:
        """`size`: where the view ends (the top's size if None); beyond the top's own end, the content is that
        of the layers from index `floor` on (zeroes if None): what commit has to reckon with, where a smaller
        overlay leaves the end of its base alone."""
        if not layers:
            raise ValueError("a view needs a layer")
        self.layers = tuple(layers)
        self._size = layers[0].size if size is None else size
        self._floor = len(layers) if floor is None else floor
        self._clusters = _ClusterCache()

    @property
    def size(self) -> int:
        return self._size

    def extents(self, start: int, length: int) -> Iterator[LayerExtent]:
        end = min(start + length, self._size)
        if start >= end:
            return
        held: LayerExtent | None = None
        for piece in self._resolve(start, end):
            if held is None:
                held = piece
                continue
            merged = _merge(held, piece)
            if merged is None:
                yield held
                held = piece
            else:
                held = merged
        if held is not None:
            yield held

    def _resolve(self, start: int, end: int) -> Iterator[LayerExtent]:
        top = min(end, self.layers[0].size)
        if start < top:
            yield from self._from_layer(0, start, top)
        if max(start, top) < end:
            yield from self._from_layer(self._floor, max(start, top), end)

    def _from_layer(self, index: int, start: int, end: int) -> Iterator[LayerExtent]:
        if index >= len(self.layers):
            yield LayerExtent(len(self.layers), Extent(start, end - start, Kind.ZERO))
            return
        layer = self.layers[index]
        own = min(end, layer.size)
        if start < own:
            at = start
            for extent in layer.extents(start, own - start):
                clipped = _clip(extent, start, own)
                if clipped.start != at or clipped.length <= 0:
                    raise FormatError(layer.file.path, f"its map has a gap at guest offset {at:#x}")
                at += clipped.length
                if clipped.kind is Kind.UNALLOCATED:
                    yield from self._from_layer(index + 1, clipped.start, at)
                else:
                    yield LayerExtent(index, clipped)
            if at != own:
                raise FormatError(layer.file.path, f"the map ends at guest offset {at:#x}, expected {own:#x}")
        if max(start, own) < end:
            beyond = max(start, own)
            yield LayerExtent(index, Extent(beyond, end - beyond, Kind.ZERO))

    def read_into(self, start: int, buffer: memoryview) -> None:
        inside = max(0, min(len(buffer), self._size - start))
        if inside:
            self.read_pieces(self.extents(start, inside), start, buffer[:inside])
        if inside < len(buffer):
            fill_zero(buffer[inside:])

    def read_pieces(self, pieces: Iterable[LayerExtent], start: int, buffer: memoryview) -> None:
        end = start + len(buffer)
        held = list(pieces)
        stored = _Stored(self.layers, held)
        for number, (layer, extent) in enumerate(held):
            low, high = max(extent.start, start), min(extent.start + extent.length, end)
            if low >= high:
                continue
            part = buffer[low - start : high - start]
            try:
                if extent.kind is Kind.DATA:
                    assert extent.offset is not None
                    _read_data(self.layers[layer], extent.offset + (low - extent.start), low, part)
                elif extent.kind is Kind.COMPRESSED:
                    whole, content = self._cluster(layer, extent, partial(stored.read, number))
                    part[:] = memoryview(content)[low - whole : high - whole]
                else:
                    fill_zero(part)
            except StorageError as error:
                error.guest = low
                raise

    def _cluster(self, layer: int, extent: Extent, stored: Callable[[], Buffer]) -> tuple[int, bytes]:
        """The guest offset and the content of the compressed cluster that `extent` is (a part of). `stored` gives the
        bytes that are stored."""
        image = self.layers[layer]
        assert extent.offset is not None
        first = extent.start - extent.start % image.cluster_size
        key = (layer, first)
        content = self._clusters.get(key)
        if content is None:
            length = min(image.cluster_size, image.size - first)
            whole = extent if (extent.start, extent.length) == (first, length) else extent._replace(
                start=first, length=length)
            content = image.decompress(whole, stored())
            if len(content) < length:
                raise FormatError(image.file.path, f"a compressed cluster holds {len(content)} bytes, "
                                  f"expected {length}", offset=extent.offset)
            if whole is not extent:  # somebody will want the rest of it
                self._clusters.put(key, content)
        return first, content


class ConcatenatedView:
    """Several sources one after the other, as `convert` joins its source files."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = tuple(parts)
        self._starts: list[int] = []
        at = 0
        for part in parts:
            self._starts.append(at)
            at += part.size
        self._size = at

    @property
    def size(self) -> int:
        return self._size

    def extents(self, start: int, length: int) -> Iterator[LayerExtent]:
        """Extents with the joined guest offsets; `layer` is the one within the part that the range belongs
        to."""
        end = min(start + length, self._size)
        for part, first in zip(self.parts, self._starts, strict=True):
            low, high = max(start, first), min(end, first + part.size)
            if low < high:
                for layer, extent in part.extents(low - first, high - low):
                    yield LayerExtent(layer, extent._replace(start=extent.start + first))

    def read_pieces(self, pieces: Iterable[LayerExtent], start: int, buffer: memoryview) -> None:
        held = list(pieces)
        end = start + len(buffer)
        for part, first in zip(self.parts, self._starts, strict=True):
            low, high = max(start, first), min(end, first + part.size)
            if low < high:
                own = [LayerExtent(layer, extent._replace(start=extent.start - first))
                       for layer, extent in held if first <= extent.start < first + part.size]
                try:
                    part.read_pieces(own, low - first, buffer[low - start : high - start])
                except StorageError as error:
                    error.shift(first)
                    raise

    def read_into(self, start: int, buffer: memoryview) -> None:
        at = start
        end = start + len(buffer)
        for part, first in zip(self.parts, self._starts, strict=True):
            high = min(end, first + part.size)
            if first <= at < high:
                part.read_into(at - first, buffer[at - start : high - start])
                at = high
        if at < end:
            fill_zero(buffer[at - start :])


class _Stored:
    """The stored bytes of compressed pieces. Those that were written one after the other are read at once."""

    def __init__(self, layers: Sequence[Image], pieces: Sequence[LayerExtent]) -> None:
        self._layers, self._pieces = layers, pieces
        self._layer, self._start, self._end = -1, 0, 0  # where `_data` is from
        self._data = memoryview(b"")

    def read(self, number: int) -> Buffer:
        layer, extent = self._pieces[number]
        start, end = _place(extent)
        if layer != self._layer or not self._start <= start <= end <= self._end:
            self._layer, self._start, self._end = layer, start, self._together(number)
            self._data = memoryview(self._layers[layer].file.pread(start, self._end - start))
        return self._data[start - self._start : end - self._start]

    def _together(self, number: int) -> int:
        """Where the pieces end that lie in the file as they follow one another here, from `number` on."""
        layer, first = self._pieces[number]
        start, end = _place(first)
        for at in range(number + 1, len(self._pieces)):
            other, extent = self._pieces[at]
            if other != layer or extent.kind is not Kind.COMPRESSED:
                break
            low, high = _place(extent)
            if not start <= low <= end or high - start > STORED_AT_ONCE:
                break
            end = max(end, high)
        return end


def _place(extent: Extent) -> tuple[int, int]:
    """Where a compressed extent lies in its file."""
    assert extent.offset is not None
    return extent.offset, extent.offset + extent.stored


class _ClusterCache:
    """The last few decompressed clusters, for readers that want them in parts. Bounded: 8 clusters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    def get(self, key: tuple[int, int]) -> bytes | None:
        with self._lock:
            content = self._held.get(key)
            if content is not None:
                self._held.move_to_end(key)
            return content

    def put(self, key: tuple[int, int], content: bytes) -> None:
        with self._lock:
            self._held[key] = content
            while len(self._held) > 8:
                self._held.popitem(last=False)


def _read_data(image: Image, offset: int, guest: int, part: memoryview) -> None:
    """Fills `part` from `offset` of the image's data; `guest` is the guest offset of the same byte."""
    if image.cipher is None:
        read_stored(image.data, offset, part)
        return
    before = guest % SECTOR
    after = -(guest + len(part)) % SECTOR
    whole = part if not before and not after else memoryview(bytearray(before + len(part) + after))
    read_stored(image.data, offset - before, whole)
    image.cipher.decrypt(whole, offset - before, guest - before)
    if whole is not part:
        part[:] = whole[before : before + len(part)]


def read_stored(file: File, offset: int, part: memoryview) -> None:
    """Fills `part` from `offset` of the file; zeroes beyond its end."""
    got = file.pread_into(offset, part)
    if got < len(part):
        fill_zero(part[got:])


def _clip(extent: Extent, start: int, end: int) -> Extent:
    """The part of `extent` that lies in `start`…`end`. Compressed ones keep the place of the whole
    cluster."""
    low, high = max(extent.start, start), min(extent.start + extent.length, end)
    if low == extent.start and high == extent.start + extent.length:
        return extent
    offset = extent.offset
    if offset is not None and extent.kind is not Kind.COMPRESSED:
        offset += low - extent.start
    return extent._replace(start=low, length=high - low, offset=offset)


def _merge(first: LayerExtent, second: LayerExtent) -> LayerExtent | None:
    """Both as one extent, if the second continues the first."""
    a, b = first.extent, second.extent
    if first.layer != second.layer or a.kind is not b.kind or a.kind is Kind.COMPRESSED:
        return None
    if a.offset is None:
        if b.offset is not None:
            return None
    elif b.offset != a.offset + a.length:
        return None
    return LayerExtent(first.layer, a._replace(length=a.length + b.length))
