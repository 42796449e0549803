"""The simulated file system behaves as a file system does, and records what it is told."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import safeimg.drivers.storage.api as api
import safeimg.journal.files as journal_files
from hypothesis import given, settings
from hypothesis import strategies as st
from safeimg.drivers.errors import DriverError, LockError, StorageError, SyncFailed, UsageError
from safeimg.drivers.storage.file import LocalFileSystem
from safeimg.drivers.storage.locks import READER, lock
from safeimg.drivers.storage.simulated import Killed, SimulatedFile, SimulatedFileSystem
from safeimg.drivers.storage.simulated_file import MAX_LENGTH
from safeimg.drivers.storage.sparse import PAGE

TIB = 1 << 40


def test_it_is_what_the_interfaces_ask_for() -> None:
    fs = SimulatedFileSystem()
    for_drivers: api.FileSystem = fs
    for_the_journal: journal_files.FileSystem = fs
    assert for_drivers.create("/a").path == "/a"
    file = for_the_journal.open("/a")
    assert file.length() == 0
    assert isinstance(file, journal_files.Lockable)


# ---- content: the same as an array of bytes

OFFSETS = st.one_of(
    st.integers(0, 5 * PAGE), st.sampled_from([0, 511, 512, 513, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE])
)
LENGTHS = st.one_of(st.integers(0, 3 * PAGE), st.sampled_from([1, 512, PAGE, 2 * PAGE]))
CALLS = st.tuples(
    st.sampled_from(["write", "zero", "hole", "discard", "grow", "keep", "truncate", "sync"]),
    OFFSETS,
    LENGTHS,
    st.integers(1, 255),
)


def _call(file: SimulatedFile, call: tuple[str, int, int, int]) -> None:
    kind, offset, length, byte = call
    if kind == "write":
        file.pwrite(offset, bytes([byte]) * length)
    elif kind in ("zero", "hole"):
        file.write_zeroes(offset, length, unmap=kind == "hole")
    elif kind == "discard":
        file.discard(offset, length)
    elif kind in ("grow", "keep"):
        file.preallocate(offset, length, keep_size=kind == "keep")
    elif kind == "truncate":
        file.truncate(offset)
    else:
        file.sync()


def _expect(model: bytearray, call: tuple[str, int, int, int]) -> None:
    kind, offset, length, byte = call
    if kind in ("write", "zero", "hole", "grow") and length:
        model.extend(bytes(max(offset + length - len(model), 0)))
    if kind == "write":
        model[offset : offset + length] = bytes([byte]) * length
    elif kind in ("zero", "hole", "discard"):
        end = min(offset + length, len(model))
        if offset < end:
            model[offset:end] = bytes(end - offset)
    elif kind == "truncate":
        model.extend(bytes(max(offset - len(model), 0)))
        del model[offset:]


@settings(max_examples=150, deadline=None)
@given(calls=st.lists(CALLS, max_size=12), cache=st.sampled_from(api.CACHE_MODES))
def test_content_is_that_of_an_array_of_bytes(calls: list[tuple[str, int, int, int]], cache: str) -> None:
    fs = SimulatedFileSystem()
    file = fs.create("/a", cache=cache)
    model = bytearray()
    for call in calls:
        _call(file, call)
        _expect(model, call)
        assert file.length() == len(model)
        assert file.pread(0, len(model) + 10) == model
        spans = list(file.spans(0, len(model) + 10))
        assert sum(span.length for span in spans) == len(model)
        assert [span.start for span in spans[1:]] == [span.start + span.length for span in spans[:-1]]
        assert all(not any(model[s.start : s.start + s.length]) for s in spans if not s.is_data)
        assert file.stat().allocated >= sum(span.length for span in spans if span.is_data) // PAGE * PAGE
    _, offset, length, _ = calls[0] if calls else ("", 3, 5, 0)
    buffer = bytearray(length)
    count = file.pread_into(offset, memoryview(buffer))
    assert buffer[:count] == model[offset : offset + length] and not any(buffer[count:])


@settings(max_examples=150, deadline=None)
@given(calls=st.lists(CALLS, max_size=12))
def test_a_sync_makes_the_disk_copy_the_live_one(calls: list[tuple[str, int, int, int]]) -> None:
    fs = SimulatedFileSystem()
    file = fs.create("/a")
    for call in calls:
        _call(file, call)
    file.sync()
    (node,) = fs.model.nodes.values()
    assert node.disk.content == node.live.content  # space occupied too
    assert node.disk.length == node.live.length
    assert fs.unsynced("/a") == 0


def test_a_terabyte_of_nothing_costs_nothing(tmp_path: Path) -> None:
    fs = SimulatedFileSystem()
    file = fs.create("/a")
    file.truncate(TIB)
    file.pwrite(TIB // 2, b"x")
    file.write_zeroes(0, TIB // 4, unmap=True)
    file.preallocate(0, TIB // 4, keep_size=True)
    file.sync()
    assert list(file.spans(0, TIB)) == [
        api.Span(0, TIB // 2, False),
        api.Span(TIB // 2, PAGE, True),
        api.Span(TIB // 2 + PAGE, TIB // 2 - PAGE, False),
    ]
    assert file.stat().allocated == TIB // 4 + PAGE
    file.write_zeroes(0, TIB, unmap=True)
    assert file.stat().allocated == 0


def test_files_of_the_machine_come_in_and_go_out_with_their_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    with source.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(16 << 20)
        file.write(b"data" * 2048)
    fs = SimulatedFileSystem()
    fs.import_file(str(source), "/a")
    assert fs.used() < 1 << 20
    assert fs.unsynced("/a") == 0
    fs.export_file("/a", str(target))
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 1 << 20


# ---- names: the same as on this machine


def _outcome(action: Callable[[], object]) -> object:
    try:
        result = action()
    except StorageError as error:
        return error.errno
    except DriverError as error:
        return type(error)
    if isinstance(result, api.FileStat):
        return result.size
    return (
        result if isinstance(result, bool | str | list | None) else type(result).__name__.replace("Local", "")
    )


def _script(fs: api.FileSystem, top: str) -> list[object]:
    def path(name: str) -> str:
        return f"{top}/{name}"

    def made(name: str, *, exclusive: bool = False) -> int:
        file = fs.create(path(name), exclusive=exclusive)
        inode = file.stat().inode
        file.pwrite(0, b"12345")
        file.close()
        return inode

    first = made("a")
    outcomes: list[object] = [made("a") == first]  # truncated, not replaced
    outcomes += [
        _outcome(action)
        for action in (
            lambda: fs.create(path("a"), exclusive=True),
            lambda: fs.create(path("link"), exclusive=True),
            lambda: fs.create(path("d")),
            lambda: fs.create(path("no/a")),
            lambda: fs.create(path("a/b")),
            lambda: fs.open(path("no")),
            lambda: fs.open(path("d"), write=True),
            lambda: fs.open(path("d")),
            lambda: fs.open(path("loop")),
            lambda: fs.open(path("a"), cache="what"),
            lambda: fs.stat(path("no")),
            lambda: fs.stat(path("a/b")),
            lambda: fs.stat(path("link")),
            lambda: fs.stat(path("loop")),
            lambda: fs.unlink(path("no")),
            lambda: fs.unlink(path("d")),
            lambda: fs.rename(path("no"), path("x")),
            lambda: fs.rename(path("a"), path("d")),
            lambda: fs.rename(path("a"), path("no/x")),
            lambda: fs.rename(path("a"), path("d/../d/b")),
            lambda: fs.list_directory(top),
            lambda: fs.list_directory(path("d")),
            lambda: fs.list_directory(path("d/b")),
            lambda: fs.list_directory(path("no")),
            lambda: fs.resolve(path("link")).removeprefix(top),
            lambda: fs.resolve(path("d/up/link")).removeprefix(top),
            lambda: fs.resolve(path("no/../what/x")).removeprefix(top),
            lambda: fs.sync_directory(path("no")),
            lambda: fs.sync_directory(path("d/b")),
            lambda: fs.sync_directory(path("d")),
            lambda: fs.create(path("link")),  # creates what the link says
            lambda: fs.stat(path("d/target")),
            lambda: fs.unlink(path("link")),
            lambda: fs.list_directory(path("d")),
            lambda: fs.give_to(path("no"), 0, 0),
            lambda: fs.rename(path("d/b"), path("hard")),  # two names of one file: nothing happens
            lambda: fs.list_directory(top),
        )
    ]
    return outcomes


def test_names_and_errors_are_those_of_a_real_file_system(tmp_path: Path) -> None:
    fs = SimulatedFileSystem()
    fs.make_directory("/top")
    fs.make_directory("/top/d")
    fs.symlink("d/target", "/top/link")
    fs.symlink("loop", "/top/loop")
    fs.symlink("..", "/top/d/up")
    fs.create("/top/a").close()
    fs.link("/top/a", "/top/hard")
    top = tmp_path / "top"
    (top / "d").mkdir(parents=True)
    (top / "link").symlink_to("d/target")
    (top / "loop").symlink_to("loop")
    (top / "d" / "up").symlink_to("..")
    (top / "a").touch()
    (top / "hard").hardlink_to(top / "a")
    simulated, real = _script(fs, "/top"), _script(LocalFileSystem(), str(top))
    assert [str(outcome).replace("Simulated", "") for outcome in simulated] == [
        str(outcome) for outcome in real
    ]


def test_hard_links_share_content_and_unlinked_files_live_while_open() -> None:
    fs = SimulatedFileSystem()
    fs.write_file("/a", b"one")
    fs.link("/a", "/b")
    file = fs.open("/a", write=True)
    fs.unlink("/a")
    file.pwrite(0, b"two")
    assert fs.read_file("/b") == b"two"
    fs.unlink("/b")
    file.pwrite(0, b"six")
    assert file.pread(0, 9) == b"six"
    assert fs.used() == PAGE
    file.close()
    assert fs.used() == 0


def test_what_identifies_a_file() -> None:
    fs = SimulatedFileSystem(uid=5, gid=6)
    file = fs.create("/a", mode=0o600)
    first = file.stat()
    assert (first.mode & 0o777, first.uid, first.gid, first.is_device) == (0o600, 5, 6, False)
    file.pwrite(0, b"x")
    second = file.stat()
    assert second.mtime_ns > first.mtime_ns and second.ctime_ns > first.ctime_ns
    fs.give_to("/a", 7, 8)
    third = file.stat()
    assert (third.uid, third.gid, third.mtime_ns) == (7, 8, second.mtime_ns)
    assert third.ctime_ns > second.ctime_ns
    assert fs.create("/b").stat().inode != first.inode
    fs.rename("/a", "/b")
    assert file.stat().inode == first.inode
    named = fs.stat("/b")
    assert named is not None and named.inode == first.inode


def test_extended_attributes() -> None:
    fs = SimulatedFileSystem()
    file = fs.create("/a")
    assert file.get_attribute("user.x") is None
    assert file.set_attribute("user.x", b"1")
    assert file.get_attribute("user.x") == b"1"
    file.remove_attribute("user.x")
    file.remove_attribute("user.x")
    assert file.get_attribute("user.x") is None
    without = SimulatedFileSystem(extended_attributes=False).create("/a")
    assert not without.set_attribute("user.x", b"1")
    assert without.get_attribute("user.x") is None


def test_what_cannot_be_done_says_why() -> None:
    fs = SimulatedFileSystem()
    fs.write_file("/a", b"x")
    reading = fs.open("/a")
    assert reading.pread(5, 1) == b""
    for action, code in (
        (lambda: reading.pwrite(0, b"y"), errno.EBADF),
        (lambda: reading.truncate(0), errno.EBADF),
        (lambda: reading.pread(-1, 1), errno.EINVAL),
        (lambda: fs.open("/a", write=True).pwrite(-1, b"y"), errno.EINVAL),
        (lambda: fs.open("/a", write=True).pwrite(MAX_LENGTH, b"y"), errno.EFBIG),
    ):
        with pytest.raises(StorageError) as caught:
            action()
        assert caught.value.errno == code
    reading.sync_all()
    reading.close()
    reading.close()
    with pytest.raises(StorageError, match="/a: read: Bad file descriptor"):
        reading.pread(0, 1)
    fs.set_read_only("/")
    for change in (lambda: fs.create("/b"), lambda: fs.unlink("/a"), lambda: fs.rename("/a", "/b")):
        with pytest.raises(StorageError) as caught:
            change()
        assert caught.value.errno == errno.EACCES
    fs.write_file("/a", b"still writable")
    with pytest.raises(UsageError):
        fs.open("/a", cache="fast")


def test_image_locks() -> None:
    fs = SimulatedFileSystem()
    fs.write_file("/a", b"x")
    writer = fs.open("/a", write=True, locking=True)
    with pytest.raises(LockError, match=r'"write" lock\nIs another process using the image .*/a'):
        fs.create("/a", locking=True)
    assert fs.read_file("/a") == b"x"
    reader = fs.open("/a", locking=True)
    with pytest.raises(LockError, match='Failed to get shared "write" lock'):
        lock(reader, READER)
    reader.close()
    sharing = fs.open("/a", locking=True, force_share=True)
    lock(sharing, READER)
    sharing.close()
    fs.open("/a", write=True).close()
    fs.clone().open("/a", write=True, locking=True)  # another life: nothing is open
    writer.close()
    readers = [fs.open("/a", locking=True) for _ in range(2)]
    for reader in readers:
        lock(reader, READER)
    with pytest.raises(LockError):
        fs.open("/a", write=True, locking=True)
    for reader in readers:
        reader.close()
    first, second = fs.open("/a"), fs.open("/a")
    assert first.try_lock() and first.try_lock() and not second.try_lock()
    first.close()
    assert second.try_lock()


# ---- the trace, copies and faults


def test_one_entry_for_each_mutation_and_none_for_the_rest() -> None:
    fs = SimulatedFileSystem()
    fs.make_directory("/d")
    fs.begin_trace()
    file = fs.create("/a")
    file.pwrite(0, b"data")
    file.pwrite(0, b"")
    file.pread(0, 4)
    fs.mark("written")
    file.sync()
    file.sync_all()
    file.set_attribute("user.x", b"1")
    file.start_writeback(0, 4)
    fs.rename("/a", "/d/b")
    fs.sync_directory("/d")
    careless = fs.open("/d/b", write=True, cache="unsafe")
    careless.pwrite(0, b"more")
    careless.sync()
    fs.unlink("/d/b")
    with pytest.raises(StorageError):
        fs.unlink("/d/b")
    assert [entry.kind for entry in fs.trace.entries] == [
        "create",
        "write",
        "sync",
        "sync_all",
        "attributes",
        "rename",
        "sync_directory",
        "write",
        "unlink",
    ]
    assert fs.trace.marks == [(2, "written")]
    assert fs.trace.labels(1) == () and fs.trace.labels(2) == ("written",)


def test_clones_go_their_own_ways() -> None:
    fs = SimulatedFileSystem()
    fs.write_file("/a", bytes(2 * PAGE))
    file = fs.open("/a", write=True)
    file.pwrite(0, b"both")
    other = fs.clone()
    file.pwrite(4, b"mine")
    other.open("/a", write=True).pwrite(4, b"his.")
    other.create("/b")
    assert fs.read_file("/a")[:8] == b"bothmine" and other.read_file("/a")[:8] == b"bothhis."
    assert fs.stat("/b") is None
    assert fs.unsynced("/a") == other.unsynced("/a") == 2  # a clone forgets nothing that is not durable


def test_killed_at_a_call_nothing_happens_any_more() -> None:
    fs = SimulatedFileSystem()
    fs.write_file("/a", b"....")
    fs.begin_trace()
    file = fs.open("/a", write=True)
    fs.kill_at(2)
    file.pwrite(0, b"1")
    with pytest.raises(Killed):
        file.pwrite(1, b"2")
    for late in (
        lambda: file.pwrite(2, b"3"),
        file.sync,
        lambda: fs.unlink("/a"),
        lambda: fs.create("/b"),
        lambda: file.discard(0, 1),
        lambda: file.set_attribute("user.x", b""),
    ):
        with pytest.raises(Killed):
            late()
    assert len(fs.trace) == 1
    assert fs.read_file("/a") == b"1..."
    after = fs.clone()
    after.open("/a", write=True).pwrite(1, b"b")
    assert after.read_file("/a") == b"1b.."


def test_each_mutation_can_fail_once() -> None:
    def run(fs: SimulatedFileSystem) -> None:
        file = fs.create("/a")
        file.pwrite(0, b"data")
        file.sync()
        fs.rename("/a", "/b")
        fs.sync_directory("/")

    kinds = []
    for number in range(1, 6):
        fs = SimulatedFileSystem()
        fs.fail_at(number, errno.EIO)
        with pytest.raises(StorageError) as caught:
            run(fs)
        kinds.append(type(caught.value))
        assert caught.value.errno == errno.EIO
        run(fs)  # once
        assert fs.read_file("/b") == b"data"
    assert kinds == [StorageError, StorageError, SyncFailed, StorageError, SyncFailed]


def test_a_sync_failed_by_number_leaves_its_changes_in_doubt() -> None:
    fs = SimulatedFileSystem()
    file = fs.create("/a")
    file.pwrite(0, b"data")
    fs.fail_at(1)
    with pytest.raises(SyncFailed):
        file.sync()
    file.sync()
    assert fs.unsynced("/a") == 1


def test_a_chosen_sync_fails_once() -> None:
    fs = SimulatedFileSystem()
    a, b = fs.create("/a"), fs.create("/b")
    fs.fail_sync("/a")
    b.sync()
    with pytest.raises(SyncFailed, match="/a: sync: Input/output error"):
        a.sync()
    a.sync()
    fs.fail_sync(2)
    a.sync()
    with pytest.raises(SyncFailed):
        b.sync_all()
    b.sync_all()


def test_space_runs_out() -> None:
    fs = SimulatedFileSystem()
    fs.make_directory("/j")
    fs.set_capacity(4 * PAGE)
    fs.set_capacity(2 * PAGE, "/j")
    file, log = fs.create("/a"), fs.create("/j/log")
    log.preallocate(0, 2 * PAGE, keep_size=True)
    log.pwrite(0, bytes(2 * PAGE))  # its own reserve
    with pytest.raises(StorageError) as caught:
        log.pwrite(2 * PAGE, b"x")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(StorageError):
        file.pwrite(100, b"x" * 5 * PAGE)
    assert file.length() == 4 * PAGE  # what fitted was written
    with pytest.raises(StorageError):
        file.preallocate(0, 5 * PAGE, keep_size=True)
    with pytest.raises(StorageError):
        file.write_zeroes(0, 5 * PAGE, unmap=False)
    file.pwrite(0, b"in place")
    file.truncate(TIB)
    file.write_zeroes(0, PAGE, unmap=True)
    file.pwrite(TIB - PAGE, b"there is room again")
    assert (fs.used("/"), fs.used("/j")) == (4 * PAGE, 2 * PAGE)
    fs.unlink("/a")
    file.close()
    fs.write_file("/b", b"x" * 4 * PAGE)
    fs.set_capacity(None)
    fs.create("/c").pwrite(0, bytes(9 * PAGE))


def test_threads_share_a_file() -> None:
    fs = SimulatedFileSystem()
    file = fs.create("/a")

    def fill(number: int) -> None:
        for index in range(200):
            file.pwrite((index * 4 + number) * 100, bytes([number + 1]) * 100)

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fs.read_file("/a") == b"".join(bytes([number + 1]) * 100 for number in range(4)) * 200
    assert len(fs.trace) == 801
    assert fs.unsynced("/a") == 800
