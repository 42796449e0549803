"""The program as a process: how it starts, what it calls itself, how it fails, how it is interrupted."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safeimg.drivers.errors import DriverError
from safeimg.drivers.formats import registry
from safeimg.drivers.formats.protocols import opened
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.journal.errors import JournalError
from safeimg.journal.events import StepPrepared
from safeimg.journal.log import read_events
from twin import safeimg

MAIN = "import sys; sys.argv[0] = {name!r}; from safeimg.cli.main import main; main()"


def run(
    folder: Path, *arguments: str, name: str = "safeimg", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", MAIN.format(name=name), *arguments],
        cwd=folder, capture_output=True, timeout=60, env=_environment(folder) | environment,
    )  # fmt: skip


def _environment(folder: Path) -> dict[str, str]:
    """With bytecode kept for the next process of this run, whatever the caller's environment says."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    kept |= {"SAFEIMG_STATE_DIR": str(folder / "state"), "TERM": "dumb"}
    return kept | {"PYTHONPYCACHEPREFIX": str(folder.parent / "bytecode")}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    assert run(tmp_path, "create", "-q", "-f", "qcow2", "disk.qcow2", "10M").returncode == 0
    return tmp_path


@pytest.mark.parametrize("command", ["info", "map", "check"])
def test_nothing_heavy_is_imported(disk: Path, command: str) -> None:
    code = (
        "import sys; from safeimg.cli.main import guarded; sys.argv = ['safeimg', *sys.argv[1:]]; "
        "code = guarded(sys.argv); "
        "heavy = {'trio', 'sqlite_utils', 'sqlite3', 'typer', 'click', 'rich', 'argparse', 'json', 'numpy', "
        "'paramiko', 'safeimg.drivers.storage.nbd', 'safeimg.drivers.formats.nbd_names'}; "
        f"allowed = {{'numpy'}} if {command!r} == 'check' else set(); "
        "print(sorted((heavy - allowed) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, command, "disk.qcow2"], cwd=disk, capture_output=True, timeout=60
    )
    assert done.stderr.decode().splitlines()[-1] == "[]"
    assert done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("bitmap", "--add", "disk.qcow2", "b"),
        ("amend", "-o", "lazy_refcounts=on", "disk.qcow2"),
        ("rebase", "-u", "-b", "", "disk.qcow2"),
        ("resize", "disk.qcow2", "20M"),
    ],
)
def test_a_change_of_metadata_imports_nothing_heavy(disk: Path, words: tuple[str, ...]) -> None:
    """Once there is a history. Its tables are made by sqlite_utils, without numpy, which that would like to import."""
    code = (
        "import sys; from safeimg.cli.main import guarded; sys.argv = ['safeimg', *sys.argv[1:]]; "
        "code = guarded(sys.argv); heavy = ('sqlite_utils', 'sqlite3', 'numpy', 'trio'); "
        "print(code, [name for name in heavy if name in sys.modules])"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, *line], cwd=disk, env=_environment(disk), capture_output=True, timeout=60
        ).stdout.decode().splitlines()[-1]
        for line in (("bitmap", "--add", "disk.qcow2", "first"), words)
    ]  # fmt: skip
    assert said == ["0 ['sqlite_utils', 'sqlite3']", "0 ['sqlite3']"]


def test_names(tmp_path: Path) -> None:
    assert run(tmp_path, "--foo").stderr.startswith(
        b"safeimg: unrecognized option '--foo'\nTry 'safeimg --help'"
    )
    assert run(tmp_path, "--foo", name="/usr/bin/qemu-img").stderr.startswith(
        b"qemu-img: unrecognized option"
    )
    assert run(tmp_path, "--version").stdout.startswith(b"safeimg version ")
    assert run(tmp_path, "--version", name="qemu-img").stdout.startswith(b"qemu-img version 7.2")


def test_help(tmp_path: Path) -> None:
    overview = run(tmp_path, "--help").stdout.decode()
    for name in ("create", "commit", "resume", "rollback", "status"):
        assert name in overview
    formats = overview.splitlines()[-1].removeprefix("Supported formats: ").split()
    assert formats == sorted((*registry.names(), *opened()))
    commit = run(tmp_path, "commit", "-h")
    assert commit.returncode == 0
    assert b"safeimg commit -b base.qcow2 top.qcow2" in commit.stdout
    assert b"rollback BASE" in commit.stdout


