"""Where a server listens, and how to get connected to it. Messages are QEMU's."""

from __future__ import annotations

import os
import socket
import stat
import time
from dataclasses import dataclass

from safeimg.drivers.errors import RemoteError, UsageError

MAX_PATH = 107  # bytes of a unix socket's path


@dataclass(frozen=True, slots=True)
class Unix:
    """A unix socket. An `abstract` one has no name in the file system; its name is padded unless `tight`."""

    path: str
    abstract: bool = False
    tight: bool = True

    def __str__(self) -> str:
        return self.path

    def connected(self) -> socket.socket:
        encoded = os.fsencode(self.path)
        if len(encoded) > MAX_PATH - self.abstract:
            raise RemoteError(
                f"UNIX socket path '{self.path}' is too long\nPath must be less than {MAX_PATH + 1} bytes"
            )
        if self.abstract:
            encoded = b"\0" + (encoded if self.tight else encoded.ljust(MAX_PATH, b"\0"))
        # A path of no bytes is an abstract one of zeroes for the system call; Python refuses it.
        return _connected(socket.socket(socket.AF_UNIX), encoded or bytes(MAX_PATH), str(self))


@dataclass(frozen=True, slots=True)
class Inet:
    """A TCP port: a number, or the name of a service. `ipv4` and `ipv6`: None where nothing was said."""

    host: str
    port: str
    ipv4: bool | None = None
    ipv6: bool | None = None
    keep_alive: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def connected(self) -> socket.socket:
        if self.ipv4 is False and self.ipv6 is False:
            raise UsageError("Cannot disable IPv4 and IPv6 at same time")
        family = socket.AF_UNSPEC
        if self.ipv6 or self.ipv4 is False:
            family = socket.AF_INET6
        elif self.ipv4 or self.ipv6 is False:
            family = socket.AF_INET
        flags = socket.AI_V4MAPPED | socket.AI_ADDRCONFIG
        try:
            found = socket.getaddrinfo(self.host, self.port, family, socket.SOCK_STREAM, flags=flags)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "Name or service not known"
            raise RemoteError(f"address resolution failed for {self}: {reason}") from error
        failed: RemoteError | None = None
        for kind, _, protocol, _, address in found:
            try:
                connected = _connected(socket.socket(kind, socket.SOCK_STREAM, protocol), address, str(self))
            except RemoteError as error:
                failed = error
                continue
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, self.keep_alive)
            return connected
        raise failed or RemoteError(f"address resolution failed for {self}: No address associated with hostname")


@dataclass(frozen=True, slots=True)
class Vsock:
    """A port of a virtual machine, or of its host."""

    cid: str
    port: str

    def __str__(self) -> str:
        return f"{self.cid}:{self.port}"

    def connected(self) -> socket.socket:
        numbers = []
        for what, text in (("cid", self.cid), ("port", self.port)):
            if not (text.isascii() and text.isdigit() and int(text) < 1 << 32):
                raise UsageError(f"Failed to parse {what} '{text}'")
            numbers.append(int(text))
        return _connected(socket.socket(socket.AF_VSOCK), tuple(numbers), str(self))


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A connected socket that was inherited."""

    number: str

    def connected(self) -> socket.socket:
        if not (self.number.isascii() and self.number.isdigit() and int(self.number) < 1 << 31):
            raise UsageError(f"Unable to parse FD number {self.number}")
        try:
            if stat.S_ISSOCK(os.fstat(int(self.number)).st_mode):
                return socket.socket(fileno=os.dup(int(self.number)))
        except OSError:
            pass
        raise UsageError(f"File descriptor '{self.number}' is not a socket")


Address = Unix | Inet | Vsock | Descriptor


def connect(address: Address, patience: float = 0) -> socket.socket:
    """A connection; while nobody answers, tries again for `patience` seconds. `RemoteError`, `UsageError`."""
    end = time.monotonic() + patience
    while True:
        try:
            return address.connected()
        except RemoteError:
            if time.monotonic() >= end:
                raise
            time.sleep(min(1.0, max(end - time.monotonic(), 0)))


def _connected(fresh: socket.socket, address: object, name: str) -> socket.socket:
    try:
        fresh.connect(address)  # type: ignore[arg-type]
    except OSError as error:
        fresh.close()
        raise RemoteError(f"Failed to connect to '{name}': {error.strerror or error}") from error
    return fresh
