"""What runs first: as little as possible, since some programs send SIGUSR1 (it asks for progress) right after they
have started this one, and it would end a process that does not listen for it yet."""

from __future__ import annotations

import signal


def main() -> None:
    """The program."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    from safeimg.cli.main import main as run

    run()
