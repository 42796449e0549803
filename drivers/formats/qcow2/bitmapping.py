"""Persistent bitmaps of qcow2 images, for commands that read and change them (`features.Bitmapping`)."""

from __future__ import annotations

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.qcow2.bitmaps import (
    MAX_BITMAP_BYTES,
    MAX_DIRECTORY_BYTES,
    MAX_NAME,
    TABLE_ALL_ONES,
    TABLE_OFFSET_MASK,
    Bitmap,
    read_bitmap_table,
)
from safeimg.drivers.formats.qcow2.header import MAX_BITMAPS
from safeimg.drivers.formats.qcow2.image import Qcow2Image


class Qcow2Bits:
    """Implements `features.BitmapBits`."""

    def __init__(self, image: Qcow2Image, bitmap: Bitmap) -> None:
        self._file = image.file
        self._cluster_size = image.cluster_size
        self._table = read_bitmap_table(image.file, image.header, bitmap)
        self.granularity = bitmap.granularity
        self.size = image.size

    def read(self, start: int, length: int) -> bytes:
        parts: list[bytes] = []
        end, size = start + length, self._cluster_size
        while start < end:
            index, within = divmod(start, size)
            if index >= len(self._table):
                parts.append(bytes(end - start))
                break
            here = min(size - within, end - start)
            parts.append(self._cluster(self._table[index], within, here))
            start += here
        return b"".join(parts)

    def _cluster(self, entry: int, within: int, length: int) -> bytes:
        offset = entry & TABLE_OFFSET_MASK
        if not offset:
            return (b"\xff" if entry & TABLE_ALL_ONES else b"\0") * length
        content = self._file.pread(offset + within, length)
        if len(content) < length:
            raise FormatError(self._file.path, "bits of a bitmap lie past the end of the file", offset=offset)
        return content


def bits_of(image: Qcow2Image, name: str) -> Qcow2Bits:
    return Qcow2Bits(image, next(bitmap for bitmap in image.bitmaps if bitmap.name == name))


def refusal(image: Qcow2Image, name: str, granularity: int) -> str | None:
    """See `features.Bitmapping.refusal`."""
    if image.header.version < 3:
        return "Cannot store dirty bitmaps in qcow2 v2 files"
    length = len(name.encode("utf-8", "surrogateescape"))
    if -(-image.size // granularity) > 8 * MAX_BITMAP_BYTES:
        return "Too much space will be occupied by the bitmap. Use larger granularity"
    if length > MAX_NAME:
        return f"Name length exceeds maximum ({MAX_NAME} characters)"
    directory = sum(bitmap.length for bitmap in image.bitmaps) + 24 + length + 7
    if len(image.bitmaps) >= MAX_BITMAPS or directory > MAX_DIRECTORY_BYTES:
        return "The image's bitmap directory is full"
    return None
