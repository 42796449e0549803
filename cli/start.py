"""What runs first: as little as possible, since some programs send SIGUSR1 (it asks for progress) right after they
have started this one, and it would end a process that does not listen for it yet. And what runs last."""

from __future__ import annotations

import gc
import os
import signal
import sys

GARBAGE = 50_000  # objects made between two looks for cycles: what imports make stays


def main() -> None:
    """The program."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    gc.set_threshold(GARBAGE, 10, 10)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy starts threads, which nobody here has work for
    from safeimg.cli.main import main as run

    try:
        run()
    except SystemExit as end:
        if isinstance(end.code, int) and _printed():
            os._exit(end.code)  # the system takes back at once what the interpreter would tidy up, piece by piece
        raise


def _printed() -> bool:
    """Whether everything that was printed is on its way."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        return False
    return True
