"""Runs one case: QEMU's own `check` in a folder made for this case alone, with the program that is to be judged as
`qemu-img`, and the real qemu-io and qemu-nbd."""

from __future__ import annotations

import enum
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from conformance.source import NAMED, SAMPLES

# `check` asks a qemu-system for its machines, and a case may ask it which drivers there are. No listed case starts one.
# The drivers are those of the program judged: `qemu-img --help` ends with the same line.
SYSTEM = """\
#!/bin/sh
case "$*" in
*"-machine help") ;;
*"-drive format=help") exec "$QEMU_IMG_PROG" --help ;;
*) echo "$0: there is no qemu-system here" >&2; exit 1 ;;
esac
"""

PROGRAM = """\
#!{python}
from safeimg.cli.main import main

main()
"""

_RESULT = re.compile(r"^(ok|not ok) \S+ \S+?( # SKIP)?$", re.MULTILINE)


class Status(enum.Enum):
    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case: `reason` says why it was not run or how it failed, `diff` how its output differs."""

    format: str
    case: str
    status: Status
    seconds: float
    reason: str = ""
    diff: str = ""
    output: bytes | None = None


@dataclass(frozen=True, slots=True)
class Tools:
    """The programs that cases use; `image` is the one judged."""

    image: Path
    io: Path
    nbd: Path
    system: Path


def prepare(folder: Path, program: Path | None) -> Tools:
    """Makes the programs in `folder`: `qemu-img` is `program`, or safeimg. `FileNotFoundError` without qemu-io."""
    image, system = folder / "qemu-img", folder / "qemu-system"
    if program is not None:
        image.symlink_to(program.resolve())
    else:
        _script(image, PROGRAM.format(python=sys.executable))
    _script(system, SYSTEM)
    return Tools(image=image, io=_installed("qemu-io"), nbd=_installed("qemu-nbd"), system=system)


def run(iotests: Path, tools: Tools, format: str, case: str, timeout: float) -> Outcome:
    """Runs a case; one that takes more than `timeout` seconds is killed and has failed."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="iotest-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _lay_out(iotests, case, folder)
        words = [sys.executable, "check", f"-{format}", "-tap", case]
        with subprocess.Popen(
            words,
            cwd=folder / "iotests",
            env=_environment(iotests, tools, folder),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            late = False
            try:
                out, err = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                late = True
            finally:  # whoever is still there: the case after a timeout, a server that it forgot
                _kill(process.pid)
            if late:
                out, err = process.communicate()
        seconds = time.monotonic() - started
        status, reason = judge(out.decode(errors="replace"))
        if late:
            status, reason = Status.FAILED, f"killed after {timeout:.0f} s"
        if status is Status.NOT_RUN:
            reason = _read(folder / "scratch" / f"{case}.notrun").decode(errors="replace").strip()
        output = _read(folder / "scratch" / f"{case}.out.bad") if status is Status.FAILED else None
        return Outcome(format, case, status, seconds, reason, err.decode(errors="replace"), output)


def judge(tap: str) -> tuple[Status, str]:
    """The verdict in what `check -tap` printed on a single case."""
    found = _RESULT.findall(tap)
    if len(found) != 1:
        return Status.FAILED, "check gave no result"
    verdict, skipped = found[0]
    if verdict != "ok":
        return Status.FAILED, "the output differs"
    return (Status.NOT_RUN if skipped else Status.PASSED), ""


def _lay_out(iotests: Path, case: str, folder: Path) -> None:
    """A copy of the harness with this one case: cases write into the folder that they lie in."""
    copy = folder / "iotests"
    (copy / NAMED).mkdir(parents=True)
    for path in iotests.iterdir():
        if path.is_file() and (not path.name[0].isdigit() or path.name.partition(".")[0] == case):
            shutil.copy(path, copy)
    for path in (iotests / NAMED).iterdir():
        if path.name.partition(".")[0] == case:
            shutil.copy(path, copy / NAMED)


def _environment(iotests: Path, tools: Tools, folder: Path) -> dict[str, str]:
    """The same for every case, whatever the caller's is."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "TMPDIR", "USER") if name in os.environ}
    kept["PATH"] = kept.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return kept | {
        "HOME": str(folder),
        "SAFEIMG_STATE_DIR": str(folder / "state"),
        "QEMU_PROG": str(tools.system),
        "QSD_PROG": str(tools.system),
        "QEMU_IMG_PROG": str(tools.image),
        "QEMU_IO_PROG": str(tools.io),
        "QEMU_NBD_PROG": str(tools.nbd),
        "TEST_DIR": str(folder / "scratch"),
        "SOCK_DIR": str(folder / "sock"),
        "SAMPLE_IMG_DIR": str(iotests / SAMPLES),
    }


def _kill(session: int) -> None:
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _installed(name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed (Debian: qemu-utils)")
    return Path(found)
