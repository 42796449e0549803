"""Making empty images as `qemu-img create` does, and unfinished ones that every other program refuses.

An unfinished image has an impossible version until the end, so that it is still told for a VDI image (and not taken
for a raw disk), and refused.
"""

from __future__ import annotations

import uuid
from array import array
from collections.abc import Callable, Mapping

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Patch
from safeimg.drivers.formats.new_file import empty, new_file
from safeimg.drivers.formats.options import bool_option, check_names, refuse_metadata, storage_preallocation
from safeimg.drivers.formats.vdi.driver import CREATE_OPTIONS
from safeimg.drivers.formats.vdi.header import (
    BLOCK,
    DYNAMIC,
    ENTRY,
    SECTOR,
    STATIC,
    UNFINISHED,
    VERSION,
    VERSION_OFFSET,
    Header,
    check_size,
    serialise,
    version_words,
)
from safeimg.drivers.formats.vdi.image import encode
from safeimg.drivers.storage.api import File, FileSystem

_AT_ONCE = 1 << 18  # entries of the map that are written at a time


def create(fs: FileSystem, path: str, size: int, options: Mapping[str, str], *, cache: str = "writeback",
           unfinished: bool = False, ready: Callable[[], None] = lambda: None) -> None:
    """Writes an empty image at `path`, into the file that is there if there is one (its content is dropped).

    `size` is rounded up to whole sectors. A static image has all its blocks, as a hole of the file: as in qemu-img,
    `preallocation` is only looked at. The header is written last, and not synced. Raises `UsageError` and
    `UnsupportedError` in qemu-img's words, `StorageError`."""
    check_names(path, options, CREATE_OPTIONS)
    preallocation = storage_preallocation(path, options)
    static = bool_option(path, options, "static")
    size = -(-size // SECTOR) * SECTOR
    with new_file(fs, path, cache=cache) as file:
        refuse_metadata(path, preallocation)
        check_size(size)
        ready()
        empty(file)
        _write(file, size, static=static, unfinished=unfinished)


def _write(file: File, size: int, *, static: bool, unfinished: bool) -> None:
    blocks = -(-size // BLOCK)
    header = Header(
        version=UNFINISHED if unfinished else VERSION,
        image_type=STATIC if static else DYNAMIC,
        map_offset=SECTOR,
        data_offset=SECTOR + -(-ENTRY * blocks // SECTOR) * SECTOR,
        disk_size=size,
        blocks=blocks,
        allocated=blocks if static else 0,
    )
    _write_map(file, header, static=static)
    end = header.data_offset + header.allocated * BLOCK
    if not file.stat().is_device and file.length() < end:
        file.truncate(end)
    if not unfinished:  # no header that a power cut leaves tells of what is not there
        file.sync()
    file.pwrite(0, serialise(header, uuid.uuid4().bytes_le, uuid.uuid4().bytes_le))


def finish_patch(file: File) -> Patch:
    """The write that makes an unfinished image a normal one. `FormatError` if the image is not an unfinished one."""
    before = file.pread(VERSION_OFFSET, 4)
    if before != version_words(UNFINISHED):
        raise FormatError(file.path, "the image is not an unfinished one")
    return Patch(VERSION_OFFSET, before, version_words(VERSION))


def _write_map(file: File, header: Header, *, static: bool) -> None:
    """Every block where it is in the guest, or none."""
    for first in range(0, header.blocks, _AT_ONCE):
        count = min(_AT_ONCE, header.blocks - first)
        content = encode(array("I", range(first, first + count))) if static else b"\xff" * (ENTRY * count)
        file.pwrite(header.map_offset + ENTRY * first, content)
    padding = header.data_offset - header.map_end
    file.pwrite(header.map_end, bytes(padding))
