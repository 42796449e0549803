"""Requests to a server and its replies. Many threads may ask at the same time."""

from __future__ import annotations

import errno
import itertools
import os
import struct
import threading
from dataclasses import dataclass, field

from safeimg.drivers.storage.api import Buffer
from safeimg.drivers.storage.nbd import wire
from safeimg.drivers.storage.nbd.handshake import Export
from safeimg.drivers.storage.nbd.wire import Channel

MAX_EXTENTS = (1 << 20) // 8  # that one reply may tell of
_MAX_DROPPED = 1 << 16  # bytes of an error's words

_ERRORS = {
    1: errno.EPERM, 5: errno.EIO, 12: errno.ENOMEM, 22: errno.EINVAL, 28: errno.ENOSPC, 75: errno.EOVERFLOW,
    95: errno.ENOTSUP, 108: errno.ESHUTDOWN,
}  # fmt: skip


class Violation(Exception):
    """The server did not keep to the protocol; what it sends next makes no sense any more."""


@dataclass(slots=True, eq=False)
class _Request:
    """One under way. `target`: where what is read goes."""

    command: int
    offset: int
    length: int
    target: memoryview
    error: int = 0  # of the operating system, the first one
    arrived: int = 0  # bytes
    extents: list[tuple[int, int]] = field(default_factory=list)  # length, flags
    done: bool = False


