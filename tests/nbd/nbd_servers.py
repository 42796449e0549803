"""Real servers: qemu-nbd."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = "300"  # seconds that a server lives, should nobody stop it


@contextmanager
def qemu_nbd(folder: Path, *words: str, socket_name: str = "s") -> Iterator[None]:
    """A server that is ready, at the unix socket of this name unless `words` say otherwise."""
    place = () if "-p" in words else ("-k", str(folder / socket_name))
    with subprocess.Popen(
        ["timeout", LONGEST, "qemu-nbd", "-t", "-e", "20", *place, *words], cwd=folder, stderr=subprocess.PIPE
    ) as server:
        try:
            end = time.monotonic() + 20
            while not (folder / socket_name).exists() if place else not _answers(int(words[words.index("-p") + 1])):
                assert server.poll() is None and time.monotonic() < end, "qemu-nbd did not start"
                time.sleep(0.01)
            yield
        finally:
            server.terminate()
            (folder / socket_name).unlink(missing_ok=True)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
