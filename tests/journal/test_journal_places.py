"""Undo files, pointers, places, identities and owners."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from journal_fakes import DECLARED, OPERATION, STARTED, MemoryFiles, identity
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.journal import place
from safeimg.journal.errors import JournalError, JournalUnavailable, LogBusy, LogDamaged, LogForeign, LogLost
from safeimg.journal.events import Completed, ImageRecord
from safeimg.journal.files import remove_durably
from safeimg.journal.find import (
    LogFound,
    PointerFound,
    VoidFound,
    clear_void,
    find,
    look,
    resolve_pointer,
    scan,
)
from safeimg.journal.identity import ATTRIBUTE, ensure_tag, identify, read_tag, same_file, unchanged
from safeimg.journal.log import Log
from safeimg.journal.owner import current_owner, liveness
from safeimg.journal.pointer import Pointer, read_pointer, write_pointer
from safeimg.journal.sqlite import SqliteHistory
from safeimg.journal.undo import ALIGN, UndoFile

BASE, TOP = "/images/base.qcow2", "/images/top.qcow2"
UNDO = BASE + ".safeimg-undo"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryFiles:
    monkeypatch.setenv("SAFEIMG_STATE_DIR", str(tmp_path / "state"))
    files = MemoryFiles()
    for path in (BASE, TOP):
        files.put(path, b"image")
    return files


def undo_file(files: MemoryFiles, operation: str = OPERATION) -> UndoFile:
    like = files.stat(BASE)
    assert like is not None
    return UndoFile.create(files, UNDO, operation, like)


# -- undo


def test_extents_come_back_from_many_threads(files: MemoryFiles) -> None:
    undo = undo_file(files)
    data = [bytes([number]) * (1 + 777 * number) for number in range(32)]
    with ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(undo.append, data))
    undo.sync()
    undo.close()
    again = UndoFile.open(files, UNDO, OPERATION)
    assert [
        again.read(offset, len(item), digest) for (offset, digest), item in zip(kept, data, strict=True)
    ] == data
    assert all(offset % ALIGN == 0 and offset for offset, _ in kept)
    writer = UndoFile.open(files, UNDO, OPERATION, write=True)
    assert writer.append(memoryview(b"more"))[0] >= max(offset for offset, _ in kept) + ALIGN


def test_changed_undo_data_is_damage(files: MemoryFiles) -> None:
    undo = undo_file(files)
    offset, digest = undo.append(b"x" * 5000)
    for at in (offset, offset + 4999):
        files.nodes[UNDO].data[at] ^= 1
        with pytest.raises(LogDamaged, match=f"{offset:#x}"):
            undo.read(offset, 5000, digest)
        files.nodes[UNDO].data[at] ^= 1
    assert undo.read(offset, 5000, digest) == b"x" * 5000
    for bad in (
        (offset + 1, 5000),
        (offset, 4999),
        (0, 10),
        (-4096, 10),
        (offset, 1 << 62),
        (1 << 62, 1),
        (offset, 0),
    ):
        with pytest.raises(LogDamaged):
            undo.read(*bad, digest)


def test_undo_header_of_another_operation_version_or_file(files: MemoryFiles) -> None:
    undo_file(files).close()
    with pytest.raises(LogForeign, match="belongs to operation"):
        UndoFile.open(files, UNDO, "f" * 32)
    for at in (0, 17, 24, 100, 4095):
        files.nodes[UNDO].data[at] ^= 1
        with pytest.raises((LogForeign, LogDamaged)):
            UndoFile.open(files, UNDO, OPERATION)
        files.nodes[UNDO].data[at] ^= 1
    files.nodes[UNDO].uid = os.geteuid() + 999
    with pytest.raises(LogForeign, match="belongs to user"):
        UndoFile.open(files, UNDO, OPERATION)
    del files.nodes[UNDO]
    with pytest.raises(LogForeign, match="is gone"):
        UndoFile.open(files, UNDO, OPERATION)


def test_left_over_undo_files_are_replaced_but_no_others(files: MemoryFiles) -> None:
    undo_file(files).append(b"old")
    undo = undo_file(files, "f" * 32)
    assert undo.end == ALIGN and undo.operation == "f" * 32
    files.put(UNDO, b"my notes")
    with pytest.raises(LogForeign):
        undo_file(files)
    assert files.nodes[UNDO].data == b"my notes"


def test_hazard_8_undo_stops_after_a_failed_sync(files: MemoryFiles) -> None:
    undo = undo_file(files)
    files.fail_sync = True
    with pytest.raises(OSError):
        undo.sync()
    files.fail_sync = False
    with pytest.raises(JournalError):
        undo.append(b"x")
    with pytest.raises(JournalError):
        undo.sync()


def test_a_full_disk_shows_before_the_step(files: MemoryFiles) -> None:
    undo = undo_file(files)
    files.room = 10000
    undo.reserve(8192)
    with pytest.raises(OSError) as caught:
        undo.reserve(20000)
    assert caught.value.errno == errno.ENOSPC and undo.end == ALIGN


def test_secrets_are_overwritten(files: MemoryFiles) -> None:
    undo = undo_file(files)
    offset, _ = undo.append(b"secret" * 1000)
    after, digest = undo.append(b"kept")
    undo.erase(offset, 6000)
    assert b"secret" not in files.nodes[UNDO].data and undo.read(after, 4, digest) == b"kept"


# -- pointers


def pointer_to_base(files: MemoryFiles, **changes: object) -> Pointer:
    return Pointer(OPERATION, identify(files.open(BASE)), "base.qcow2", identify(files.open(TOP)), "machine")._replace(
        **changes,  # type: ignore[arg-type]
    )


def put_pointer(files: MemoryFiles, **changes: object) -> PointerFound:
    like = files.stat(TOP)
    assert like is not None
    write_pointer(files, TOP + ".safeimg", pointer_to_base(files, **changes), like)
    found = find(files, TOP)
    assert isinstance(found, PointerFound)
    return found


def put_log(
    files: MemoryFiles, *more: object, path: str = BASE + ".safeimg", operation: str = OPERATION
) -> None:
    like = files.stat(BASE) or files.stat(TOP)
    assert like is not None
    home = identify(files.open(BASE)) if BASE in files.nodes else identity()
    log = Log.create(files, path, operation, like, chunk=1024)
    images = (
        ImageRecord("base", "base.qcow2", "raw", home, True),
        ImageRecord("overlay", "top.qcow2", "raw", identify(files.open(TOP)), False),
    )
    log.append(DECLARED._replace(operation=operation, images=images))
    for event in more:
        log.append(event)  # type: ignore[arg-type]
    log.close()


def dead(owner: object) -> str:
    return "dead"


def test_pointer_round_trip_and_removal(files: MemoryFiles) -> None:
    found = put_pointer(files, log="/elsewhere/x.safeimg", home_path="../\udcff")
    assert found.pointer == pointer_to_base(files, log="/elsewhere/x.safeimg", home_path="../\udcff")
    assert files.nodes[found.path].mode & 0o777 == 0o600
    assert TOP + ".safeimg-new" not in files.nodes
    remove_durably(files, found.path)
    remove_durably(files, found.path)
    assert find(files, TOP) is None


def test_every_byte_of_a_pointer_matters(files: MemoryFiles) -> None:
    path = put_pointer(files).path
    data = files.nodes[path].data
    for at in range(len(data)):
        data[at] ^= 0x41
        with pytest.raises((LogDamaged, LogForeign)):
            look(files, path)
        data[at] ^= 0x41
    whole = bytes(data)
    for length in range(1, len(whole)):
        files.nodes[path].data[:] = whole[:length]
        with pytest.raises((LogDamaged, LogForeign)):
            look(files, path)


def test_a_pointer_does_not_replace_anything(files: MemoryFiles) -> None:
    put_log(files, path=TOP + ".safeimg")
    before = bytes(files.nodes[TOP + ".safeimg"].data)
    with pytest.raises(OSError, match="File exists"):
        put_pointer(files)
    assert files.nodes[TOP + ".safeimg"].data == before
    assert read_pointer(files, TOP + ".safeimg") is None


def test_a_pointer_is_not_written_through_a_planted_link(files: MemoryFiles) -> None:
    files.put("/etc/shadow", b"root")
    files.links[TOP + ".safeimg-new"] = "/etc/shadow"
    put_pointer(files)
    assert files.nodes["/etc/shadow"].data == b"root"


def test_a_full_disk_leaves_no_half_pointer(files: MemoryFiles) -> None:
    files.room = 10
    with pytest.raises(OSError):
        put_pointer(files)
    assert [path for path in files.nodes if "safeimg" in path] == []


def test_what_a_pointer_comes_to(files: MemoryFiles) -> None:
    found = put_pointer(files)
    with pytest.raises(LogLost, match="safeimg abandon"):
        resolve_pointer(files, found, alive=dead)
    put_log(files)
    assert resolve_pointer(files, found, alive=dead).kind == "unstarted"
    del files.nodes[BASE + ".safeimg"]
    put_log(files, STARTED)
    resolved = resolve_pointer(files, found, alive=dead)
    assert (resolved.kind, resolved.home) == ("pending", BASE)
    assert resolved.log is not None and resolved.log.path == BASE + ".safeimg"
    del files.nodes[BASE + ".safeimg"]
    put_log(files, STARTED, Completed((), 1.0))
    assert resolve_pointer(files, found, alive=dead).kind == "decided"
    del files.nodes[BASE + ".safeimg"]
    put_log(files, STARTED, operation="e" * 32)  # the home is at its next operation already
    assert resolve_pointer(files, found, alive=dead).kind == "settled"


def test_a_home_that_is_gone_or_another_file_is_refused(files: MemoryFiles) -> None:
    found = put_pointer(files)
    del files.nodes[BASE]
    with pytest.raises(LogForeign, match="safeimg abandon"):
        resolve_pointer(files, found, alive=dead)
    files.put(BASE, b"a copy")
    with pytest.raises(LogForeign, match="not there any more"):
        resolve_pointer(files, found, alive=dead)


def test_a_log_that_cannot_be_read_is_not_settled(files: MemoryFiles) -> None:
    found = put_pointer(files)
    put_log(files, STARTED)
    node = files.nodes[BASE + ".safeimg"]
    node.data[20] ^= 1
    with pytest.raises(LogDamaged):
        resolve_pointer(files, found, alive=dead)
    node.data[20] ^= 1
    node.uid = os.geteuid() + 999
    with pytest.raises(LogForeign):
        resolve_pointer(files, found, alive=dead)


def test_a_log_kept_by_another_machine_is_not_settled(files: MemoryFiles) -> None:
    found = put_pointer(files, log="/var/lib/safeimg/7-101.safeimg")
    with pytest.raises(LogForeign, match="another machine"):
        resolve_pointer(files, found, alive=dead)
    remove_durably(files, found.path)
    here = put_pointer(files, log="/elsewhere/log.safeimg", machine=current_owner().machine)
    with pytest.raises(LogLost, match=r"/elsewhere/log\.safeimg is not there \(is its disk mounted"):
        resolve_pointer(files, here, alive=dead)
    put_log(files, STARTED, path="/elsewhere/log.safeimg")
    assert resolve_pointer(files, here, alive=dead).kind == "pending"


def test_hazard_20_renamed_images_are_still_pending(files: MemoryFiles) -> None:
    found = put_pointer(files)
    put_log(files, STARTED)
    files.rename(BASE, "/images/golden.qcow2")
    files.rename(TOP, "/images/moved.qcow2")
    home = find(files, "/images/golden.qcow2")
    assert isinstance(home, LogFound) and home.path == BASE + ".safeimg"
    assert find(files, "/images/moved.qcow2") == found
    files.rename(BASE + ".safeimg", "/images/golden.qcow2.safeimg")
    assert resolve_pointer(files, found, alive=dead).kind == "pending"
    files.put("/images/new.qcow2")
    assert find(files, "/images/new.qcow2") is None


def test_links_lead_to_the_same_log(files: MemoryFiles) -> None:
    files.links["/vm/disk"] = BASE
    put_log(files, STARTED)
    found = find(files, "/vm/disk")
    assert isinstance(found, LogFound) and found.path == BASE + ".safeimg"


# -- places


def test_the_log_goes_beside_the_image(files: MemoryFiles) -> None:
    assert place.create_log(files, BASE, OPERATION).path == BASE + ".safeimg"
    with pytest.raises(LogBusy):
        place.create_log(files, BASE, OPERATION)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_else_to_the_state_directory(files: MemoryFiles, tmp_path: Path, code: int) -> None:
    files.refuse["/images"] = code
    log = place.create_log(files, BASE, OPERATION)
    inode = files.nodes[BASE].inode
    assert log.path == str(tmp_path / "state" / f"7-{inode:x}.safeimg")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    log.append(DECLARED)
    found = find(files, BASE)
    assert isinstance(found, LogFound) and found.path == log.path


def test_nowhere(files: MemoryFiles, tmp_path: Path) -> None:
    files.refuse |= {"/images": errno.EROFS, str(tmp_path / "state"): errno.ENOSPC, "/other": errno.EACCES}
    with pytest.raises(JournalUnavailable, match=r"Read-only.*No space left.*--journal.*--no-journal"):
        place.create_log(files, BASE, OPERATION)
    with pytest.raises(JournalUnavailable, match="/other/log"):
        place.create_log(files, BASE, OPERATION, explicit="/other/log")
    files.refuse["/images"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        place.create_log(files, BASE, OPERATION)


def test_an_explicit_place_is_used_and_the_others_looked_at(files: MemoryFiles) -> None:
    put_log(files, STARTED)
    found = find(files, BASE, explicit="/other/log")
    assert isinstance(found, LogFound) and found.path == BASE + ".safeimg"
    del files.nodes[BASE + ".safeimg"]
    log = place.create_log(files, BASE, OPERATION, explicit="/other/log")
    log.append(DECLARED)
    found = find(files, BASE, explicit="/other/log")
    assert isinstance(found, LogFound) and found.path == "/other/log"


def test_devices_have_their_log_in_the_state_directory(files: MemoryFiles, tmp_path: Path) -> None:
    files.put("/dev/vg/disk", is_device=True)
    assert place.create_log(files, "/dev/vg/disk", OPERATION).path == str(
        tmp_path / "state" / "device-dev-vg-disk.safeimg"
    )


def test_state_directory_of_whom(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SAFEIMG_STATE_DIR", "XDG_STATE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert place.state_directory() == "/var/lib/safeimg"
    monkeypatch.setattr(os, "geteuid", lambda: 123456789)  # no account, no HOME
    assert place.state_directory() is None
    with pytest.raises(JournalUnavailable, match="SAFEIMG_STATE_DIR"):
        place.make_state_directory()
    monkeypatch.setenv("HOME", "/home/x")
    assert place.state_directory() == "/home/x/.local/state/safeimg"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert place.state_directory() == "/home/x/.local/state/safeimg"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert place.state_directory() == "/state/safeimg"
    monkeypatch.setenv("SAFEIMG_STATE_DIR", str(tmp_path))
    assert place.state_directory() == str(tmp_path)


def test_a_state_directory_is_made_however_it_is_spelled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAFEIMG_STATE_DIR", f"{tmp_path}/state/")
    directory = place.state_directory()
    assert directory is not None
    place.ensure_folder(os.path.join(directory, "log.safeimg"))
    assert (tmp_path / "state").is_dir()
    place.ensure_folder(str(tmp_path / "elsewhere" / "log.safeimg"))
    assert not (tmp_path / "elsewhere").exists()


def test_the_current_folder_may_be_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone() -> str:
        raise FileNotFoundError

    monkeypatch.setattr(os, "getcwd", gone)
    monkeypatch.setenv("SAFEIMG_STATE_DIR", str(tmp_path))
    assert place.make_state_directory() == str(tmp_path)
    assert SqliteHistory().pending() == []
    SqliteHistory().remove_pending("0" * 32)  # makes it
    assert SqliteHistory().pending() == []


def test_a_history_that_cannot_be_looked_at_is_not_taken_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.stat

    def refused(path: str, **more: object) -> os.stat_result:
        if str(path) == "/state/history.db":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return stat(path, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "stat", refused)
    with pytest.raises(PermissionError):
        SqliteHistory("/state/history.db").pending()


def test_a_state_directory_that_others_write_to_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SAFEIMG_STATE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(JournalUnavailable, match="others can write"):
        place.make_state_directory()
    tmp_path.chmod(0o755)
    assert place.make_state_directory() == str(tmp_path)


def test_void_files_are_cleared_with_what_goes_along(files: MemoryFiles) -> None:
    files.put(BASE + ".safeimg")
    files.put(UNDO)
    found = find(files, BASE)
    assert isinstance(found, VoidFound)
    clear_void(files, found)
    assert [path for path in files.nodes if "safeimg" in path] == []


def test_scan_finds_all_and_says_what_is_wrong(tmp_path: Path) -> None:
    files = LocalFileSystem()
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path)
    image = tmp_path / "deep" / "er" / "a.qcow2"
    image.write_bytes(b"x")
    like = files.stat(str(image))
    assert like is not None
    log = Log.create(files, f"{image}.safeimg", OPERATION, like)
    log.append(DECLARED)
    log.close()
    (tmp_path / "deep" / "notes.safeimg").write_text("hello")
    (tmp_path / "deep" / "empty.safeimg").touch()
    (tmp_path / "deep" / "folder.safeimg").mkdir()
    (tmp_path / "deep" / "link.safeimg").symlink_to(f"{image}.safeimg")
    os.mkfifo(tmp_path / "deep" / "fifo.safeimg")
    found = {Path(path).name: type(what).__name__ for path, what in scan(files, str(tmp_path))}
    assert found == {
        "a.qcow2.safeimg": "LogFound",
        "notes.safeimg": "LogForeign",
        "empty.safeimg": "VoidFound",
    }


# -- identity


def test_identity_and_its_tag(files: MemoryFiles) -> None:
    file = files.open(BASE)
    assert identify(file).tag is None
    first = identify(file, tag=True)
    assert first.tag is not None and len(first.tag) == 32 and first.inode == files.nodes[BASE].inode
    assert identify(file, tag=True) == identify(file) == first
    files.nodes[BASE].attributes[ATTRIBUTE] = b"\xff nonsense"
    assert read_tag(file) is None
    files.attributes = False
    assert ensure_tag(files.open(TOP)) is None


@pytest.mark.parametrize(
    ("changes", "same", "still"),
    [
        ({}, True, True),
        ({"ctime_ns": 99}, True, True),
        ({"mtime_ns": 99}, True, False),
        ({"size": 1}, True, False),
        ({"device": 8}, True, True),
        ({"device": 8, "tag": None}, False, False),
        ({"tag": None}, True, True),
        ({"tag": "f" * 32}, False, False),
        ({"inode": 5}, False, False),
    ],
)
def test_same_and_unchanged(changes: dict[str, int | str], same: bool, still: bool) -> None:
    recorded = identity(tag=OPERATION)
    now = recorded._replace(**changes)  # type: ignore[arg-type]
    assert (same_file(recorded, now), unchanged(recorded, now)) == (same, still)
    assert same_file(now, recorded) == same


# -- owner


def test_liveness_of_owners() -> None:
    me = current_owner()
    assert liveness(me) == "alive"
    assert liveness(me._replace(started=me.started + 1)) == "dead"  # the pid was given to another process
    boot, _, pids = me.boot.partition(" ")
    assert liveness(me._replace(boot=f"another {pids}")) == "dead"
    assert liveness(me._replace(boot=f"{boot} pid:[1]")) == "unknown"  # another container
    assert liveness(me._replace(boot="")) == "unknown"
    assert liveness(me._replace(machine="another")) == "unknown"
    assert liveness(me._replace(host="another")) == "unknown"


def test_a_dead_process_and_a_zombie_are_dead() -> None:
    code = (
        "from safeimg.journal import owner; me = owner.current_owner(); "
        "print(me.pid, me.started, flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdin is not None
    pid, started = map(int, child.stdout.readline().split())
    owner = current_owner()._replace(pid=pid, started=started)
    assert liveness(owner) == "alive"
    child.kill()
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert liveness(owner) == "dead"  # not reaped yet
    child.communicate()
    assert liveness(owner) == "dead"
    assert liveness(owner._replace(pid=2**40)) == "dead"


def test_a_program_with_an_odd_name(monkeypatch: pytest.MonkeyPatch) -> None:
    line = b"42 (a) Z 1 ) R" + b" 0" * 18 + b" 777" + b" 0" * 30
    monkeypatch.setattr("safeimg.journal.owner.open", lambda path, mode: io.BytesIO(line), raising=False)
    from safeimg.journal.owner import _process

    found = _process(42)
    assert found is not None and (found.state, found.started) == ("R", 777)
    line = b"garbage"
    assert _process(42) is None
