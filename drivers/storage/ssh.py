"""Files on other machines, read over ssh with its file transfer protocol. paramiko does the work, if it is installed.

Users are let in by their keys: those of an ssh-agent and of `~/.ssh`."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safeimg.drivers.errors import RemoteError, StorageError, UnsupportedError
from safeimg.drivers.storage.address import Inet, connect
from safeimg.drivers.storage.virtual import VirtualFile

if TYPE_CHECKING:
    from paramiko import PKey, SFTPFile, SSHClient, Transport

HASHES = ("md5", "sha1", "sha256")
CHUNK = 32768  # bytes that servers send at once at least (draft-ietf-secsh-filexfer-02, section 3)
_CODES = {errno.ENOENT: 2, errno.EACCES: 3}  # of the protocol, by what paramiko makes of them
_FAILURE = 4


@dataclass(frozen=True, slots=True)
class HostKeyCheck:
    """How a server proves that it is the one: `mode` is none, known_hosts or hash (`kind` of `HASHES`, in hex)."""

    mode: str
    kind: str = ""
    value: str = ""

    def refusal(self, key: PKey) -> str | None:
        """Why a key that is in no list of known ones is not good enough; None if it is."""
        if self.mode == "none":
            return None
        if self.mode == "known_hosts":
            return "no host key was found in known_hosts"
        found = hashlib.new(self.kind, key.asbytes(), usedforsecurity=False).hexdigest()
        if found == self.value.replace(":", "").lower():
            return None
        return (
            f"remote host {key.get_name()} key fingerprint '{self.kind}:{found}' does not match host_key_check "
            f"'{self.kind}:{self.value}'"
        )


def open_remote(name: str, address: Inet, user: str, path: str, check: HostKeyCheck) -> SshFile:
    """Opens `path` on a server for reading. `name`: what the file is called.

    Raises `RemoteError`, in QEMU's words where it has some; `UnsupportedError` without paramiko."""
    connected = connect(address)
    try:
        import paramiko
    except ImportError:
        connected.close()
        raise UnsupportedError("ssh needs the Python package paramiko, which is not installed") from None
    logging.getLogger("paramiko").addHandler(logging.NullHandler())  # what is wrong is told by exceptions
    logging.getLogger("paramiko").propagate = False

    class Judge(paramiko.MissingHostKeyPolicy):
        def missing_host_key(self, client: SSHClient, hostname: str, key: PKey) -> None:
            if (refusal := check.refusal(key)) is not None:
                raise RemoteError(refusal)

    client = paramiko.SSHClient()
    try:
        if check.mode == "known_hosts":
            client.load_system_host_keys()
        client.set_missing_host_key_policy(Judge())
        try:
            client.connect(address.host, int(address.port), user, sock=connected)
        except paramiko.BadHostKeyException:
            raise RemoteError("host key does not match the one in known_hosts") from None
        except (paramiko.SSHException, EOFError, OSError, ValueError) as error:
            transport = client.get_transport()
            if transport is None or not transport.is_active():
                raise RemoteError(f"failed to establish ssh session: {_readable(error)}") from None
            _enter_without_key(transport, user)
        return SshFile(name, client, _opened(client, path))
    except BaseException:
        client.close()
        connected.close()
        raise


def _enter_without_key(transport: Transport, user: str) -> None:
    """Some servers let everybody in."""
    import paramiko

    try:
        transport.auth_none(user)
    except (paramiko.SSHException, EOFError):
        raise RemoteError(
            "failed to authenticate using publickey authentication and the identities held by your ssh-agent"
        ) from None


def _opened(client: SSHClient, path: str) -> SFTPFile:
    import paramiko

    try:
        return client.open_sftp().open(path, "rb")
    except OSError as error:
        code = _CODES.get(error.errno or 0, _FAILURE)
        reason = f"{_readable(error)} (libssh error code: 1, sftp error code: {code})"
        raise RemoteError(f"failed to open remote file '{path}': SFTP server: {reason}") from None
    except (paramiko.SSHException, EOFError) as error:
        raise RemoteError(f"failed to initialize sftp handle: {_readable(error)}") from None


def _readable(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or "the connection was closed"
    return "".join(letter if letter.isprintable() else "?" for letter in text)


class SshFile(VirtualFile):
    """Implements `api.File`. Its length is what it was when it was opened."""

    def __init__(self, path: str, client: SSHClient, file: SFTPFile) -> None:
        super().__init__(path)
        self._client = client
        self._file = file
        self._lock = threading.Lock()
        try:
            self._length = file.stat().st_size or 0
        except Exception as error:
            raise RemoteError(f"failed to read file attributes: {_readable(error)}") from None

    def length(self) -> int:
        return self._length

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        inside = self._clipped(offset, buffer)
        wanted = [(offset + at, min(CHUNK, len(inside) - at)) for at in range(0, len(inside), CHUNK)]
        at = 0
        try:
            with self._lock:
                for (_, length), data in zip(wanted, self._file.readv(wanted), strict=True):
                    if len(data) != length:
                        raise EOFError
                    inside[at : at + length] = data
                    at += length
        except Exception as error:  # paramiko has many for what a server may do
            failed = OSError(errno.EIO, os.strerror(errno.EIO))
            raise StorageError(self._path, "read", failed) from error
        return len(inside)

    def close(self) -> None:
        self._client.close()
