"""An SSH server for one folder, made with paramiko: it lets in whom it is told to, and its files are only read."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import paramiko
from listening import accepting

KEY = paramiko.ECDSAKey.generate()


@dataclass
class Rules:
    """Who gets in: anybody, or the owner of a key. `broken`: reading fails."""

    anybody: bool = False
    key: paramiko.PKey | None = None
    broken: bool = False


class _Users(paramiko.ServerInterface):
    def __init__(self, rules: Rules) -> None:
        self.rules = rules

    def check_auth_none(self, username: str) -> int:
        return paramiko.AUTH_SUCCESSFUL if self.rules.anybody else paramiko.AUTH_FAILED

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        return paramiko.AUTH_SUCCESSFUL if key == self.rules.key else paramiko.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "publickey"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return paramiko.OPEN_SUCCEEDED


def _files(root: Path, rules: Rules) -> type[paramiko.SFTPServerInterface]:
    class Handle(paramiko.SFTPHandle):
        def stat(self) -> paramiko.SFTPAttributes | int:
            return paramiko.SFTPAttributes.from_stat(os.fstat(self.readfile.fileno()))

        def read(self, offset: int, length: int) -> bytes | int:
            return paramiko.SFTP_FAILURE if rules.broken else super().read(offset, length)

    class Files(paramiko.SFTPServerInterface):
        def open(self, path: str, flags: int, attr: paramiko.SFTPAttributes) -> paramiko.SFTPHandle | int:
            try:
                opened = open(root / path.lstrip("/"), "rb")  # noqa: SIM115
            except OSError as error:
                return paramiko.SFTPServer.convert_errno(error.errno or 0)
            handle = Handle(flags)
            handle.readfile = opened
            return handle

        def stat(self, path: str) -> paramiko.SFTPAttributes | int:
            try:
                return paramiko.SFTPAttributes.from_stat(os.stat(root / path.lstrip("/")))
            except OSError as error:
                return paramiko.SFTPServer.convert_errno(error.errno or 0)

        lstat = stat

    return Files


@contextmanager
def serving(root: Path, rules: Rules) -> Iterator[int]:
    """The TCP port at which it listens meanwhile."""
    open_ones: list[paramiko.Transport] = []

    def serve(client: socket.socket) -> None:
        transport = paramiko.Transport(client)
        transport.add_server_key(KEY)
        transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _files(root, rules))
        with suppress(paramiko.SSHException, EOFError):
            transport.start_server(threading.Event(), _Users(rules))
            open_ones.append(transport)

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        try:
            with accepting(listening, serve):
                yield listening.getsockname()[1]
        finally:
            for transport in open_ones:
                transport.close()
