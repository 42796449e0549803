"""An export of a server as a file."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from safeimg.drivers.errors import RemoteError, StorageError, SyncFailed
from safeimg.drivers.storage.address import Address, connect
from safeimg.drivers.storage.api import Buffer, FileStat, Span
from safeimg.drivers.storage.nbd import wire
from safeimg.drivers.storage.nbd.client import Client
from safeimg.drivers.storage.nbd.handshake import negotiate
from safeimg.drivers.storage.virtual import VirtualFile

ALLOCATION = "base:allocation"
_MAX_RANGE = 1 << 31  # bytes of a request that carries no data
_ZEROES = bytes(1 << 20)


def open_export(
    path: str, address: Address, name: str, *, write: bool, cache: str = "writeback", bitmap: str | None = None,
    patience: float = 0,
) -> NbdFile:  # fmt: skip
    """Connects to the server. `path`: what the file is called. `bitmap`: a metadata context that says instead of
    `base:allocation` which ranges hold data: those that it has not marked. `patience`: seconds to go on trying.

    Raises `RemoteError` in QEMU's words."""
    channel = wire.Channel(connect(address, patience))
    try:
        export = negotiate(channel, name, ALLOCATION if bitmap is None else bitmap)
        if bitmap is not None and export.context is None:
            raise RemoteError(f"Could not open image: {os.strerror(errno.EINVAL)}")
        if write and export.flags & wire.READ_ONLY:
            raise RemoteError(f"Could not open image: {os.strerror(errno.EACCES)}")
        return NbdFile(path, Client(channel, export), write=write, cache=cache)
    except BaseException:
        channel.close()
        raise


class NbdFile(VirtualFile):
    """Implements `api.File`. Like a block device, it has the size that it has."""

    def __init__(self, path: str, client: Client, *, write: bool, cache: str) -> None:
        super().__init__(path)
        self._client = client
        self._export = client.export
        self._write = write
        self._through = cache in ("writethrough", "directsync")
        self._unsafe = cache == "unsafe"
        self._edges = threading.Lock()  # while a block is changed that is written in part
        self._lost: OSError | None = None  # of a flush

    @property
    def writable(self) -> bool:
        return self._write

    @property
    def alignment(self) -> int:
        return self._export.minimum

    def length(self) -> int:
        return self._export.size

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        inside = self._clipped(offset, buffer)
        with self._reported("read"):
            self._read(offset, inside)
        return len(inside)

    def _read(self, offset: int, buffer: memoryview) -> None:
        low, high = self._widened(offset, len(buffer))
        if (low, high) != (offset, offset + len(buffer)):
            whole = memoryview(bytearray(high - low))
            self._read_whole(low, whole)
            buffer[:] = whole[offset - low : offset - low + len(buffer)]
        else:
            self._read_whole(offset, buffer)

    def _read_whole(self, offset: int, buffer: memoryview) -> None:
        for at in range(0, len(buffer), self._export.maximum):
            self._client.read(offset + at, buffer[at : at + self._export.maximum])

    def _widened(self, offset: int, length: int) -> tuple[int, int]:
        """Start and end of the blocks that a range touches; the last one ends where the export does."""
        unit = self._export.minimum
        return offset - offset % unit, min(-(-(offset + length) // unit) * unit, self._export.size)

    def spans(self, offset: int, length: int) -> Iterator[Span]:
        if self._export.context is None:
            yield from super().spans(offset, length)
            return
        end = min(offset + length, self._export.size)
        while offset < end:
            low, high = self._widened(offset, min(end - offset, _MAX_RANGE))
            with self._reported("find data"):
                found = self._client.status(low, high - low)
            for run, flags in found:
                start, low = max(low, offset), low + run
                stop = min(low, end)
                if start < stop:
                    yield Span(
                        start, stop - start, not flags & wire.STATE_ZERO, allocated=not flags & wire.STATE_HOLE
                    )
            offset = low

    def pwrite(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        if view.itemsize != 1 or view.ndim != 1:
            view = view.cast("B")
        with self._changing("write", offset, len(view)):
            low, high = self._widened(offset, len(view))
            if (low, high) == (offset, offset + len(view)):
                self._write_whole(offset, view)
                return
            with self._edges:
                whole = memoryview(bytearray(high - low))
                self._read_whole(low, whole)
                whole[offset - low : offset - low + len(view)] = view
                self._write_whole(low, whole)

    def _write_whole(self, offset: int, data: memoryview) -> None:
        for at in range(0, len(data), self._export.maximum):
            self._client.write(offset + at, data[at : at + self._export.maximum], durable=self._fua)
        self._flush_if_through()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        low, high = self._shrunk(offset, length)
        if not self._export.flags & wire.SEND_WRITE_ZEROES or low >= high:
            for at in range(offset, offset + length, len(_ZEROES)):
                self.pwrite(at, _ZEROES[: offset + length - at])
            return
        with self._changing("write zeroes", offset, length):
            for at in range(low, high, _MAX_RANGE):
                self._client.zero(at, min(high - at, _MAX_RANGE), unmap=unmap, durable=self._fua)
            self._flush_if_through()
        if offset < low:
            self.pwrite(offset, _ZEROES[: low - offset])
        if high < offset + length:
            self.pwrite(high, _ZEROES[: offset + length - high])

    def _shrunk(self, offset: int, length: int) -> tuple[int, int]:
        """Start and end of the whole blocks in a range."""
        unit, end = self._export.minimum, offset + length
        return -(-offset // unit) * unit, end if end == self._export.size else end - end % unit

    def discard(self, offset: int, length: int) -> None:
        low, high = self._shrunk(offset, min(length, self._export.size - offset))
        if not self._write or self._lost is not None or not self._export.flags & wire.SEND_TRIM:
            return
        try:
            for at in range(low, high, _MAX_RANGE):
                self._client.trim(at, min(high - at, _MAX_RANGE))
        except OSError:
            pass  # a hint that is not taken

    def preallocate(self, offset: int, length: int, *, keep_size: bool) -> None:
        """The server's business."""

    def truncate(self, length: int) -> None:
        if length > self._export.size:
            raise StorageError(self._path, "truncate", OSError(errno.ENOTSUP, "Cannot grow NBD nodes"))

    def sync(self) -> None:
        if not self._write or self._unsafe:
            return
        self._refuse_after_failed_flush()
        try:
            self._flush()
        except OSError as error:
            self._lost = error
            raise SyncFailed(self._path, "sync", error) from None

    def sync_all(self) -> None:
        self.sync()

    @property
    def _fua(self) -> bool:
        return self._through and bool(self._export.flags & wire.SEND_FUA)

    def _flush(self) -> None:
        if self._export.flags & wire.SEND_FLUSH:
            self._client.flush()

    def _flush_if_through(self) -> None:
        if self._through and not self._fua:
            self._flush()

    def _refuse_after_failed_flush(self) -> None:
        if self._lost is not None:
            raise SyncFailed(self._path, "sync failed before", self._lost)

    @contextmanager
    def _reported(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(self._path, action, error) from None

    @contextmanager
    def _changing(self, action: str, offset: int, length: int) -> Iterator[None]:
        if not self._write:
            self._refuse()
        self._refuse_after_failed_flush()
        if offset < 0 or offset + length > self._export.size:
            raise StorageError(self._path, action, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        try:
            yield
        except OSError as error:
            if self._through:  # a flush is part of the write
                self._lost = error
                raise SyncFailed(self._path, action, error) from None
            raise StorageError(self._path, action, error) from None

    def stat(self) -> FileStat:
        return super().stat()._replace(is_device=True)

    def close(self) -> None:
        self._client.close()
