"""Real files: every cache mode against a model in memory, on a disk file system and on tmpfs."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safeimg.drivers.errors import DriverError, StorageError, SyncFailed, UsageError
from safeimg.drivers.storage import space
from safeimg.drivers.storage.api import CACHE_MODES, FileSystem, Span
from safeimg.drivers.storage.file import LocalFile, LocalFileSystem

fs = LocalFileSystem()
PLACES = [None, "/dev/shm"]  # the temporary folder, and tmpfs


@pytest.fixture(params=PLACES, ids=["tmp", "shm"])
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    if request.param is not None and not Path(request.param).is_dir():
        pytest.skip(f"no {request.param}")
    with tempfile.TemporaryDirectory(dir=request.param) as name:
        yield Path(name)


def create(path: Path, cache: str = "writeback") -> LocalFile:
    try:
        return fs.create(str(path), cache=cache)
    except StorageError as error:
        if "O_DIRECT" in error.strerror:
            pytest.skip(error.strerror)
        raise


def read_by_spans(file: LocalFile, offset: int, length: int) -> bytes:
    """What the spans say the range holds: data read, holes as zeroes. Also checks that they are in order."""
    parts = []
    for start, size, is_data, _ in file.spans(offset, length):
        assert start == offset and size > 0
        parts.append(file.pread(start, size) if is_data else bytes(size))
        offset += size
    return b"".join(parts)


offsets = st.one_of(st.integers(0, 40_000), st.integers(0, 9).map(lambda n: n * 4096))
lengths = st.one_of(st.integers(0, 20_000), st.integers(0, 5).map(lambda n: n * 4096))
actions = st.lists(
    st.one_of(
        st.tuples(st.just("pwrite"), offsets, lengths),
        st.tuples(st.just("punch"), offsets, lengths),
        st.tuples(st.just("zero"), offsets, lengths),
        st.tuples(st.just("truncate"), offsets, st.just(0)),
        st.tuples(st.just("pread"), offsets, lengths),
        st.tuples(st.just("spans"), offsets, lengths),
        st.tuples(st.just("preallocate"), offsets, lengths),
        st.tuples(st.just("sync"), offsets, lengths),
    ),
    max_size=12,
)


def grow(model: bytearray, length: int) -> None:
    model.extend(bytes(max(length - len(model), 0)))


def play(file: LocalFile, todo: list[tuple[str, int, int]]) -> None:
    model = bytearray()
    for number, (action, offset, length) in enumerate(todo):
        end = offset + length
        if action == "pwrite":
            data = bytes([number + 1]) * length
            file.pwrite(offset, data)
            if data:
                grow(model, end)
                model[offset:end] = data
        elif action in ("punch", "zero"):
            file.write_zeroes(offset, length, unmap=action == "punch")
            if length:
                grow(model, end)
                model[offset:end] = bytes(length)
        elif action == "truncate":
            file.truncate(offset)
            grow(model, offset)
            del model[offset:]
        elif action == "preallocate":
            file.preallocate(offset, length, keep_size=True)
        elif action == "sync":
            file.start_writeback(offset, length)
            file.sync()
        elif action == "pread":
            assert file.pread(offset, length) == model[offset:end]
        else:
            assert read_by_spans(file, offset, length) == model[offset:end]
        assert file.length() == len(model)
    assert file.pread(0, 1 << 40) == model
    assert read_by_spans(file, 0, 1 << 40) == model
    buffer = memoryview(bytearray(b"x" * (len(model) + 5000)))
    assert file.pread_into(0, buffer) == len(model)
    assert buffer[: len(model)] == model


@pytest.mark.parametrize("place", PLACES, ids=["tmp", "shm"])
@pytest.mark.parametrize("cache", CACHE_MODES)
@settings(max_examples=25, deadline=None)
@given(todo=actions)
def test_like_bytes_in_memory(place: str | None, cache: str, todo: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory(dir=place) as name:
        file = create(Path(name, "file"), cache)
        try:
            play(file, todo)
        finally:
            file.close()


@pytest.mark.parametrize("refused", ["punch", "zero range", "both", "everything"])
@settings(max_examples=15, deadline=None)
@given(todo=actions)
def test_like_bytes_without_fallocate(refused: str, todo: list[tuple[str, int, int]]) -> None:
    modes = {
        "punch": [space.PUNCH_HOLE],
        "zero range": [space.ZERO_RANGE],
        "both": [space.PUNCH_HOLE, space.ZERO_RANGE],
        "everything": [0, space.PUNCH_HOLE, space.ZERO_RANGE],
    }
    real = space.fallocate

    def fake(fd: int, mode: int, offset: int, length: int) -> None:
        if mode & ~space.KEEP_SIZE in modes[refused]:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        real(fd, mode, offset, length)

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(space, "fallocate", fake)
        file = create(Path(name, "file"))
        try:
            play(file, todo)
        finally:
            file.close()


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_short_reads_and_writes_are_continued(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = create(tmp_path / "file", cache)
    step = file.alignment if cache == "none" else 1000
    content = os.urandom(40_000)
    pread, pwrite, preadv = os.pread, os.pwrite, os.preadv
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:step], offset))
        patch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, step), offset))
        patch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:step]], offset))
        file.pwrite(10, content)
        assert file.pread(0, 50_000) == bytes(10) + content
        assert file.pread(10, 8192) == content[:8192]
    file.close()


def test_threads_write_side_by_side(folder: Path) -> None:
    """Odd-sized neighbours, appended in any order: nobody takes back another's bytes or length."""
    file = create(folder / "file", "none")
    size, pieces, threads = 3001, 160, 4

    def work(first: int) -> None:
        for number in range(first, pieces, threads):
            if number % 7 == 0:
                file.write_zeroes(number * size, size, unmap=True)
            else:
                file.pwrite(number * size, bytes([number % 255 + 1]) * size)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    expected = b"".join(bytes([0 if n % 7 == 0 else n % 255 + 1]) * size for n in range(pieces))
    assert file.pread(0, len(expected) + 1) == expected
    file.close()


