"""What runs first: as little as possible, since some programs send SIGUSR1 (it asks for progress) right after they
have started this one, and it would end a process that does not listen for it yet."""

from __future__ import annotations

import gc
import signal

GARBAGE = 50_000  # objects made between two looks for cycles: what imports make stays


def main() -> None:
    """The program."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    gc.set_threshold(GARBAGE, 10, 10)
    from safeimg.cli.main import main as run

    run()
