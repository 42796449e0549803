"""A folder with a commit to be done in it, and real safeimg processes at work there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.journal.errors import JournalError
from safeimg.journal.events import Declared, Event, StepPrepared
from safeimg.journal.log import read_events

SIZE = 4 << 20
STEP = 512 << 10
# The program with small steps: at `-r 4M`, each takes an eighth of a second, all of them one.
PROGRAM = (
    "from safeimg.cli.main import main; from safeimg.ops.commit_job import commit\n"
    f"commit.__kwdefaults__['step_bytes'] = {STEP}; main()"
)
COMMIT = ("commit", "top.qcow2")
SLOW = ("commit", "-r", "4M", "top.qcow2")
HELD = ("commit", "-r", "512k", "top.qcow2")  # runs for as long as a test needs, which then stops it

Kept = dict[Path, tuple[bytes, int]]  # of each file: what is in it, and its modification time


class Folder:
    """A base of "old" and an overlay of "new", and the processes at work on them."""

    def __init__(self, path: Path, base: str = "base.raw", *, compat: str = "1.1") -> None:
        """`base`: its name, which ends with its format. `compat`: of qcow2 images, "0.10" is version 2."""
        self.path = path
        self.format = base.rpartition(".")[2]
        self.base, self.top = path / base, path / "top.qcow2"
        self.log = path / f"{base}.safeimg"
        self.state = path / "state"
        self.old = os.urandom(SIZE // 2) + bytes(SIZE // 2)  # the half of it has no space yet
        self.new = os.urandom(SIZE)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.more: list[Path] = []  # files elsewhere that belong to it
        for image, content in ((self.base, self.old), (self.top, self.new)):
            fmt = image.suffix[1:]
            raw = path / "content"
            raw.write_bytes(content)
            options = ["-o", f"compat={compat}"] if fmt == "qcow2" else []
            subprocess.run(["qemu-img", "convert", "-O", fmt, *options, raw, image], check=True)
            raw.unlink()
        rebase = ["qemu-img", "rebase", "-u", "-b", base, "-F", self.format, self.top.name]
        subprocess.run(rebase, cwd=path, check=True)

    def start(
        self, *words: str, under: Sequence[str] = (), program: str = PROGRAM, python: str = sys.executable,
        environment: Mapping[str, str] | None = None, **process: Any,
    ) -> subprocess.Popen[bytes]:  # fmt: skip
        """`under`: a command that runs safeimg's. `process`: for `subprocess.Popen`."""
        process.setdefault("stdout", subprocess.PIPE)
        started = subprocess.Popen(
            [*under, python, "-c", program, *words],
            cwd=self.path,
            stderr=subprocess.PIPE,
            env={**os.environ, "SAFEIMG_STATE_DIR": str(self.state), **(environment or {})},
            **process,
        )
        self.processes.append(started)
        return started

    def ends(self, *words: str, **how: Any) -> tuple[int, str, str]:
        """The exit code of a command, and what it printed on stdout and stderr."""
        process = self.start(*words, **how)
        out, err = process.communicate(timeout=120)
        return process.returncode, (out or b"").decode(), err.decode()

    def fails(self, *words: str, code: int = 1, **how: Any) -> str:
        """The one line of a command that fails: nothing on stdout."""
        ended, out, err = self.ends(*words, **how)
        assert (ended, out, err.count("\n")) == (code, "", 1), (ended, out, err)
        assert "internal error" not in err
        return err.rstrip("\n")

    def done(self, *words: str, **how: Any) -> str:
        """Runs a command that has to succeed; what it printed."""
        ended, out, err = self.ends(*words, **how)
        assert (ended, err) == (0, ""), err
        return out

    def events(self) -> list[Event]:
        try:
            if not self.log.exists():
                return []
            return read_events(LocalFileSystem(), str(self.log), image_owner=self.base.stat().st_uid)
        except (JournalError, OSError):
            return []

    def begun(self, *words: str, steps: int = 3, **how: Any) -> subprocess.Popen[bytes]:
        """A command that has prepared so many steps, and has more still to come."""
        process = self.start(*words, **how)
        while sum(isinstance(event, StepPrepared) for event in self.events()) < steps:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return process

    def killed(self, *words: str, **how: Any) -> None:
        """A command killed half-way."""
        process = self.begun(*(words or SLOW), **how)
        (declared,) = (event for event in self.events() if isinstance(event, Declared))
        os.kill(declared.owner.pid, signal.SIGKILL)
        process.communicate()

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
        assert self.shown(self.base) == self.old and self.left() == []
        return err.decode()

    def left(self) -> list[str]:
        return sorted(name for name in os.listdir(self.path) if ".safeimg" in name)

    def shown(self, image: Path) -> bytes:
        """What a guest reads from the image, as qemu-img sees it. Its metadata has to be sound, but for leaks while
        something is pending."""
        if image.suffix == ".raw":
            return image.read_bytes()
        checked = subprocess.run(["qemu-img", "check", image], capture_output=True, check=False)
        assert checked.returncode in ((0, 3) if self.left() else (0,)), checked
        with tempfile.TemporaryDirectory() as elsewhere:  # the folder's disk may be full
            raw = Path(elsewhere) / "content"
            subprocess.run(["qemu-img", "convert", "-t", "unsafe", "-O", "raw", image, raw], check=True)
            return raw.read_bytes()

    def kept(self) -> Kept:
        """Everything in the folder, to be put back as it is now."""
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in self._files()}

    def _files(self) -> list[Path]:
        sidecars = [path for log in self.more for path in log.parent.glob(f"{log.name}*")]
        return [path for path in (*self.path.rglob("*"), *sidecars) if path.is_file() and path.name != "filler"]

    def put_back(self, kept: Kept) -> None:
        """Everything in the folder is as it was, times too; images are the same files."""
        for path in self._files():
            if path not in kept:
                path.unlink()
        for path, (content, time_ns) in kept.items():
            with path.open("r+b" if path.exists() else "xb") as file:
                file.truncate(len(content))
                file.write(content)
            if path not in (self.base, self.top):
                path.chmod(0o600)
            os.utime(path, ns=(time_ns, time_ns))

    def settles_both_ways(self, more_room: Callable[[], object] = lambda: None, **how: Any) -> None:
        """What is pending shows what the guest had; it can be taken back, and it can be finished instead, if there is
        `more_room`."""
        assert self.left(), "nothing is pending"
        kept = self.kept()
        assert self.shown(self.top) == self.new
        self._settled("rollback", self.old, **how)
        more_room()
        self.put_back(kept)
        self._settled("resume", self.new, **how)

    def _settled(self, verb: str, content: bytes, **how: Any) -> None:
        self.done(verb, self.base.name, **how)
        assert self.shown(self.base) == content, verb
        assert self.shown(self.top) == self.new and self.left() == []