class Client:
    """Whoever waits for a reply and finds nobody reading reads, for the others too."""

    def __init__(self, channel: Channel, export: Export) -> None:
        self.export = export
        self._channel = channel
        self._handles = itertools.count(1)
        self._sending = threading.Lock()
        self._changed = threading.Condition()  # guards all below
        self._open: dict[int, _Request] = {}
        self._reading = False
        self._broken = False

    def read(self, offset: int, buffer: memoryview) -> None:
        """Fills `buffer`, which must not be larger than the export's maximum. Raises `OSError`, as all below do."""
        self._do(_Request(wire.CMD_READ, offset, len(buffer), buffer))

    def write(self, offset: int, data: Buffer, *, durable: bool = False) -> None:
        request = _Request(wire.CMD_WRITE, offset, len(data), memoryview(b""))
        self._do(request, wire.FLAG_FUA if durable else 0, data)

    def zero(self, offset: int, length: int, *, unmap: bool, durable: bool = False) -> None:
        flags = (0 if unmap else wire.FLAG_NO_HOLE) | (wire.FLAG_FUA if durable else 0)
        self._do(_Request(wire.CMD_WRITE_ZEROES, offset, length, memoryview(b"")), flags)

    def trim(self, offset: int, length: int) -> None:
        self._do(_Request(wire.CMD_TRIM, offset, length, memoryview(b"")))

    def flush(self) -> None:
        self._do(_Request(wire.CMD_FLUSH, 0, 0, memoryview(b"")))

    def status(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Lengths and flags of at least one run of bytes from `offset` on, none beyond `length`."""
        request = _Request(wire.CMD_BLOCK_STATUS, offset, length, memoryview(b""))
        self._do(request)
        return request.extents

    def close(self) -> None:
        try:
            self._channel.send(_header(wire.CMD_DISC, 0, 0, 0, 0))
        except OSError:
            pass  # it is gone already
        self._channel.close()

    def _do(self, request: _Request, flags: int = 0, payload: Buffer = b"") -> None:
        with self._changed:
            if self._broken:
                raise _system_error(errno.EIO)
            handle = next(self._handles)
            self._open[handle] = request
        try:
            with self._sending:
                self._channel.send(
                    _header(request.command, flags, handle, request.offset, request.length), payload
                )
        except OSError:
            self._break()
        self._wait(request)
        if not request.error and request.arrived != len(request.target):
            request.error = errno.EIO  # done without all the data
        if not request.error and request.command == wire.CMD_BLOCK_STATUS and not request.extents:
            request.error = errno.EIO
        if request.error:
            raise _system_error(request.error)

    def _wait(self, request: _Request) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: request.done or self._broken or not self._reading)
                if request.done:
                    return
                if self._broken:
                    request.error = request.error or errno.EIO
                    return
                self._reading = True
            try:
                self._receive()
            except (OSError, Violation):
                self._break()
            finally:
                with self._changed:
                    self._reading = False
                    self._changed.notify_all()

    def _break(self) -> None:
        with self._changed:
            self._broken = True
            self._changed.notify_all()

    def _receive(self) -> None:
        """Reads one reply, or one chunk of one. Raises `OSError`, `Violation`."""
        (magic,) = struct.unpack(">I", self._channel.receive(4))
        if magic == wire.SIMPLE_REPLY_MAGIC:
            self._simple(*struct.unpack(">IQ", self._channel.receive(12)))
        elif magic == wire.STRUCTURED_REPLY_MAGIC and self.export.structured:
            self._chunk(*struct.unpack(">HHQI", self._channel.receive(16)))
        else:
            raise Violation

    def _request(self, handle: int) -> _Request:
        with self._changed:
            request = self._open.get(handle)
        if request is None:
            raise Violation
        return request

    def _finish(self, handle: int) -> None:
        with self._changed:
            self._open.pop(handle).done = True

    def _simple(self, error: int, handle: int) -> None:
        request = self._request(handle)
        if self.export.structured and request.command == wire.CMD_READ:
            raise self._wrong(request)
        if error:
            request.error = _ERRORS.get(error, errno.EINVAL)
        elif request.command == wire.CMD_READ:
            self._channel.receive_into(request.target)
            request.arrived = request.length
        self._finish(handle)

    def _chunk(self, flags: int, kind: int, handle: int, length: int) -> None:
        request = self._request(handle)
        last = bool(flags & wire.REPLY_DONE)
        if kind & wire.CHUNK_IS_ERROR:
            self._error(request, kind, length)
        elif kind == wire.CHUNK_NONE:
            if length or not last:
                raise self._wrong(request)
        elif kind == wire.CHUNK_OFFSET_DATA and request.command == wire.CMD_READ:
            if length <= 8:
                raise self._wrong(request)
            self._channel.receive_into(self._place(request, self._channel.receive(8), length - 8))
        elif kind == wire.CHUNK_OFFSET_HOLE and request.command == wire.CMD_READ:
            if length != 12:
                raise self._wrong(request)
            told = self._channel.receive(12)
            hole = self._place(request, told[:8], int.from_bytes(told[8:], "big"))
            hole[:] = bytes(len(hole))
        elif kind == wire.CHUNK_BLOCK_STATUS and request.command == wire.CMD_BLOCK_STATUS:
            self._extents(request, length)
        else:
            raise self._wrong(request)
        if last:
            self._finish(handle)

    def _place(self, request: _Request, told: bytes, length: int) -> memoryview:
        """Where `length` bytes go that belong at an offset of the export."""
        start = int.from_bytes(told, "big") - request.offset
        if length < 1 or start < 0 or start + length > request.length or request.arrived + length > request.length:
            raise self._wrong(request)
        request.arrived += length
        return request.target[start : start + length]

    def _extents(self, request: _Request, length: int) -> None:
        if length % 8 != 4 or not 12 <= length <= 4 + 8 * MAX_EXTENTS or request.extents:
            raise self._wrong(request)
        told = self._channel.receive(length)
        if int.from_bytes(told[:4], "big") != self.export.context:
            raise self._wrong(request)
        left = request.length
        for run, flags in struct.iter_unpack(">II", told[4:]):
            if run < 1 or left < 1:  # one that ends behind the range, as only the last may
                raise self._wrong(request)
            request.extents.append((min(run, left), flags))
            left -= run

    def _error(self, request: _Request, kind: int, length: int) -> None:
        known = kind in (wire.CHUNK_ERROR, wire.CHUNK_ERROR_OFFSET)
        if not 6 <= length <= _MAX_DROPPED:
            raise self._wrong(request)
        told = self._channel.receive(length)
        code, words = struct.unpack_from(">IH", told)
        if known and (not code or 6 + words + (8 if kind == wire.CHUNK_ERROR_OFFSET else 0) != length):
            raise self._wrong(request)
        request.error = request.error or _ERRORS.get(code, errno.EINVAL)

    def _wrong(self, request: _Request) -> Violation:
        """What to raise where the answer to a request makes no sense."""
        request.error = request.error or errno.EINVAL
        return Violation()


def _header(command: int, flags: int, handle: int, offset: int, length: int) -> bytes:
    return struct.pack(">IHHQQI", wire.REQUEST_MAGIC, flags, command, handle, offset, length)


def _system_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
