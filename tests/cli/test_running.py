"""Signals while a command is stopped by one."""

from __future__ import annotations

import os
import signal

import pytest
from safeimg.cli import running
from safeimg.cli.errors import CommandError
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import Display
from safeimg.ops.errors import OperationPaused
from safeimg.ops.launch import Environment


def test_how_to_go_on_is_told_whatever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second and third signal come while that is being found out."""

    async def work(around: Environment) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert around.stop() == "SIGTERM"
        raise OperationPaused("SIGTERM")

    def ways_out(image: str) -> str:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        return f"so go on with {image}"

    monkeypatch.setattr(running, "ways_out", ways_out)
    with pytest.raises(CommandError, match=r"stopped by SIGTERM; so go on with disk\.raw") as told:
        running.run_stoppable(Arguments(), Display(None), work, image="disk.raw")
    assert told.value.code == 128 + signal.SIGTERM
