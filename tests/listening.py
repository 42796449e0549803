"""A server of a test: a socket whose clients a thread accepts."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def accepting(listening: socket.socket, serve: Callable[[socket.socket], object]) -> Iterator[None]:
    """`serve` gets one client after the other meanwhile, in the thread that accepts them."""
    listening.listen()

    def accept() -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            serve(client)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
