"""Structures that one sector of the header makes live: emptied disks, rebuilt refcounts; and the fence."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import trio
from planner_harness import Engine, check, guest, needs_qemu, qemu_io, run, snapshot_guest
from safeimg.drivers.errors import UnsupportedError
from safeimg.drivers.formats.api import Patch
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.formats.qcow2 import pieces
from safeimg.drivers.formats.qcow2.driver import driver
from safeimg.drivers.formats.qcow2.empty import change_refcount_width
from safeimg.drivers.formats.qcow2.planner import Qcow2Planner
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.transfer.core import Settings, Transfer
from safeimg.journal.history import MemoryHistory
from safeimg.ops.launch import Environment
from safeimg.ops.repair import open_sound

pytestmark = needs_qemu


def overlay(folder: Path, options: str, size: str = "3M") -> Path:
    base, path = folder / "base.qcow2", folder / "overlay.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", base, size)
    qemu_io(base, "write -P 77 0 1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", base, "-F", "qcow2", path)
    qemu_io(path, "write -P 3 100K 1M", "write -z 2M 256K", "write -P 5 1500K 300K")
    return path


def empty(engine: Engine, base: Path) -> int:
    """Empties the disk as commit does; the overlay may show its old content or the base's."""
    engine.model = guest(base)
    engine.apply(engine.planner.empty(), crashes=3)
    check(engine.path, leaks=True)
    engine.sync()
    engine.reopen()
    changes, length = engine.planner.compact()
    engine.apply(changes, crashes=3)
    check(engine.path, leaks=True)
    return length


@pytest.mark.parametrize("options", ["cluster_size=65536", "cluster_size=512", "cluster_size=1M",
                                     "cluster_size=512,refcount_bits=64", "cluster_size=4096,refcount_bits=1",
                                     "compat=0.10,cluster_size=4096"])
def test_emptied_as_small_as_qemu_leaves_it(tmp_path: Path, options: str) -> None:
    path = overlay(tmp_path, options)
    twin = tmp_path / "twin.qcow2"
    shutil.copy(path, twin)
    engine = Engine(path, random.Random(options))
    length = empty(engine, tmp_path / "base.qcow2")
    path.write_bytes(path.read_bytes()[:length])
    check(path, leaks=False)
    assert guest(path) == engine.model
    run("qemu-img", "commit", "-q", twin)
    assert length <= twin.stat().st_size
    if "0.10" not in options:  # there QEMU does not cut the file
        assert length == twin.stat().st_size


def test_emptying_is_taken_back(tmp_path: Path) -> None:
    path = overlay(tmp_path, "cluster_size=4096")
    original = path.read_bytes()
    engine = Engine(path, random.Random(0))
    engine.apply(engine.planner.empty(), crashes=0)
    assert path.read_bytes()[:len(original)] != original
    engine.roll_back()
    assert path.read_bytes() == original


def test_a_device_is_emptied_within_its_capacity(tmp_path: Path) -> None:
    path = overlay(tmp_path, "cluster_size=4096")
    with path.open("r+b") as file:
        file.truncate(16 << 20)  # the device, much longer than what the image uses
    engine = Engine(path, random.Random(0))
    engine.planner.on_device = True
    engine.model = guest(tmp_path / "base.qcow2")
    engine.apply(engine.planner.empty(), crashes=3)
    assert path.stat().st_size == 16 << 20
    check(path, leaks=True)
    assert guest(path) == engine.model


def test_emptying_keeps_snapshots_and_bitmaps(tmp_path: Path) -> None:
    path = overlay(tmp_path, "cluster_size=4096")
    run("qemu-img", "snapshot", "-c", "one", path)
    run("qemu-img", "bitmap", "--add", "--enable", "-g", "4096", path, "dirty")
    qemu_io(path, "write -P 8 0 2M")
    kept = snapshot_guest(path, "one")
    engine = Engine(path, random.Random(1))
    length = empty(engine, tmp_path / "base.qcow2")
    data = bytearray(path.read_bytes())
    for offset, count in engine.planner.freed():
        data[offset:offset + count] = b"\xee" * count
    path.write_bytes(data[:length])
    check(path, leaks=False)
    assert guest(path) == engine.model
    assert snapshot_guest(path, "one") == kept
    assert "name: dirty" in run("qemu-img", "info", path)
    qemu_io(path, "write -P 9 0 64K")
    check(path, leaks=False)