def test_direct_io_takes_any_memory(folder: Path) -> None:
    file = create(folder / "file", "none")
    assert file.alignment >= 4096
    content = os.urandom(3 << 20)
    file.pwrite(0, content)  # whole blocks, memory wherever it is
    room = memoryview(bytearray(len(content) + 1))
    for shift in (0, 1):
        assert file.pread_into(0, room[shift : shift + len(content)]) == len(content)
        assert room[shift : shift + len(content)] == content
    assert file.pread(4095, 1 << 20) == content[4095 : 4095 + (1 << 20)]
    assert file.length() == len(content)
    file.close()


def test_holes_are_punched_and_space_is_kept(folder: Path) -> None:
    file = create(folder / "file")
    file.pwrite(0, b"x" * 65536)
    file.write_zeroes(0, 65536, unmap=False)
    assert file.stat().allocated >= 65536
    file.write_zeroes(0, 65536, unmap=True)
    assert file.stat().allocated == 0
    file.write_zeroes(65536, 1 << 30, unmap=True)  # past the end
    assert file.length() == 65536 + (1 << 30)
    assert file.stat().allocated < 65536
    assert list(file.spans(0, 1 << 40)) == [Span(0, file.length(), False)]
    file.preallocate(0, 65536, keep_size=True)
    assert file.stat().allocated >= 65536
    file.discard(0, 65536)
    assert file.stat().allocated < 65536
    file.close()


def test_preallocate_grows_or_keeps_the_size(tmp_path: Path) -> None:
    file = create(tmp_path / "file")
    file.preallocate(0, 1 << 20, keep_size=True)
    assert file.length() == 0
    file.preallocate(0, 1 << 20, keep_size=False)
    assert file.length() == 1 << 20 and file.pread(0, 1 << 21) == bytes(1 << 20)
    file.close()


def test_preallocate_says_when_there_is_no_room(folder: Path) -> None:
    """More than a file can have: twice the disk would do, but file systems allocate all that there is, and then fail,
    as everybody else does meanwhile."""
    file = create(folder / "file")
    with pytest.raises(StorageError) as caught:
        file.preallocate(0, 1 << 62, keep_size=True)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert caught.value.action == "allocate"
    file.close()


