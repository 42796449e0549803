"""Numbers of the protocol, and the connection that they go through."""

from __future__ import annotations

import socket

from safeimg.drivers.errors import RemoteError
from safeimg.drivers.storage.api import Buffer

# Handshake
INITIAL_MAGIC = int.from_bytes(b"NBDMAGIC", "big")
OPTION_MAGIC = int.from_bytes(b"IHAVEOPT", "big")
OLDSTYLE_MAGIC = 0x00420281861253
OPTION_REPLY_MAGIC = 0x0003E889045565A9
FIXED_NEWSTYLE, NO_ZEROES = 1, 2  # flags of both sides

OPT_EXPORT_NAME, OPT_LIST, OPT_GO, OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT = 1, 3, 7, 8, 10
REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERROR = 1 << 31  # set in replies that are errors
(
    ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_PLATFORM, ERR_TLS_REQD, ERR_UNKNOWN, ERR_SHUTDOWN, ERR_BLOCK_SIZE_REQD,
) = range(REP_ERROR + 1, REP_ERROR + 9)  # fmt: skip
INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3
MAX_STRING = 4096  # bytes of a name or message

# Flags of an export
READ_ONLY, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 6

# Transmission
REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC = 0x25609513, 0x67446698, 0x668E33EF
CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS = 0, 1, 2, 3, 4, 6, 7
FLAG_FUA, FLAG_NO_HOLE = 1, 2
REPLY_DONE = 1
CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE, CHUNK_BLOCK_STATUS = 0, 1, 2, 5
CHUNK_ERROR, CHUNK_ERROR_OFFSET = (1 << 15) + 1, (1 << 15) + 2
CHUNK_IS_ERROR = 1 << 15
STATE_HOLE, STATE_ZERO = 1, 2  # of base:allocation


class Ended(OSError):
    """The server closed the connection."""

    def __init__(self) -> None:
        super().__init__(0, "Unexpected end-of-file before all data were read")


class Channel:
    """A connected socket."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def send(self, *parts: Buffer) -> None:
        for part in parts:
            if len(part):
                self._socket.sendall(part)

    def receive_into(self, buffer: memoryview) -> None:
        """Fills `buffer`. Raises `OSError`."""
        while len(buffer):
            count = self._socket.recv_into(buffer)
            if not count:
                raise Ended
            buffer = buffer[count:]

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes, which the caller has found to be few. Raises `OSError`."""
        found = bytearray(length)
        self.receive_into(memoryview(found))
        return bytes(found)

    def expect(self, length: int, what: str) -> bytes:
        """Like `receive`, of something with a name. Raises `RemoteError` in QEMU's words."""
        try:
            return self.receive(length)
        except Ended as error:
            raise RemoteError(f"Failed to read {what}: {error.strerror}") from None
        except OSError as error:
            raise RemoteError(f"Failed to read {what}: Unable to read from socket: {error.strerror}") from error

    def tell(self, what: str, *parts: Buffer) -> None:
        """Like `send`, of something with a name. Raises `RemoteError` in QEMU's words."""
        try:
            self.send(*parts)
        except OSError as error:
            raise RemoteError(f"Failed to send {what}: Unable to write to socket: {error.strerror}") from error

    def close(self) -> None:
        self._socket.close()
