"""Images in what is no file of this machine: null-co, blkdebug, quorum. What is printed is compared with qemu-img."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safeimg.drivers.errors import StorageError, SyncFailed, UsageError
from safeimg.drivers.storage.blkdebug import Blkdebug, Rule, read_rules, rules_of
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.storage.null import NullFile
from safeimg.drivers.storage.quorum import Quorum
from twin import assert_same, qemu_img, qemu_io, safeimg

needs_qemu = pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-utils are not installed")

FILE = '{"driver": "file", "filename": "%s"}'
COPIES = f'"children": [{FILE % "top.qcow2"}, {FILE % "copy.qcow2"}]'
QUORUM = f'json:{{"driver": "qcow2", "file": {{"driver": "quorum", "vote-threshold": 1, {COPIES}}}}}'
DEBUGGED = (
    "driver=blkdebug,image.driver=qcow2,image.file.driver=file,image.file.filename=top.qcow2,align=4k"
)

LINES = (
    ["info", "null-co://"],
    ["info", "null-aio://"],
    ["info", "--output=json", 'json:{"driver": "null-co"}'],
    ["info", 'json:{"driver": "null-co", "size": 1048576, "read-zeroes": true}'],
    ["info", 'json:{"driver": "raw", "file": {"driver": "null-co", "size": "1M"}}'],
    ["map", "--output=json", 'json:{"driver": "null-co", "size": 1048576, "read-zeroes": true}'],
    ["compare", "null-co://", 'json:{"driver": "null-co", "read-zeroes": true}'],
    ["info", "null-co://name"],
    ["info", 'json:{"driver": "null-co", "odd": 1}'],
    ["info", "blkdebug::top.qcow2"],
    ["info", "--output=json", "--backing-chain", "blkdebug:read.conf:top.qcow2"],
    ["info", f'json:{{"driver": "qcow2", "file": {{"driver": "blkdebug", "image": {FILE % "top.qcow2"}}}}}'],
    ["info", f'json:{{"driver": "qcow2", "file": {{"driver": "blkdebug", "config": 42, "image": {FILE % "x"}}}}}'],
    ["info", 'json:{"driver": "qcow2", "file": {"driver": "blkdebug"}}'],
    ["info", 'json:{"driver": "qcow2", "file": {"driver": "blkdebug", "image": "node"}}'],
    ["info", f'json:{{"driver": "qcow2", "file": {{"driver": "blkdebug", "image": {FILE % "x"}, "odd": 1}}}}'],
    ["info", "blkdebug:read.conf"],
    ["info", "blkdebug:missing.conf:top.qcow2"],
    ["map", "--image-opts", DEBUGGED],
    ["map", "--output=json", "--image-opts", DEBUGGED],
    ["compare", "blkdebug:read.conf:top.qcow2", "top.qcow2"],
    ["compare", "blkdebug:read.conf:base.qcow2", "small.qcow2"],
    ["convert", "-O", "qcow2", "blkdebug:read.conf:top.qcow2", "new.qcow2"],
    ["info", QUORUM],
    ["info", "--output=json", QUORUM],
    ["info", "--backing-chain", QUORUM],
    ["map", QUORUM],
    ["info", f"json:{{'driver': 'quorum', 'vote-threshold': 3, {COPIES}}}".replace('"', "'")],
    ["info", f"json:{{'driver': 'quorum', {COPIES}}}".replace('"', "'")],
    ["info", "json:{'driver': 'quorum', 'vote-threshold': 1}"],
    ["info", f"json:{{'driver': 'quorum', 'vote-threshold': 1, 'read-pattern': 'odd', {COPIES}}}".replace('"', "'")],
)
CONFIGS = (
    '[inject-errors]\nevent = "read_aio"',
    '[inject-error]\nevent = "read_odd"',
    '[inject-error]\nevent = "read_aio"\nodd = "1"',
    '[inject-error]\nevent = "read_aio"\nerrno="1"',
    '[inject-error]\nerrno = "1"',
    'event = "read_aio"',
    '[inject-error]\nevent = "read_aio"\nerrno = "odd"',
    '[inject-error]\nevent = "read_aio"\nonce = "odd"',
    '[inject-error]\nevent = "none"\niotype = "odd"',
    '# comment\n\n[inject-error "name"]\n  event = "write_aio"\n[set-state]\nevent = "flush_to_disk"\nnew_state ="3"',
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protocols")
    qemu_img(["create", "-f", "qcow2", "base.qcow2", "4M"], folder)
    qemu_img(["create", "-f", "qcow2", "small.qcow2", "1M"], folder)
    qemu_io(folder, "-c", "write 0 1M", "base.qcow2")
    qemu_img(["create", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "top.qcow2"], folder)
    qemu_io(folder, "-c", "write 1M 64k", "top.qcow2")
    (folder / "copy.qcow2").write_bytes((folder / "top.qcow2").read_bytes())
    (folder / "read.conf").write_text('[inject-error]\nevent = "read_aio"\nerrno = "5"\nonce ="off"\n')
    return folder


@needs_qemu
@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_the_same_as_qemu_img(images: Path, line: list[str]) -> None:
    assert_same(line, images)


@needs_qemu
@pytest.mark.parametrize("config", CONFIGS)
def test_the_same_of_a_configuration(images: Path, config: str) -> None:
    (images / "some.conf").write_text(config + "\n")
    assert_same(["info", "blkdebug:some.conf:top.qcow2"], images)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    return path


def test_a_request_fails_in_the_state_and_sector_named(file: Path) -> None:
    rules = [
        Rule("write_aio", 1, new_state=2),
        Rule("write_aio", 2, code=28, sector=1),
        Rule("flush_to_disk", code=5, requests=("flush",), once=True),
    ]
    with_rules = Blkdebug(LocalFileSystem().open(str(file), write=True), rules)
    with_rules.pwrite(512, b"x")
    with_rules.pwrite(1024, b"x")  # another sector
    with pytest.raises(StorageError, match="No space left"):
        with_rules.pwrite(511, b"xy")
    with_rules.pwrite(511, b"x")
    with pytest.raises(SyncFailed):
        with_rules.sync()
    with_rules.sync()
    with_rules.close()
    assert file.read_bytes()[510:514] == b"\0xx\0"


def test_guest_data_and_metadata_are_told_apart(file: Path) -> None:
    with_rules = Blkdebug(LocalFileSystem().open(str(file)), rules_of("inject-error", {"0.event": "read_aio"}))
    assert with_rules.pread(0, 10) == bytes(10)
    with pytest.raises(StorageError, match="Input/output error"):
        with_rules.pread_into(0, memoryview(bytearray(10)))
    with_rules.close()


@pytest.mark.parametrize("options", [{"event": "none"}, {"0.odd": 1, "0.event": "none"}, {"x.event": "none"}])
def test_rules_that_are_none(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="Invalid parameter"):
        rules_of("set-state", options)


def test_an_unreadable_configuration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Is a directory"):
        read_rules(str(tmp_path))


def test_what_is_written_to_null_is_lost() -> None:
    null = NullFile("null-co://", 1000, reads_zeroes=True, write=True)
    null.pwrite(0, b"x")
    assert null.pread(990, 100) == bytes(10)
    assert [span.is_data for span in null.spans(0, 1000)] == [False]
    with pytest.raises(StorageError):
        NullFile("null-co://", 1000, reads_zeroes=True, write=False).pwrite(0, b"x")


def test_a_quorum_wants_enough_copies_that_agree(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"one")):
        (tmp_path / name).write_bytes(content)
    files = [LocalFileSystem().open(str(tmp_path / name)) for name in "abc"]
    assert Quorum(files, 2, first_only=False).pread(0, 3) == b"one"
    assert Quorum(files[1:], 2, first_only=True).pread(0, 3) == b"two"
    with pytest.raises(StorageError, match="Input/output error"):
        Quorum(files, 3, first_only=False).pread(0, 3)
    Quorum(files, 2, first_only=False).close()


@needs_qemu
@pytest.mark.parametrize("options", [False, True])
def test_a_commit_that_cannot_empty_its_overlay(tmp_path: Path, options: bool) -> None:
    """The words are QEMU's; nothing is lost, and recovery does not meet the error that was asked for."""
    assert qemu_img(["create", "-q", "-f", "qcow2", "base", "1M"], tmp_path).code == 0
    assert qemu_img(["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "top"], tmp_path).code == 0
    qemu_io(tmp_path, "-c", "write -P 7 0 64k", "top")
    behind = (tmp_path / "top").stat().st_size // 512  # where what replaces the overlay's tables goes
    (tmp_path / "rules").write_text(f'[inject-error]\nevent = "write_aio"\nsector = "{behind}"\n')
    name = "blkdebug:rules:top"
    if options:
        name = "driver=qcow2,file.driver=blkdebug,file.config=rules,file.image.driver=file,file.image.filename=top"
    line = ["commit", *(["--image-opts"] if options else []), name]
    found = safeimg(line, tmp_path, name="qemu-img")
    assert found == (1, b"", f"qemu-img: Failed to empty {name}: Input/output error\n".encode())
    assert safeimg(["resume", "base"], tmp_path).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "rules", "top"]
    assert (tmp_path / "top").stat().st_size // 512 < behind
    for image in ("base", "top"):
        assert qemu_img(["check", image], tmp_path).code == 0
    qemu_io(tmp_path, "-c", "read -P 7 0 64k", "base")
