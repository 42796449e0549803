"""--digest: what images show is on record, and `audit verify` compares it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from blake3 import blake3
from safeimg.journal import story
from safeimg.ops import content
from safeimg.ops.errors import OperationPaused
from test_undo import done, qemu
from twin import safeimg

pytestmark = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-img and qemu-io are not installed")

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An overlay with data, zeroes and nothing on a base of an odd size."""
    monkeypatch.setenv("SAFEIMG_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SAFEIMG_CONFIG", "")
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", str(8 * MIB + 512))
    qemu(tmp_path, "qemu-io", "-c", "write -P 1 0 2M", "-c", "write -P 4 8M 512", "base.qcow2")
    qemu(tmp_path, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    qemu(tmp_path, "qemu-io", "-c", "write -P 2 1M 100k", "-c", "write -P 3 5M 1", "-c", "write -z 0 1M", "top.qcow2")
    return tmp_path


def verified(folder: Path, image: str) -> object:
    return json.loads(done(folder, "audit", "verify", "--output", "json", image))["content"]


def on_record(folder: Path, image: str) -> list[list[object]]:
    """What the image's newest `Digested` holds."""
    events = [json.loads(line) for line in done(folder, "audit", "export", image).splitlines()]
    bodies = [event["body"] for event in events if event["kind"] == "Digested"]
    body = json.loads(bodies[-1]) if isinstance(bodies[-1], str) else bodies[-1]
    return body["images"]


def defined(folder: Path, image: str) -> str:
    """The digest by its definition, of what qemu-img reads."""
    raw = folder / "all.raw"
    qemu(folder, "qemu-img", "convert", "-O", "raw", image, str(raw))
    disk = raw.read_bytes()
    whole = blake3(len(disk).to_bytes(8, "big"))
    for number in range(-(-len(disk) // MIB)):
        piece = disk[number * MIB : (number + 1) * MIB]
        if any(piece):
            whole.update(number.to_bytes(8, "big") + blake3(piece).digest())
    return whole.hexdigest()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("top.qcow2", ("rebase", "-b", "")),
        ("top.qcow2", ("amend", "-o", "compat=0.10")),
        ("top.qcow2", ("snapshot", "-c", "one")),
        ("top.qcow2", ("bitmap", "--add")),
        ("base.qcow2", ("resize", "-q")),
        ("new.vdi", ("convert", "-O", "vdi", "top.qcow2")),
        ("new.raw", ("convert", "-O", "raw", "top.qcow2")),
        ("new.qcow2", ("convert", "-O", "qcow2", "-c", "top.qcow2")),
        ("new.qcow2", ("convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "top.qcow2")),
    ],
)
def test_what_is_recorded_is_what_is_shown(folder: Path, image: str, words: tuple[str, ...]) -> None:
    last = {"resize": ("9M",), "bitmap": ("bits",)}.get(words[0], ())
    done(folder, words[0], "--digest", *words[1:], image, *last)
    assert [entry[2] for entry in on_record(folder, image) if entry[0] == 0] == [defined(folder, image)]
    assert verified(folder, image) == "same"


def test_a_commit_tells_of_both_images(folder: Path) -> None:
    shown = defined(folder, "top.qcow2")
    done(folder, "commit", "-q", "--digest", "top.qcow2")
    assert {str(digest) for _, _, digest in on_record(folder, "base.qcow2")} == {shown}
    assert (verified(folder, "base.qcow2"), verified(folder, "top.qcow2")) == ("same", "same")
    done(folder, "undo", "top.qcow2")  # has none itself
    assert (verified(folder, "base.qcow2"), verified(folder, "top.qcow2")) == (None, None)


def test_changes_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a guest: told. By what leaves no other trace, a decaying disk, say: an error."""
    done(folder, "rebase", "-b", "", "--digest", "top.qcow2")
    qemu(folder, "qemu-io", "-c", "write -P 9 3M 1", "top.qcow2")
    assert "something else" in done(folder, "audit", "verify", "top.qcow2")
    monkeypatch.setattr(story, "changed_since", lambda history, image: None)
    refused = safeimg(["audit", "verify", "top.qcow2"], folder)
    assert refused.code == 4 and b"its content is not what its newest operation left" in refused.stderr
    assert refused.stderr.count(b"\n") == 1


def test_only_the_newest_operation_counts(folder: Path) -> None:
    done(folder, "snapshot", "--digest", "-c", "one", "base.qcow2")
    done(folder, "snapshot", "-c", "two", "base.qcow2")
    assert verified(folder, "base.qcow2") is None


def test_stopped_while_it_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else is done then; what resumes it makes the digest."""

    async def stopped(*words: object) -> bytes:
        raise OperationPaused("stopped by a test")

    with monkeypatch.context() as patched:
        patched.setattr(content, "content_digest", stopped)
        assert safeimg(["rebase", "--digest", "-b", "", "top.qcow2"], folder).code != 0
    assert b"rebase" in safeimg(["status", "top.qcow2"], folder).stdout
    done(folder, "resume", "top.qcow2")
    assert verified(folder, "top.qcow2") == "same"


def test_what_cannot_be_read_has_none(folder: Path) -> None:
    (folder / "base.qcow2").rename(folder / "gone.qcow2")
    outcome = safeimg(["rebase", "-u", "--digest", "-F", "qcow2", "-b", "else.qcow2", "top.qcow2"], folder)
    assert outcome.code == 0 and b"no digest of its content" in outcome.stderr
    assert verified(folder, "top.qcow2") is None
