"""An NBD server that may say anything: a correct one of a few lines, of which a test replaces what is to be wrong."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from listening import accepting

OPTION, REPLY = 0x49484156454F5054, 0x3E889045565A9
REQUEST, SIMPLE, STRUCTURED = 0x25609513, 0x67446698, 0x668E33EF
EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURE, META = 1, 2, 3, 6, 7, 8, 10
ACK, SERVER, ABOUT, CONTEXT = 1, 2, 3, 4
UNSUPPORTED = 0x80000001
READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES, BLOCK_STATUS = 0, 1, 2, 3, 4, 6, 7
NONE, DATA, HOLE, STATUS, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 0x8001, 0x8002
ALL_FLAGS = 1 | 4 | 8 | 0x20 | 0x40


class Gone(Exception):
    """The client hung up."""


@dataclass
class Request:
    """What a client asked for: a number of `READ` and the others, and its payload if it is a write."""

    flags: int
    command: int
    handle: int
    offset: int
    length: int
    payload: bytes = b""


@dataclass
class Fake:
    """The server's content and what it tells. `options` and `commands` replace single answers: by their number,
    functions of the connection and what was asked; None closes the connection."""

    content: bytearray
    flags: int = ALL_FLAGS
    greeting: bytes = b"NBDMAGIC" + struct.pack(">QH", OPTION, 3)
    structured: bool = True
    blocks: tuple[int, int, int] | None = None  # sizes: the smallest, the preferred, the largest
    size: int | None = None  # that it claims
    extents: list[tuple[int, int]] = field(default_factory=list)  # length, flags
    oldstyle: bool = False
    options: dict[int, Callable[[Connection, bytes], object] | None] = field(default_factory=dict)
    commands: dict[int, Callable[[Connection, Request], object] | None] = field(default_factory=dict)
    seen: list[Request] = field(default_factory=list)

    @property
    def claimed(self) -> int:
        return len(self.content) if self.size is None else self.size


class Connection:
    """One client's."""

    def __init__(self, fake: Fake, client: socket.socket) -> None:
        self.fake = fake
        self.client = client
        self.structured = False

    def run(self) -> None:
        try:
            if self.fake.oldstyle:
                self.send(b"NBDMAGIC" + struct.pack(">QQHH124x", 0x420281861253, self.fake.claimed, 0, self.fake.flags))
            else:
                self.send(self.fake.greeting)
                self.receive(4)
                while not self.option():
                    pass
            while self.request():
                pass
        except (OSError, Gone):
            pass
        finally:
            self.client.close()

    def send(self, data: bytes) -> None:
        self.client.sendall(data)

    def receive(self, length: int) -> bytes:
        found = b""
        while len(found) < length:
            part = self.client.recv(length - len(found))
            if not part:
                raise Gone
            found += part
        return found

    def answer(self, option: int, kind: int, data: bytes = b"", *, length: int | None = None) -> None:
        self.send(struct.pack(">QIII", REPLY, option, kind, len(data) if length is None else length) + data)

    def option(self) -> bool:
        """Whether the handshake is over."""
        _, option, length = struct.unpack(">QII", self.receive(16))
        data = self.receive(length)
        if option in self.fake.options:
            replaced = self.fake.options[option]
            if replaced is None:
                raise Gone
            return bool(replaced(self, data))
        if option == GO:
            self.about()
            self.answer(option, ACK)
            return True
        if option == EXPORT_NAME:
            self.send(struct.pack(">QH", self.fake.claimed, self.fake.flags))
            return True
        if option == STRUCTURE and self.fake.structured:
            self.structured = True
            self.answer(option, ACK)
        elif option == META:
            (name,) = struct.unpack_from(">I", data)
            (first,) = struct.unpack_from(">I", data, 8 + name)
            self.answer(option, CONTEXT, struct.pack(">I", 7) + data[12 + name : 12 + name + first])
            self.answer(option, ACK)
        elif option == ABORT:
            raise Gone
        else:
            self.answer(option, UNSUPPORTED)
        return False

    def about(self) -> None:
        """Size and flags, as the answer to GO."""
        self.answer(GO, ABOUT, struct.pack(">HQH", 0, self.fake.claimed, self.fake.flags))
        if self.fake.blocks is not None:
            self.answer(GO, ABOUT, struct.pack(">HIII", 3, *self.fake.blocks))

    def request(self) -> bool:
        """Whether another one may follow."""
        _, flags, command, handle, offset, length = struct.unpack(">IHHQQI", self.receive(28))
        request = Request(flags, command, handle, offset, length)
        if command == WRITE:
            request.payload = self.receive(length)
        self.fake.seen.append(request)
        if command in self.fake.commands:
            replaced = self.fake.commands[command]
            if replaced is None:
                raise Gone
            replaced(self, request)
        elif command == READ:
            data = bytes(self.fake.content[offset : offset + length]).ljust(length, b"\0")
            if self.structured:
                self.chunk(request, DATA, struct.pack(">Q", offset) + data)
            else:
                self.simple(request, data)
        elif command == BLOCK_STATUS:
            self.chunk(request, STATUS, struct.pack(">I", 7) + b"".join(self.status(offset, length)))
        elif command == DISCONNECT:
            return False
        else:
            if command in (WRITE, WRITE_ZEROES):
                self.fake.content[offset : offset + length] = request.payload or bytes(length)
            self.simple(request)
        return True

    def status(self, offset: int, length: int) -> Iterator[bytes]:
        at = 0
        for size, flags in self.fake.extents or [(self.fake.claimed, 0)]:
            low, high = max(at, offset), min(at + size, offset + length)
            if low < high:
                yield struct.pack(">II", high - low, flags)
            at += size

    def simple(self, request: Request, data: bytes = b"", *, error: int = 0, handle: int | None = None) -> None:
        self.send(struct.pack(">IIQ", SIMPLE, error, request.handle if handle is None else handle) + data)

    def chunk(
        self, request: Request, kind: int, data: bytes = b"", *, done: bool = True, handle: int | None = None,
        length: int | None = None,
    ) -> None:  # fmt: skip
        self.send(
            struct.pack(
                ">IHHQI", STRUCTURED, done, kind, request.handle if handle is None else handle,
                len(data) if length is None else length,
            )
            + data
        )  # fmt: skip


@contextmanager
def serving(fake: Fake, path: Path) -> Iterator[None]:
    """The server listens at the unix socket `path` meanwhile."""
    clients: list[socket.socket] = []

    def serve(client: socket.socket) -> None:
        clients.append(client)
        threading.Thread(target=Connection(fake, client).run, daemon=True).start()

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        try:
            with accepting(listening, serve):
                yield
        finally:
            for client in clients:
                with suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
            path.unlink()
