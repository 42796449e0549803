"""The table of internal snapshots (spec: QEMU's qcow2, "Snapshots")."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence

from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.qcow2.header import MAX_SNAPSHOTS, Header
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.api import File

MAX_EXTRA_DATA = 1024
MAX_TABLE_BYTES = 64 << 20
COMPLETE_EXTRA_DATA = 16  # what version 3 requires: VM state size and virtual disk size

NO_ICOUNT = (1 << 64) - 1
MAX_NAME = 255  # bytes: QEMU cuts longer ones

_ENTRY = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQQ")


class Snapshot(NamedTuple):
    """An entry of the snapshot table. Times are as stored: seconds and nanoseconds since the epoch."""

    l1_table_offset: int
    l1_size: int
    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    disk_size: int  # virtual size when the snapshot was taken; the image's where it is not recorded
    icount: int | None  # None: not recorded, or recording was off
    unknown_extra: bytes  # extra data behind what is known, kept as it is
    extra_data_size: int
    offset: int  # of the entry, in the file
    length: int  # of the entry, with padding

    @property
    def end(self) -> int:
        """Where the entry ends in the file, without padding, which the last one of a table need not have."""
        names = len(os.fsencode(self.id)) + len(os.fsencode(self.name))
        return self.offset + _ENTRY.size + self.extra_data_size + names

    @property
    def is_incomplete(self) -> bool:
        """The extra data that version 3 requires is missing."""
        return self.extra_data_size < COMPLETE_EXTRA_DATA


class TooMuch(FormatError):
    """There is more than QEMU takes: extra data in table `entry`, or (`entry` None) `snapshots`, that many too many."""

    def __init__(self, path: str, problem: str, *, entry: int | None = None, snapshots: int = 0) -> None:
        super().__init__(path, problem)
        self.entry = entry
        self.snapshots = snapshots


def read_snapshots(
    file: File, header: Header, *, discard: Callable[[int, int], None] | None = None
) -> tuple[Snapshot, ...]:
    """All snapshots, in table order. The L1 tables that they name are not looked at.

    What lies past the end of the file reads as zeroes, as with QEMU. More extra data and a larger table than QEMU takes
    are `TooMuch`, or with `discard` they are left out: it is told the index of each such entry, and the size of its
    extra data.
    """
    if not header.nb_snapshots:
        return ()
    if header.nb_snapshots > MAX_SNAPSHOTS:
        raise FormatError(file.path, "Snapshot table too large")
    position = header.snapshots_offset
    reader = _Reader(file, position)
    snapshots = []
    for index in range(header.nb_snapshots):
        start = reader.position
        fields = _ENTRY.unpack(reader.take(_ENTRY.size))
        l1_offset, l1_size, id_size, name_size, sec, nsec, clock, vm_state_size, extra_size = fields
        if extra_size > MAX_EXTRA_DATA:
            if discard is None:
                raise TooMuch(file.path, f"Too much extra metadata in snapshot table entry {index}", entry=index)
            discard(index, extra_size)
        extra = reader.take(min(extra_size, MAX_EXTRA_DATA))
        reader.position += extra_size - len(extra)
        if extra_size >= 8:
            vm_state_size = int.from_bytes(extra[:8], "big")
        disk_size = int.from_bytes(extra[8:16], "big") if extra_size >= 16 else header.size
        icount = int.from_bytes(extra[16:24], "big") if extra_size >= 24 else None
        identifier = os.fsdecode(reader.take(id_size))
        name = os.fsdecode(reader.take(name_size))
        reader.position += -(reader.position - start) % 8  # QEMU does not write the last entry's padding
        if reader.position - position > MAX_TABLE_BYTES:
            if discard is not None:
                break
            raise TooMuch(file.path, "Snapshot table is too big", snapshots=header.nb_snapshots - index)
        snapshots.append(
            Snapshot(l1_offset, l1_size, identifier, name, sec, nsec, clock, vm_state_size, disk_size,
                     None if icount == NO_ICOUNT else icount, extra[_EXTRA.size:], extra_size, start,
                     reader.position - start)
        )
    return tuple(snapshots)


def encode_snapshots(snapshots: Sequence[Snapshot]) -> bytes:
    """The snapshot table, each entry with all the extra data that is known."""
    table = bytearray()
    for entry in snapshots:
        identifier, name = os.fsencode(entry.id), os.fsencode(entry.name)
        table += bytes(-len(table) % 8)
        table += _ENTRY.pack(
            entry.l1_table_offset, entry.l1_size, len(identifier), len(name), entry.date_sec, entry.date_nsec,
            entry.vm_clock_nsec, entry.vm_state_size if entry.vm_state_size < 1 << 32 else 0,
            _EXTRA.size + len(entry.unknown_extra),
        )
        icount = NO_ICOUNT if entry.icount is None else entry.icount
        table += _EXTRA.pack(entry.vm_state_size, entry.disk_size, icount) + entry.unknown_extra + identifier + name
    return bytes(table)


class _Reader:
    """Reads a file front to back in pieces of 64 KiB, and zeroes behind its end."""

    def __init__(self, file: File, position: int) -> None:
        self.position = position
        self._file = file
        self._buffer = b""
        self._start = position  # of the buffer, in the file

    def take(self, length: int) -> bytes:
        index = self.position - self._start
        if not 0 <= index <= index + length <= len(self._buffer):
            self._start, index = self.position, 0
            wanted = max(length, 65536)
            # An offset past 2^63 is not one that a file can have.
            readable = self._start + wanted < 1 << 63
            self._buffer = self._file.pread(self._start, wanted) if readable else b""
            if len(self._buffer) < length:
                self._buffer = self._buffer.ljust(wanted, b"\0")
        self.position += length
        return self._buffer[index:index + length]
