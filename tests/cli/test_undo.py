"""undo, gc, the history beside an image and the configuration file, as users meet them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from test_program import run
from twin import safeimg

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-img and qemu-io are not installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An overlay of 3 MiB of data on a base that has other data there."""
    monkeypatch.setenv("SAFEIMG_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SAFEIMG_CONFIG", "")
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "8M")
    write(tmp_path, "base.qcow2", "write -P 1 0 2M")
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    write(tmp_path, "top.qcow2", "write -P 2 1M 3M")
    return tmp_path


def qemu(folder: Path, *words: str) -> None:
    subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def write(folder: Path, image: str, command: str) -> None:
    qemu(folder, "qemu-io", "-c", command, image)


def is_sound(folder: Path, image: str, *patterns: str) -> None:
    """qemu-img finds nothing wrong, not even leaks, and the guest sees what it should."""
    qemu(folder, "qemu-img", "check", "-q", image)
    for pattern in patterns:
        shown = subprocess.run(["qemu-io", "-c", f"read {pattern}", image], cwd=folder, capture_output=True, check=True)
        assert b"verification failed" not in shown.stdout, pattern


def done(folder: Path, *words: str) -> str:
    outcome = safeimg(list(words), folder)
    assert (outcome.code, outcome.stderr) == (0, b""), outcome
    return outcome.stdout.decode()


def test_a_commit_is_undone(folder: Path) -> None:
    """Also of the overlay that it emptied, by either image's name; the history tells of both."""
    sizes = [(folder / name).stat().st_size for name in ("base.qcow2", "top.qcow2")]
    done(folder, "commit", "top.qcow2")
    is_sound(folder, "base.qcow2", "-P 2 1M 3M")
    assert done(folder, "undo", "top.qcow2").startswith("top.qcow2: commit (")
    is_sound(folder, "base.qcow2", "-P 1 0 2M", "-P 0 2M 6M")
    is_sound(folder, "top.qcow2", "-P 1 0 1M", "-P 2 1M 3M")
    assert [(folder / name).stat().st_size for name in ("base.qcow2", "top.qcow2")] == sizes
    for name in ("base.qcow2", "top.qcow2"):
        first, second = json.loads(done(folder, "log", "--output", "json", name))
        assert (first["undone-by"], second["command"]) == (second["operation"], "undo")
        assert f"[undone by {second['operation'][:12]}]" in done(folder, "log", name)
        assert "verify" in done(folder, "audit", "verify", name)
    assert not list((folder / "state" / "undo").iterdir())


def test_exit_codes(folder: Path) -> None:
    assert safeimg(["undo"], folder).code == 2
    assert safeimg(["undo", "base.qcow2"], folder).code == 6
    done(folder, "snapshot", "-c", "one", "base.qcow2")
    assert safeimg(["undo", "base.qcow2", "ffff"], folder).code == 6
    write(folder, "base.qcow2", "write -P 3 4M 64k")
    refused = safeimg(["undo", "--output", "json", "base.qcow2"], folder)
    assert refused.code == 4 and json.loads(refused.stdout)["outcome"] == "conflict"
    assert refused.stderr.count(b"\n") == 1 and b"was changed since the snapshot" in refused.stderr
    assert "changed outside of this record" in done(folder, "log", "base.qcow2")
    verified = json.loads(done(folder, "audit", "verify", "--output", "json", "base.qcow2"))
    assert verified["verified"] and verified["changed-since"]
    assert "changed outside of this record" in done(folder, "audit", "verify", "base.qcow2")
    done(folder, "resize", "-q", "base.qcow2", "16M")
    assert json.loads(done(folder, "log", "--output", "json", "base.qcow2"))[-1]["changed-since"]
    assert "changed outside" not in done(folder, "audit", "verify", "base.qcow2")


def test_keep_undo(folder: Path) -> None:
    """What is too much is not kept: the command's option, else the variable."""
    done(folder, "commit", "--keep-undo", "1M", "top.qcow2")
    refused = safeimg(["undo", "base.qcow2"], folder)
    assert refused.code == 6 and b"too much to keep (--keep-undo)" in refused.stderr
    done(folder, "snapshot", "--keep-undo", "0", "-c", "one", "base.qcow2")
    assert b"nothing of the snapshot was to be kept" in safeimg(["undo", "base.qcow2"], folder).stderr
    assert safeimg(["snapshot", "--keep-undo", "much", "-c", "two", "base.qcow2"], folder).code == 1