def dirty_image(folder: Path) -> Path:
    """What a killed QEMU leaves of an image with lazy refcounts."""
    path = folder / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4096", path, "2M")
    qemu_io(path, "write -P 1 0 100K")
    commands = ("-c", "write -P 2 50K 300K", "-c", "flush", "-c", "abort")
    run("qemu-io", "-f", "qcow2", *commands, path, ok=(-6, 134))
    return path


def test_hazard_18_a_dirty_image_is_repaired_before_it_is_written(tmp_path: Path) -> None:
    path = dirty_image(tmp_path)
    assert path.read_bytes()[79] & 1
    engine = Engine(path, random.Random(2))
    with pytest.raises(UnsupportedError, match="qemu-img check -r all"):
        engine.planner.reserve(1)
    engine.image.close()
    lines: list[str] = []
    env = Environment(LocalFileSystem(), MemoryHistory(), Transfer(Settings(workers=1)), notice=lines.append)
    opened = trio.run(open_sound, env, lambda: open_chain(env.fs, str(path), write=True))
    assert not opened[0].header.is_dirty  # type: ignore[attr-defined]
    close_chain(opened)
    assert "Rebuilding refcount structure" in lines
    check(path, leaks=False)
    assert guest(path) == engine.model
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_fence_keeps_writers_away_and_comes_down(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    data = bytearray(path.read_bytes())
    data[88] |= 0x80  # an autoclear feature from the future
    path.write_bytes(data)
    image = driver.open(LocalFileSystem().open(str(path), write=True), write=True)
    changes = driver.fence(image)
    (patch,) = changes.link
    assert not changes.allocate
    write(path, patch)
    assert "image is corrupt" in run("qemu-io", "-c", "write 0 512", path, ok=(1,)).lower()
    run("qemu-io", "-r", "-c", "read 0 512", path)
    assert not path.read_bytes()[88]
    assert not driver.fence(image)
    (patch,) = driver.unfence(image)
    write(path, patch)
    qemu_io(path, "write 0 512")
    check(path, leaks=False)
    assert not driver.unfence(image)


def test_version_2_has_no_fence(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compat=0.10", path, "1M")
    image = driver.open(LocalFileSystem().open(str(path), write=True), write=True)
    assert not driver.fence(image)
    assert not driver.unfence(image)


def write(path: Path, patch: Patch) -> None:
    with path.open("r+b") as file:
        file.seek(patch.offset)
        assert patch.before is None or file.read(len(patch.before)) == patch.before
        file.seek(patch.offset)
        file.write(patch.after)


def test_hazard_19_somebody_repaired_leaks_while_the_operation_was_pending(tmp_path: Path) -> None:
    """Shared and private clusters were unlinked; their leaked references are gone when release comes."""
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "1M")
    qemu_io(path, "write -P 1 0 512K")
    run("qemu-img", "snapshot", "-c", "one", path)
    qemu_io(path, "write -P 2 600K 100K")
    kept = snapshot_guest(path, "one")
    engine = Engine(path, random.Random(4))
    engine.reserve(400)
    engine.write(100 << 10, engine.rng.randbytes(200 << 10))
    engine.zero(600 << 10, 64 << 10)
    engine.apply(engine.planner.take())
    run("qemu-img", "check", "-q", "-r", "leaks", path)
    engine.durable = bytearray(path.read_bytes())
    engine.unsynced = []
    engine.reopen()
    engine.reserve(100)
    engine.write(800 << 10, engine.rng.randbytes(100 << 10))
    engine.apply(engine.planner.take())
    engine.apply(engine.planner.release())
    check(path, leaks=False)
    assert guest(path) == engine.model
    assert snapshot_guest(path, "one") == kept
    assert Qcow2Planner(engine.image).l1_size == 1


def test_refcounts_of_another_width_take_no_more_of_the_log_than_a_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large the image: the new blocks go to the file ahead of the step that makes them live."""
    monkeypatch.setattr(pieces, "STEP_BYTES", 1 << 16)
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata,cluster_size=4096", path, "256M")
    image = driver.open(LocalFileSystem().open(str(path), write=True), write=True)
    steps = list(change_refcount_width(Qcow2Planner(image), 6))
    new = sum(len(content) for changes in steps for _, content in changes.fresh)
    assert new >= (256 << 20) // 4096 * 8  # bytes of 64-bit refcounts
    assert [len(changes.fresh) > 0 for changes in steps] == [True] * -(-new // (1 << 16))
    assert all(not changes.link for changes in steps[:-1]) and steps[-1].link
    assert sum(len(patch.after) for changes in steps for patch in (*changes.allocate, *changes.link)) <= 512
