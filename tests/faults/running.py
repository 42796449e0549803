"""A folder with a commit to be done in it, and real safeimg processes at work there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.journal.errors import JournalError
from safeimg.journal.events import Event, StepPrepared
from safeimg.journal.log import read_events

SIZE = 4 << 20
STEP = 512 << 10
# The program with small steps: at `-r 4M`, each takes an eighth of a second, all of them one.
PROGRAM = (
    "from safeimg.cli.main import main; from safeimg.ops.commit_job import commit\n"
    f"commit.__kwdefaults__['step_bytes'] = {STEP}; main()"
)
SLOW = ("commit", "-r", "4M", "top.qcow2")
HELD = ("commit", "-r", "512k", "top.qcow2")  # runs for as long as a test needs, which then stops it


class Folder:
    """A base of "old" and an overlay of "new", and the processes at work on them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.base = path / "base.raw"
        self.log = path / "base.raw.safeimg"
        self.old = os.urandom(SIZE)
        self.new = os.urandom(SIZE)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.base.write_bytes(self.old)
        (path / "new.raw").write_bytes(self.new)
        for words in ("convert -O qcow2 new.raw top.qcow2", "rebase -u -b base.raw -F raw top.qcow2"):
            subprocess.run(["qemu-img", *words.split()], cwd=path, check=True)
        (path / "new.raw").unlink()

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words],
            cwd=self.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "SAFEIMG_STATE_DIR": str(self.path / "state")},
        )
        self.processes.append(process)
        return process

    def done(self, *words: str) -> str:
        """Runs a command that has to succeed; what it printed."""
        process = self.start(*words)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, b"")
        return out.decode()

    def events(self) -> list[Event]:
        try:
            return read_events(LocalFileSystem(), str(self.log)) if self.log.exists() else []
        except (JournalError, OSError):
            return []

    def begun(self, *words: str, steps: int = 3) -> subprocess.Popen[bytes]:
        """A command that has prepared so many steps, and has more still to come."""
        process = self.start(*words)
        while sum(isinstance(event, StepPrepared) for event in self.events()) < steps:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> str:
        """Stops a held command at once, and takes it back; what it said on stderr."""
        assert process.poll() is None, "ended too early"
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        out, err = process.communicate(timeout=60)
        # The second one may find it on its way out, its own handlers gone: a shell sees the same status.
        assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM) and out == b"", err
        self.done("rollback", "top.qcow2")
        assert self.base.read_bytes() == self.old and self.left() == []
        return err.decode()

    def left(self) -> list[str]:
        return sorted(name for name in os.listdir(self.path) if ".safeimg" in name)