def test_gc(folder: Path) -> None:
    done(folder, "snapshot", "-c", "one", "base.qcow2")
    done(folder, "snapshot", "-c", "two", "base.qcow2")
    assert json.loads(done(folder, "gc", "--output", "json"))["dropped"] == []
    assert "0 B dropped" in done(folder, "gc", "--older-than", "1d")
    shown = json.loads(done(folder, "gc", "--keep", "0", "--dry-run", "--output", "json"))
    assert len(shown["dropped"]) == 2 and shown["size"] > 0 == shown["left"]
    assert "would be dropped (old)" in done(folder, "gc", "--keep", "0", "--dry-run")
    assert done(folder, "gc", "--keep", "0").count("dropped (old)") == 2
    assert not list((folder / "state" / "undo").iterdir())
    refused = safeimg(["undo", "base.qcow2"], folder)
    assert refused.code == 6 and b"was dropped since it was kept" in refused.stderr
    for words in (["--older-than", "soon"], ["disk"]):
        assert safeimg(["gc", *words], folder).code == 2


def test_a_history_beside_the_image(folder: Path) -> None:
    done(folder, "snapshot", "-c", "one", "base.qcow2")
    head = done(folder, "audit", "anchor", "base.qcow2")
    assert "now beside it" in done(folder, "audit", "enable", "base.qcow2")
    assert "already beside it" in done(folder, "audit", "enable", "base.qcow2")
    assert done(folder, "audit", "anchor", "base.qcow2") == head
    done(folder, "undo", "base.qcow2")
    assert "verify" in done(folder, "audit", "verify", "--anchor", head.strip(), "base.qcow2")
    assert "now in the state directory" in done(folder, "audit", "disable", "base.qcow2")
    assert len(done(folder, "log", "base.qcow2").splitlines()) == 2
    assert not (folder / "base.qcow2.safeimg-history").exists()


def test_the_configuration_file(folder: Path) -> None:
    """The file is beaten by the environment, and that by an option."""
    config = folder / "safeimg.conf"
    config.write_text(f'keep-undo = 0\nstate-dir = "{folder}/elsewhere"\non-crash = "resume"\n')
    chosen = {"SAFEIMG_CONFIG": str(config)}
    assert run(folder, "snapshot", "-c", "one", "base.qcow2", SAFEIMG_STATE_DIR="", **chosen).returncode == 0
    assert not (folder / "elsewhere" / "undo").exists()
    run(folder, "snapshot", "-c", "two", "base.qcow2", SAFEIMG_KEEP_UNDO="1M", **chosen)
    run(folder, "snapshot", "-c", "three", "base.qcow2", "--keep-undo", "1M", **chosen)
    assert len(list((folder / "state" / "undo").glob("*.log"))) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"keep-undo = \n", "Invalid value (at line 1, column 13)"),
        (b"\xff\xfe", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"journal = 'maybe'", "journal is 'maybe'; it may be auto, require or off"),
        (b"keep-undo = true", "keep-undo is 'True'; it may be a size such as 64M"),
        (b"state-dir = 'here'", "state-dir is 'here'; it may be an absolute path"),
        (b"keep = 1", "there is no setting 'keep'; there are journal, on-crash, keep-undo, keep-undo-total, state-dir"),
        (b"[" * 60000, "TOML"),
        (b"#" * 70000, "a configuration file of more than 65536 bytes"),
    ],
)
def test_a_broken_configuration_file(tmp_path: Path, content: bytes, message: str) -> None:
    """One clear line, and nothing is done."""
    from safeimg.cli import config
    from safeimg.cli.errors import CommandError

    path = tmp_path / "safeimg.conf"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CommandError) as caught:
        patch.setenv("SAFEIMG_CONFIG", str(path))
        config.configure()
    (line,) = caught.value.messages
    assert line.startswith(f"{path}: ") and "\n" not in line and (message in line or message == "TOML")