def test_completion(tmp_path: Path) -> None:
    def complete(line: str, position: int) -> list[str]:
        done = run(tmp_path, _SAFEIMG_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(position))
        return done.stdout.decode().split()

    assert complete("safeimg com", 1) == ["compare", "commit"]
    assert "--backing-chain" in complete("safeimg info --b", 2)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("MemoryError()", "out of memory"), ("RecursionError()", "nested too deeply"),
        ("OSError(5, 'Input/output error', 'a.img')", "a.img: Input/output error"), ("KeyError('x')", "internal error"),
        ("ExceptionGroup('', [DriverError('a.img: bad')])", "a.img: bad"),
    ],
)  # fmt: skip
def test_one_line_whatever_happens(tmp_path: Path, failure: str, message: str) -> None:
    code = (
        "import sys; from safeimg.cli import main, info; from safeimg.drivers.errors import DriverError\n"
        f"def run(*_): raise {failure}\n"
        "info.run = run; sys.argv = ['safeimg', 'info', 'x']; main.main()"
    )
    environment = _environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1 and lines[0].startswith("safeimg: ") and message in lines[0]
    environment["SAFEIMG_DEBUG"] = "1"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60)
    assert b"Traceback" in shown.stderr


def test_a_reader_that_goes_away(disk: Path) -> None:
    for index in range(200):
        (disk / f"{index}.raw").write_bytes(b"x" * 512)
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", MAIN.format(name="safeimg"), "info", "disk.qcow2"],
        cwd=disk, stdout=write, stderr=subprocess.PIPE, timeout=60,
    )  # fmt: skip
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == b""


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A raw base of 16 MiB and an overlay that was written to."""
    (tmp_path / "base.raw").write_bytes(b"old." * (4 << 20))
    top = ["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"]
    assert run(tmp_path, *top).returncode == 0
    return tmp_path


def _fill(folder: Path) -> None:
    subprocess.run(
        ["qemu-io", "-c", "write -P 7 0 16M", "top.qcow2"], cwd=folder, check=True, capture_output=True
    )


@pytest.mark.skipif(
    not any((Path(p) / "qemu-io").exists() for p in os.environ["PATH"].split(":")), reason="no qemu-io"
)
def _has_begun(log: Path) -> bool:
    """Whether the first step of what is pending is on record."""
    try:
        return any(isinstance(event, StepPrepared) for event in read_events(LocalFileSystem(), str(log)))
    except (JournalError, DriverError):
        return False


class TestCommit:
    def test_progress_as_json(self, chain: Path) -> None:
        _fill(chain)
        done = run(chain, "commit", "--progress=json", "top.qcow2")
        assert done.returncode == 0, done.stderr
        *lines, last = done.stdout.decode().splitlines()
        assert last == "Image committed."
        assert json.loads(lines[-1])["percent"] == 100.0
        assert (chain / "base.raw").read_bytes() == b"\7" * (16 << 20)

    def test_history(self, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SAFEIMG_STATE_DIR", str(chain / "state"))
        _fill(chain)
        assert safeimg(["log", "base.raw"], chain).stdout == b"base.raw: nothing on record\n"
        assert run(chain, "commit", "--object", "secret,id=a,data=hunter2", "top.qcow2").returncode == 0
        operations = json.loads(safeimg(["log", "--output=json", "base.raw"], chain).stdout)
        assert [entry["outcome"] for entry in operations] == ["completed"]
        assert operations[0]["arguments"] == ["commit", "top.qcow2"]  # without the secret
        shown = safeimg(["show", "base.raw", operations[0]["operation"][:8]], chain)
        assert b"Declared" in shown.stdout and b"Completed" in shown.stdout
        audited = json.loads(safeimg(["audit", "verify", "--output=json", "base.raw"], chain).stdout)
        assert audited["verified"] and audited["operations"] == 1
        assert safeimg(["audit", "verify", "--anchor", audited["head"], "base.raw"], chain).code == 0
        foreign = safeimg(["audit", "verify", "--anchor", "00" * 32, "base.raw"], chain)
        assert foreign.code == 4 and b"anchor" in foreign.stderr
        assert safeimg(["audit", "anchor", "base.raw"], chain).stdout.decode() == audited["head"] + "\n"
        assert safeimg(["audit", "anchor", "--output=json", "new.raw"], chain).code == 1  # no such file
        exported = safeimg(["audit", "export", "base.raw"], chain).stdout.decode().splitlines()
        events = [json.loads(line) for line in exported]
        assert len(events) == audited["events"] and events[-1]["hash"] == audited["head"]
        assert [one["hash"] for one in events[:-1]] == [other["previous"] for other in events[1:]]
        table = safeimg(["audit", "export", "--format", "csv", "base.raw"], chain).stdout.decode()
        rows = list(csv.DictReader(table.splitlines()))
        assert [(row["kind"], row["hash"]) for row in rows] == [(one["kind"], one["hash"]) for one in events]
        assert json.loads(rows[0]["body"]) == events[0]["body"]
        assert safeimg(["audit", "export", "--format", "xml", "base.raw"], chain).code == 2

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signals_pause(
        self, chain: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("SAFEIMG_STATE_DIR", str(chain / "state"))
        _fill(chain)
        before = (chain / "base.raw").read_bytes()
        process = self._start(chain, "commit", "-r", "4M", "top.qcow2")
        self._interrupt(chain, process, number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err
        assert b"safeimg resume top.qcow2" in err and b"safeimg rollback top.qcow2" in err
        assert err.count(b"\n") == 1
        assert out == b""
        for where in (["base.raw"], ["top.qcow2"], ["."], ["--all"], [], ["--scan", "."]):
            status = safeimg(["status", "--output=json", *where], chain)
            assert status.code == 3
            (pending,) = json.loads(status.stdout)
            assert (pending["command"], pending["condition"]) == ("commit", "paused")
            assert pending["image"].endswith("base.raw")
        assert b"safeimg rollback base.raw" in safeimg(["status", "base.raw"], chain).stdout
        refused = run(chain, "create", "-f", "raw", "base.raw", "1M")
        assert refused.returncode == 3 and b"safeimg resume" in refused.stderr
        taken_back = run(chain, "rollback", "--output=json", "base.raw")
        assert taken_back.returncode == 0, taken_back.stderr
        assert json.loads(taken_back.stdout)["outcome"] == "done"
        assert (chain / "base.raw").read_bytes() == before
        assert safeimg(["resume", "base.raw"], chain).stdout == b"base.raw: nothing is pending\n"
        assert safeimg(["status", "--all"], chain) == (0, b"nothing is pending\n", b"")

    def test_a_killed_commit_is_resumed(self, chain: Path) -> None:
        _fill(chain)
        process = self._start(chain, "commit", "-r", "4M", "top.qcow2")
        self._interrupt(chain, process, signal.SIGKILL)
        process.communicate(timeout=60)
        pending = json.loads(safeimg(["status", "--output=json", "top.qcow2"], chain).stdout)
        assert [each["condition"] for each in pending] == ["interrupted"]
        done = run(chain, "resume", "top.qcow2")
        assert done.returncode == 0, done.stderr
        assert (chain / "base.raw").read_bytes() == b"\7" * (16 << 20)

    @staticmethod
    def _start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", MAIN.format(name="safeimg"), *arguments],
            cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment(folder),
        )  # fmt: skip

    @staticmethod
    def _interrupt(folder: Path, process: subprocess.Popen[bytes], number: int) -> None:
        """Once the operation is on record and has begun."""
        while process.poll() is None and not _has_begun(folder / "base.raw.safeimg"):
            time.sleep(0.02)
        process.send_signal(number)


def test_recovery_of_nothing(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEIMG_STATE_DIR", str(disk / "state"))
    for verb in ("resume", "rollback", "abandon"):
        assert safeimg([verb, "disk.qcow2"], disk) == (0, b"disk.qcow2: nothing is pending\n", b"")
        assert safeimg([verb], disk).code == 2
    assert safeimg(["resume", "missing.qcow2"], disk).code == 1


def test_sigusr1_shows_progress(tmp_path: Path) -> None:
    """Asked by a signal, compare says on stderr how far it is."""
    code = (
        "import os, signal, sys\n"
        "from safeimg.cli import commands, parser, progress\n"
        "arguments, _ = parser.parse(commands.find('compare'), ['compare', 'a', 'b'])\n"
        "with progress.display(arguments) as shown:\n"
        "    shown.report(1, 4); os.kill(os.getpid(), signal.SIGUSR1); shown.report(2, 4); shown.report(3, 4)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"", b"    (50.00/100%)\n")


def test_a_full_disk_for_the_output_is_one_line(disk: Path) -> None:
    program = [sys.executable, "-c", MAIN.format(name="safeimg"), "--version"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, timeout=60, env=_environment(disk))
    assert (done.returncode, done.stderr) == (1, b"safeimg: No space left on device\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
@pytest.mark.parametrize(
    ("line", "code"), [("info disk.qcow2", 0), ("snapshot -c s disk.qcow2", 0), ("info nothing", 1)]
)
def test_streams_that_lead_nowhere(disk: Path, closed: str, line: str, code: int) -> None:
    """As with qemu-img, the work is done all the same; and nothing is printed into an image."""
    shell = f'"$@" {line} {closed}'
    program = [sys.executable, "-c", MAIN.format(name="qemu-img")]
    done = subprocess.run(
        ["sh", "-c", shell, "sh", *program], cwd=disk, capture_output=True, timeout=60, env=_environment(disk)
    )
    assert (done.returncode, done.stderr.replace(b"qemu-img: Could not open 'nothing': ", b"")) in (
        (code, b""), (code, b"Could not open 'nothing': No such file or directory\n")
    )  # fmt: skip
    assert safeimg(["check", "disk.qcow2"], disk).code == 0