# ---- syncs


def failing(number: int) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("name", ["sync", "sync_all"])
def test_hazard_8_nothing_is_written_after_a_failed_sync(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = create(tmp_path / "file")
    file.pwrite(0, b"before")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing(errno.EIO))
        patch.setattr(os, "fsync", failing(errno.EIO))
        with pytest.raises(SyncFailed) as caught:
            getattr(file, name)()
        assert caught.value.errno == errno.EIO
    for attempt in (  # now the system would say yes
        file.sync,
        file.sync_all,
        lambda: file.pwrite(0, b"after"),
        lambda: file.write_zeroes(0, 1, unmap=True),
        lambda: file.truncate(0),
        lambda: file.preallocate(0, 1, keep_size=True),
    ):
        with pytest.raises(SyncFailed):
            attempt()
    file.discard(0, 6)
    assert file.pread(0, 10) == b"before"
    file.close()


@pytest.mark.parametrize("cache", ["writethrough", "directsync"])
def test_hazard_8_in_write_through_modes(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = create(tmp_path / "file", cache)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(StorageError) as caught:
            file.pwrite(0, b"full")
        assert not isinstance(caught.value, SyncFailed)
        file.sync()
        patch.setattr(os, "pwrite", failing(errno.EIO))
        with pytest.raises(SyncFailed):
            file.pwrite(0, b"broken")
    with pytest.raises(SyncFailed):
        file.pwrite(0, b"later")
    file.close()


def test_write_through_syncs_what_o_dsync_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cache, expected in (("writethrough", 3), ("writeback", 0)):
        file = create(tmp_path / cache, cache)
        synced: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", synced.append)
            file.truncate(4096)
            file.write_zeroes(0, 8192, unmap=True)
            file.preallocate(0, 8192, keep_size=True)
        assert len(synced) == expected
        file.close()


def test_unsafe_does_not_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = create(tmp_path / "file", "unsafe")
    monkeypatch.setattr(os, "fdatasync", failing(errno.EIO))
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    file.pwrite(0, b"data")
    file.sync()
    file.sync_all()
    file.close()


def test_open_flags_of_the_cache_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open
    opened: list[int] = []

    def noted(path: str, flags: int, mode: int = 0o777) -> int:
        opened.append(real(path, flags, mode))
        return opened[-1]

    monkeypatch.setattr(os, "open", noted)
    direct, through = os.O_DIRECT, os.O_DSYNC
    for cache, expected in (
        ("none", direct),
        ("writeback", 0),
        ("writethrough", through),
        ("directsync", direct | through),
        ("unsafe", 0),
    ):
        file = create(tmp_path / cache, cache)
        flags = {fcntl.fcntl(fd, fcntl.F_GETFL) & (direct | through | os.O_NONBLOCK) for fd in opened}
        assert flags == {expected, expected & ~direct}
        file.close()
        while opened:  # and all are closed
            with pytest.raises(OSError):
                os.fstat(opened.pop())


def test_read_only_file_can_be_synced_not_written(tmp_path: Path) -> None:
    create(tmp_path / "file").close()
    file = fs.open(str(tmp_path / "file"))
    assert not file.writable
    file.sync()
    file.sync_all()
    with pytest.raises(StorageError) as caught:
        file.pwrite(0, b"x")
    assert caught.value.errno == errno.EBADF and caught.value.action == "write"
    file.close()


# ---- requests that make no sense


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_absurd_numbers_are_storage_errors(tmp_path: Path, cache: str) -> None:
    file = create(tmp_path / "file", cache)
    file.pwrite(0, b"x" * 10)
    room = memoryview(bytearray(10))
    for attempt in (
        lambda: file.pread(2**63, 1),
        lambda: file.pread(-1, 1),
        lambda: file.pread_into(-1, room),
        lambda: file.pread_into(2**63, room),
        lambda: file.pwrite(2**63, b"x"),
        lambda: file.pwrite(2**63 - 1, b"xx"),
        lambda: file.pwrite(-1, b"xx"),
        lambda: file.truncate(2**64),
        lambda: file.truncate(-1),
        lambda: file.write_zeroes(2**63, 1, unmap=True),
        lambda: file.write_zeroes(2**62, 2**63, unmap=False),
        lambda: list(file.spans(-1, 5)),
    ):
        with pytest.raises(StorageError):
            attempt()
    assert file.pread(0, 2**62) == b"x" * 10  # and no memory for the length asked for
    assert file.pread(2**40, 10) == b""
    assert list(file.spans(100, 2**64)) == []
    file.discard(2**64, 2**64)
    file.start_writeback(2**64, 1)
    assert file.length() == 10
    file.close()


def test_closed_file_is_not_somebody_elses(tmp_path: Path) -> None:
    file = create(tmp_path / "file")
    file.close()
    file.close()
    other = create(tmp_path / "other")
    for attempt in (lambda: file.pwrite(0, b"x"), lambda: file.pread(0, 1), file.length):
        with pytest.raises(StorageError) as caught:
            attempt()
        assert caught.value.errno == errno.EBADF
    assert other.length() == 0
    other.close()


# ---- names


def test_open_failures_carry_what_qemu_prints(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(StorageError) as caught:
        fs.open(missing)
    error = caught.value
    assert (error.path, error.action, error.strerror) == (missing, "open", "No such file or directory")
    with pytest.raises(StorageError) as caught:
        fs.create(missing + "/below")
    assert (caught.value.action, caught.value.errno) == ("create", errno.ENOENT)
    with pytest.raises(UsageError, match=r"'file' driver requires '.*' to be a regular file"):
        fs.open(str(tmp_path))
    with pytest.raises(StorageError) as caught:
        fs.open(str(tmp_path), write=True)
    assert caught.value.strerror == "Is a directory"
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError):  # and does not wait for a writer
        fs.open(str(tmp_path / "fifo"))
    with pytest.raises(UsageError, match="Invalid cache option: fast"):
        fs.open(missing, cache="fast")
    for name in ("nul\0inside", "x" * 5000):
        with pytest.raises(StorageError):
            fs.open(name)
    with pytest.raises(DriverError):
        fs.stat("nul\0inside")
    assert fs.stat("x" * 5000) is None


def test_o_direct_unsupported_in_qemus_words() -> None:
    if not Path("/proc/version").exists():
        pytest.skip("no /proc")
    with pytest.raises(StorageError) as caught:
        fs.open("/proc/version", cache="none")
    assert caught.value.strerror == "filesystem does not support O_DIRECT"
    assert caught.value.action == "open"


def test_create_keeps_inode_links_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    os.link(path, tmp_path / "link")
    before = path.stat()
    file = fs.create(str(path), mode=0o600)
    after = path.stat()
    assert (before.st_ino, before.st_mode, before.st_nlink) == (after.st_ino, after.st_mode, after.st_nlink)
    assert file.length() == 0
    file.pwrite(0, b"new content")
    file.close()
    file = fs.create(str(path), truncate=False)
    assert file.pread(0, 100) == b"new content"
    file.close()
    with pytest.raises(StorageError) as caught:
        fs.create(str(path), exclusive=True)
    assert caught.value.errno == errno.EEXIST
    for cache in ("writeback", "none"):
        fs.create(str(tmp_path / cache), mode=0o600, exclusive=True, cache=cache).close()
        assert stat.S_IMODE((tmp_path / cache).stat().st_mode) == 0o600


def test_names_and_directories(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    assert fs.stat(path) is None and fs.stat(path + "/below") is None
    file = fs.create(path)
    file.pwrite(0, b"12345")
    status = fs.stat(path)
    assert status is not None and status == file.stat()
    assert status.size == 5 and not status.is_device and status.inode == Path(path).stat().st_ino
    fs.rename(path, str(tmp_path / "b"))
    fs.sync_directory(str(tmp_path))
    (tmp_path / "link").symlink_to("b")
    assert fs.list_directory(str(tmp_path)) == ["b", "link"]
    assert fs.resolve(str(tmp_path / "link")) == os.path.realpath(tmp_path / "b")
    assert fs.stat(str(tmp_path / "link")) == file.stat()
    fs.unlink(str(tmp_path / "b"))
    file.close()
    for attempt in (
        lambda: fs.unlink(str(tmp_path / "b")),
        lambda: fs.rename(str(tmp_path / "b"), path),
        lambda: fs.list_directory(path),
        lambda: fs.sync_directory(path),
    ):
        with pytest.raises(StorageError) as caught:
            attempt()
        assert caught.value.errno == errno.ENOENT


def test_give_to_never_follows_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"")
    (tmp_path / "link").symlink_to("target")
    fs.give_to(str(tmp_path / "link"), 12345, 12345)
    assert target.stat().st_uid == os.getuid()
    fs.give_to(str(target), os.getuid(), os.getgid())
    fs.give_to(str(tmp_path / "missing"), 1, 1)
    if os.getuid() == 0:
        fs.give_to(str(target), 12345, 54321)
        assert (target.stat().st_uid, target.stat().st_gid) == (12345, 54321)


def test_attributes(tmp_path: Path) -> None:
    file = create(tmp_path / "file")
    if not file.set_attribute("user.safeimg.test", b"\0value"):
        pytest.skip("no extended attributes here")
    assert file.get_attribute("user.safeimg.test") == b"\0value"
    file.remove_attribute("user.safeimg.test")
    file.remove_attribute("user.safeimg.test")
    assert file.get_attribute("user.safeimg.test") is None
    assert not file.set_attribute("nonsense", b"")
    file.close()


# ---- devices


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[str]:
    backing = tmp_path / "disk"
    backing.write_bytes(b"\xff" * ((1 << 20) + 1536))
    if shutil.which("losetup") is None:
        pytest.skip("no losetup")
    made = subprocess.run(["losetup", "-f", "--show", backing], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip("cannot make loop devices here")
    yield made.stdout.strip()
    subprocess.run(["losetup", "-d", made.stdout.strip()], check=True)


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_block_device(loop: str, cache: str) -> None:
    size = (1 << 20) + 1536
    file = fs.open(loop, write=True, cache=cache)
    status = file.stat()
    assert file.length() == size
    assert status.is_device and status.size == size
    assert fs.stat(loop) == status
    assert list(file.spans(0, 1 << 40)) == [Span(0, size, True)]
    model = bytearray(b"\xff" * size)
    for unmap in (True, False):
        for offset, length in ((100, 50), (1000, 9000), (65536, 65536), (size - 700, 700), (size - 5000, 49)):
            file.pwrite(offset, b"\x55" * length)
            model[offset : offset + length] = b"\x55" * length
            assert file.pread(offset, length) == b"\x55" * length
            file.write_zeroes(offset + 10, length - 20, unmap=unmap)
            model[offset + 10 : offset + length - 10] = bytes(length - 20)
        assert file.pread(0, size + 1) == model
    past_the_end: tuple[Callable[[], None], ...] = (
        lambda: file.pwrite(size - 1, b"12"),
        lambda: file.write_zeroes(size - 512, 1024, unmap=True),
        lambda: file.truncate(size + 1),
    )
    for attempt in past_the_end:
        with pytest.raises(StorageError) as caught:
            attempt()
        assert caught.value.errno == errno.ENOSPC
    file.truncate(512)  # as if: a device has the length that it has
    file.preallocate(0, size, keep_size=False)
    file.sync()
    file.discard(65536, 65536)
    file.discard(1, 1)
    file.discard(2**64, 2**64)
    assert file.length() == size
    assert file.pread(0, 65536) == model[:65536]
    file.close()


def test_satisfies_the_interface(tmp_path: Path) -> None:
    checked: FileSystem = fs
    checked.create(str(tmp_path / "file")).close()


def test_start_up_stays_light() -> None:
    """Reading a local image must not load what only writing needs, nor anything heavy."""
    script = (
        "import sys; from safeimg.drivers.storage.file import LocalFileSystem as F; f = F().open(sys.argv[1],"
        "locking=True); f.pread(0, 512); list(f.spans(0, 512)); f.close();"
        "print(sorted({'ctypes', 'mmap', 'trio', 'numpy', 'sqlite3'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, __file__],
        capture_output=True, text=True, check=True,
    )
    assert result.stdout.strip() == "[]"
