"""convert stopped half-way, with the real engine and journal: finished, taken back, replaced."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from safeimg.drivers.errors import StorageError
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.transfer.core import Settings, Transfer
from safeimg.drivers.transfer.view import View
from safeimg.journal.sqlite import SqliteHistory
from safeimg.ops.convert import convert
from safeimg.ops.convert_options import Blocks, Options
from safeimg.ops.errors import Conflict, OperationPaused, SomethingPending
from safeimg.ops.launch import Environment
from safeimg.recovery.settle import abandon, resume, rollback

MIB = 1 << 20
FS = LocalFileSystem()


@pytest.fixture
def around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Environment]:
    """Makes an environment; `steps`: after how many steps it asks to stop."""
    monkeypatch.setenv("SAFEIMG_STATE_DIR", str(tmp_path / "state"))

    def make(steps: int | None = None) -> Environment:
        left = [steps]

        def stop() -> str | None:
            if left[0] is None:
                return None
            left[0] -= 1
            return "SIGTERM" if left[0] <= 0 else None

        return Environment(FS, SqliteHistory(), Transfer(Settings(workers=2)), stop=stop)

    return make


def make(path: Path, size: int, fill: int) -> bytes:
    made = b"".join(bytes([fill + i % 7 if i % 3 else 0]) * 65536 for i in range(size // 65536))
    path.write_bytes(made)
    return made


def content(path: Path, format: str) -> bytes:
    chain = open_chain(FS, str(path), format=format)
    try:
        view = View(chain)
        found = bytearray(view.size)
        view.read_into(0, memoryview(found))
        return bytes(found)
    finally:
        close_chain(chain)


def clean(path: Path) -> None:
    if shutil.which("qemu-img") is not None:
        words = ["qemu-img", "check", "-f", "qcow2", str(path)]
        checked = subprocess.run(words, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def paused(environment: Environment, options: Options) -> None:
    with pytest.raises(OperationPaused):
        trio.run(convert, environment, options)


def to(target: Path, *sources: Path, format: str = "qcow2", defer: float = 0.0, **more: Any) -> Options:
    return Options(
        tuple(map(str, sources)), str(target), source_format="raw", target_format=format, step_bytes=MIB // 2,
        defer=defer, **more,
    )  # fmt: skip


@pytest.mark.parametrize(("format", "compress"), [("raw", False), ("qcow2", False), ("qcow2", True)])
def test_resumed_after_each_step(
    tmp_path: Path, around: Callable[..., Environment], format: str, compress: bool
) -> None:
    one, two, target = tmp_path / "a.raw", tmp_path / "b.raw", tmp_path / "c.img"
    expected = make(one, 2 * MIB, 1) + make(two, MIB, 100)
    paused(around(1), to(target, one, two, format=format, compress=compress))
    for _ in range(50):
        with pytest.raises(SomethingPending, match="an interrupted convert is pending"):
            trio.run(convert, around(), to(target, one, two, format=format))
        try:
            assert trio.run(resume, str(target), around(1)) == "convert finished"
            break
        except OperationPaused:
            continue
    assert content(target, format) == expected
    if format == "qcow2":
        clean(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.raw", "b.raw", "c.img", "state"]


@pytest.mark.parametrize("window", [32 << 10, 5000])
def test_the_window_of_deflate_is_on_record(
    tmp_path: Path, around: Callable[..., Environment], window: int
) -> None:
    """One that the command line does not take comes from no safeimg."""
    source, target = tmp_path / "a.raw", tmp_path / "c.qcow2"
    expected = make(source, 2 * MIB, 1)
    paused(around(1), to(target, source, compress=True, window=window))
    if window == 5000:
        with pytest.raises(Conflict, match="the log's settings do not fit a convert"):
            trio.run(resume, str(target), around())
    else:
        assert trio.run(resume, str(target), around()) == "convert finished"
        assert content(target, "qcow2") == expected


def test_others_refuse_an_unfinished_target(tmp_path: Path, around: Callable[..., Environment]) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "c.qcow2"
    make(source, 2 * MIB, 1)
    paused(around(2), to(target, source))
    if shutil.which("qemu-img") is not None:
        found = subprocess.run(["qemu-img", "info", str(target)], capture_output=True, text=True, check=False)
        assert "unfinished safeimg convert" in found.stderr


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_rolled_back_the_new_target_is_gone(
    tmp_path: Path, around: Callable[..., Environment], format: str
) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "c.img"
    made = make(source, 2 * MIB, 1)
    paused(around(2), to(target, source, format=format))
    trio.run(rollback, str(target), around())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.raw", "state"]
    assert source.read_bytes() == made


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_rolled_back_an_existing_target_is_as_before(
    tmp_path: Path, around: Callable[..., Environment], format: str
) -> None:
    source, target, old = tmp_path / "a.raw", tmp_path / "c.img", tmp_path / "old.raw"
    make(source, 2 * MIB, 1)
    before = make(old, 3 * MIB, 50)
    trio.run(convert, around(), to(target, old, format=format))
    paused(around(3), to(target, source, format=format, create=False, undo=True))
    assert content(target, format) != before
    trio.run(rollback, str(target), around())
    assert content(target, format) == before
    if format == "qcow2":
        clean(target)


def test_resumed_into_an_existing_target(tmp_path: Path, around: Callable[..., Environment]) -> None:
    source, target, old = tmp_path / "a.raw", tmp_path / "c.img", tmp_path / "old.raw"
    expected = make(source, 2 * MIB, 1)
    before = make(old, 3 * MIB, 50)
    trio.run(convert, around(), to(target, old, compress=True))
    for undo in (False, True):
        paused(around(3), to(target, source, create=False, undo=undo))
        trio.run(resume, str(target), around())
        assert content(target, "qcow2") == expected + before[2 * MIB :]
        clean(target)


def test_a_source_that_changed_meanwhile(tmp_path: Path, around: Callable[..., Environment]) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "c.qcow2"
    made = make(source, 2 * MIB, 1)
    paused(around(2), to(target, source))
    source.write_bytes(b"x" + made[1:])
    with pytest.raises(Conflict, match=r"a\.raw"):
        trio.run(resume, str(target), around())
    trio.run(rollback, str(target), around())
    assert not target.exists()


@pytest.mark.parametrize("blocks", [None, Blocks()], ids=["convert", "dd"])
def test_onto_itself_what_is_pending_stays(
    tmp_path: Path, around: Callable[..., Environment], blocks: Blocks | None
) -> None:
    """It is refused, so nothing is given up for it."""
    source, target = tmp_path / "a.raw", tmp_path / "c.raw"
    expected = make(source, 2 * MIB, 1)
    paused(around(1), to(target, source, format="raw"))
    given_up: list[str] = []

    async def onto_itself() -> None:
        await convert(around(), to(target, target, format="raw")._replace(blocks=blocks), supersede=given_up.append)

    with pytest.raises(SomethingPending):
        trio.run(onto_itself)
    assert not given_up
    assert trio.run(resume, str(target), around()) == "convert finished"
    assert content(target, "raw") == expected


def test_replaced_wholly_what_was_pending_is_given_up(
    tmp_path: Path, around: Callable[..., Environment]
) -> None:
    source, other, target = tmp_path / "a.raw", tmp_path / "b.raw", tmp_path / "c.qcow2"
    make(source, 2 * MIB, 1)
    expected = make(other, MIB, 9)
    paused(around(2), to(target, source))

    def supersede(path: str) -> None:
        abandon(path, around(), reason="replaced")

    async def again() -> None:
        await convert(around(), to(target, other), supersede=supersede)

    trio.run(again)
    assert content(target, "qcow2") == expected
    clean(target)


def test_paused_before_its_journal_began(tmp_path: Path, around: Callable[..., Environment]) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "c.qcow2"
    expected = make(source, 2 * MIB, 1)
    paused(around(2), to(target, source, defer=60.0))
    trio.run(resume, str(target), around())
    assert content(target, "qcow2") == expected
    clean(target)


@pytest.mark.parametrize("there", [False, True])
def test_failed_before_its_journal_began(
    tmp_path: Path, around: Callable[..., Environment], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "c.qcow2"
    make(source, 2 * MIB, 1)
    if there:
        target.write_bytes(b"something else")

    def full(self: object, step: object) -> None:
        raise StorageError(str(target), "write", OSError(28, "No space left on device"))

    monkeypatch.setattr("safeimg.ops.engine.Engine._allocate", full)
    with pytest.raises(StorageError, match="No space left"):
        trio.run(convert, around(), to(target, source, defer=60.0))
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw"]


def test_without_a_journal(tmp_path: Path, around: Callable[..., Environment]) -> None:
    source, target = tmp_path / "a.raw", tmp_path / "c.qcow2"
    expected = make(source, MIB, 1)
    environment = around()
    bare = Environment(FS, environment.history, environment.transfer, journal="off")
    trio.run(convert, bare, to(target, source))
    assert content(target, "qcow2") == expected
    clean(target)
