"""Files and block devices of this machine: `LocalFile` and `LocalFileSystem`.

    cache mode      none   writeback   writethrough   directsync   unsafe
    O_DIRECT         x                                    x
    O_DSYNC                                 x             x
    sync does        x          x           x             x        nothing
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from safeimg.drivers.errors import StorageError, SyncFailed, UsageError
from safeimg.drivers.storage import locks, space
from safeimg.drivers.storage.api import CACHE_MODES, Buffer, FileStat, Span
from safeimg.drivers.storage.buffered import BufferedIO, PositionalIO

_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)  # nor can there be
_TRUSTED = 1 << 20  # reads up to this size get their buffer without a look at the file's length


_ERRORS = (OSError, ValueError, OverflowError)  # the latter two: NUL in a name; an offset of 2^63


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _failed(path: str, action: str, error: Exception) -> StorageError:
    """What the operating system or Python said about a call, as ours."""
    return StorageError(path, action, error if isinstance(error, OSError) else _error(errno.EINVAL))


@contextmanager
def _reported(path: str, action: str) -> Iterator[None]:
    """Around calls whose failures become `StorageError`. Frequent calls spell it out: this costs time."""
    try:
        yield
    except _ERRORS as error:
        raise _failed(path, action, error) from None


def _file_stat(status: os.stat_result) -> FileStat:
    is_device = stat.S_ISBLK(status.st_mode)
    return FileStat(
        device=status.st_dev,
        inode=status.st_ino,
        size=space.device_size(status.st_rdev) if is_device else status.st_size,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        allocated=status.st_blocks * 512,
        is_device=is_device,
    )


def _check_limit(end: int) -> None:
    """Refuses a write up to `end` of a file that may not get so large (ulimit -f): the system would write a part of it,
    and leave a sector that is neither old nor new."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and end > limit:
        raise _error(errno.EFBIG)


class LocalFile:
    """An open regular file or block device; made by `LocalFileSystem`, usable from several threads.

    Once a sync has failed, every later write and sync raises `SyncFailed`: the system may have marked pages
    clean that never reached the disk, so a sync that succeeds on retry would prove nothing."""

    def __init__(self, path: str, fd: int, buffered: int | None, *, writable: bool, cache: str,
                 is_device: bool) -> None:
        """Owns both descriptors. `buffered` is given if `fd` has O_DIRECT: the same file without."""
        self._path = path
        self._fd = fd
        self._buffered = buffered
        self._writable = writable
        self._is_device = is_device
        self.locking = False  # see `locks.Lockable`
        self._through = cache in ("writethrough", "directsync")
        self._unsafe = cache == "unsafe"
        self._sync_error: OSError | None = None
        self._space = space.Space(fd, is_device=is_device)
        self._locks = locks.ImageLocks(fd, path)
        self._io: PositionalIO
        if buffered is None:
            self._io = BufferedIO(fd)
        else:
            from safeimg.drivers.storage.direct import DirectIO

            self._io = DirectIO(fd, buffered)

    @property
    def path(self) -> str:
        return self._path

    @property
    def writable(self) -> bool:
        return self._writable

    @property
    def alignment(self) -> int:
        return self._io.alignment

    def lock(self, claim: locks.Claim) -> None:
        """Changes QEMU's image locks on this file to `claim`; `LockError` if somebody is in the way."""
        self._locks.change(claim)

    def try_lock(self) -> bool:
        """Takes the whole file's exclusive lock (flock) until it is closed; False if somebody else has it.
        Where the file system has no locks: True. Independent of the image locks."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno != errno.EWOULDBLOCK
        return True

    def length(self) -> int:
        try:
            return os.lseek(self._fd, 0, os.SEEK_END)  # fstat knows no device's capacity
        except OSError as error:
            raise _failed(self._path, "length", error) from None

    def pread(self, offset: int, length: int) -> bytes:
        if length > _TRUSTED:  # a length from a hostile image must not cost memory
            length = min(length, max(self.length() - offset, 0))
        if self._buffered is None:
            try:
                data = os.pread(self._fd, length, offset)
            except _ERRORS as error:
                raise _failed(self._path, "read", error) from None
            if len(data) == length or not data:
                return data
        buffer = memoryview(bytearray(length))
        return bytes(buffer[: self.pread_into(offset, buffer)])

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        try:
            if offset < 0:  # to preadv2 (which Python calls) -1 is the current position
                raise _error(errno.EINVAL)
            return self._io.read_into(offset, buffer)
        except _ERRORS as error:
            raise _failed(self._path, "read", error) from None

    @contextmanager
    def _changing(self, action: str) -> Iterator[None]:
        """Around all that writes: refuses after a failed sync, and tells a failed sync inside a write."""
        self._refuse_after_failed_sync()
        try:
            yield
        except _ERRORS as error:
            raise self._failed_change(action, error) from None

    def _failed_change(self, action: str, error: Exception) -> StorageError:
        if self._through and isinstance(error, OSError) and error.errno == errno.EIO:
            self._sync_error = error  # of the sync that is part of the write
            return SyncFailed(self._path, action, error)
        return _failed(self._path, action, error)

    def _refuse_after_failed_sync(self) -> None:
        if self._sync_error is not None:
            raise SyncFailed(self._path, "sync failed before", self._sync_error)

    def pwrite(self, offset: int, data: Buffer) -> None:
        view = memoryview(data)
        if view.itemsize != 1 or view.ndim != 1:
            view = view.cast("B")
        self._refuse_after_failed_sync()
        try:
            if not self._is_device:
                _check_limit(offset + len(view))
            self._io.write(offset, view)
        except _ERRORS as error:
            raise self._failed_change("write", error) from None

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        if length <= 0:
            return
        with self._changing("write zeroes"):
            self._space.zero(self._io, offset, length, unmap=unmap)
        self._sync_if_through()

    def discard(self, offset: int, length: int) -> None:
        if self._sync_error is not None or length <= 0:
            return
        try:
            self._space.discard(offset, length)
        except OSError:
            pass

    def preallocate(self, offset: int, length: int, *, keep_size: bool) -> None:
        if self._is_device or length <= 0:
            return
        with self._changing("allocate"):
            self._space.allocate(offset, length, keep_size=keep_size)
        self._sync_if_through()

    def truncate(self, length: int) -> None:
        with self._changing("truncate"):
            if not self._is_device:
                os.ftruncate(self._fd, length)
            elif length > self.length():
                raise OSError(errno.ENOSPC, "Cannot grow device files")
        self._sync_if_through()

    def spans(self, offset: int, length: int) -> Iterator[Span]:
        if offset < 0:
            raise StorageError(self._path, "find data", _error(errno.EINVAL))
        end = min(offset + length, self.length())
        while offset < end:
            data = self._seek(offset, os.SEEK_DATA, end)
            if data > offset:
                yield Span(offset, data - offset, False)
            offset = end if data == end else self._seek(data, os.SEEK_HOLE, end)
            if offset > data:
                yield Span(data, offset - data, True)

    def _seek(self, offset: int, whence: int, end: int) -> int:
        """Where data or a hole begins, from `offset` on; at most `end`. All is data where nobody can tell."""
        try:
            return min(os.lseek(self._fd, offset, whence), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only hole up to the end of the file
                return end
            if error.errno in space.UNSUPPORTED:
                return offset if whence == os.SEEK_DATA else end
            raise StorageError(self._path, "find data", error) from None

    def sync(self) -> None:
        self._sync(os.fdatasync)

    def sync_all(self) -> None:
        self._sync(os.fsync)

    def _sync_if_through(self) -> None:
        if self._through:  # O_DSYNC speaks of writes only, not of fallocate and ftruncate
            self._sync(os.fdatasync)

    def _sync(self, call: Callable[[int], None]) -> None:
        self._refuse_after_failed_sync()
        if self._unsafe:
            return
        try:
            call(self._fd)
        except OSError as error:
            self._sync_error = error
            raise SyncFailed(self._path, "sync", error) from None

    def start_writeback(self, offset: int, length: int) -> None:
        if self._unsafe or self._through or self._buffered is not None:
            return
        try:
            # Starts writing dirty pages without waiting for them, and drops clean ones
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)
        except (OSError, OverflowError):
            pass

    def stat(self) -> FileStat:
        with _reported(self._path, "stat"):
            return _file_stat(os.fstat(self._fd))

    def get_attribute(self, name: str) -> bytes | None:
        try:
            return os.getxattr(self._fd, name)
        except OSError:
            return None

    def set_attribute(self, name: str, value: bytes) -> bool:
        try:
            os.setxattr(self._fd, name, value)
        except OSError:
            return False
        return True

    def remove_attribute(self, name: str) -> None:
        try:
            os.removexattr(self._fd, name)
        except OSError:
            pass

    def close(self) -> None:
        """Also drops the locks. A second call does nothing."""
        fds = [fd for fd in (self._buffered, self._fd) if fd is not None and fd >= 0]
        self._fd = -1  # whoever still uses the file gets an error, not the next file with this number
        self._io = BufferedIO(-1)
        self._locks = locks.ImageLocks(-1, self._path)
        self._space = space.Space(-1, is_device=self._is_device)
        self._buffered = None
        with _reported(self._path, "close"):
            _close(fds)


def _close(fds: list[int]) -> None:
    """Closes all of them, whatever happens to the first."""
    while fds:
        try:
            os.close(fds.pop())
        except OSError:
            _close(fds)
            raise


class LocalFileSystem:
    """The files of this machine. `StorageError.action` is "open" or "create" where QEMU would say
    `Could not open 'PATH': …` or `Could not create 'PATH': …`."""

    def open(self, path: str, *, write: bool = False, cache: str = "writeback", locking: bool = False,
             force_share: bool = False) -> LocalFile:
        """With `locking` as the writer of an image, or as a reader who minds no writers, which `locks.lock` changes
        once the format is known (but for `force_share`). `UsageError` (QEMU's words) if there is neither a regular file
        nor a block device."""
        file = self._open(path, os.O_RDWR if write else os.O_RDONLY, "open", cache=cache)
        if locking:
            self._lock(file, locks.WRITER if write and not force_share else locks.RAW_READER)
            file.locking = not force_share
        return file

    def create(self, path: str, *, mode: int = 0o644, exclusive: bool = False, truncate: bool = True,
               cache: str = "writeback", locking: bool = False) -> LocalFile:
        flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if exclusive else 0)
        file = self._open(path, flags, "create", mode=mode, cache=cache)
        if locking:
            self._lock(file, locks.WRITER)
            file.locking = True
        if truncate and file.length():  # only now that nobody else can be using it
            try:
                file.truncate(0)
            except StorageError:
                file.close()
                raise
        return file

    @staticmethod
    def _lock(file: LocalFile, claim: locks.Claim) -> None:
        try:
            file.lock(claim)
        except BaseException:
            file.close()
            raise

    def _open(self, path: str, flags: int, action: str, *, cache: str, mode: int = 0) -> LocalFile:
        if cache not in CACHE_MODES:
            raise UsageError(f"Invalid cache option: {cache}")
        if cache in ("writethrough", "directsync"):
            flags |= os.O_DSYNC
        fds: list[int] = []
        try:
            with _reported(path, action):
                # O_NONBLOCK: opening a FIFO would wait for somebody at its other end
                fds.append(os.open(path, flags | os.O_NONBLOCK, mode))
                status = os.fstat(fds[0])
                os.set_blocking(fds[0], True)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
                if stat.S_ISCHR(status.st_mode) and action == "create":
                    raise UsageError("Cannot grow device files")
                if action == "create":  # a pipe, say
                    raise StorageError(path, "truncate", OSError(errno.EINVAL, os.strerror(errno.EINVAL)))
                raise UsageError(f"'file' driver requires '{path}' to be a regular file")
            if cache in ("none", "directsync"):
                fds.append(self._open_direct(path, flags & ~(os.O_CREAT | os.O_EXCL), status))
            return LocalFile(
                path, fds[-1], fds[0] if len(fds) > 1 else None,
                writable=bool(flags & os.O_RDWR), cache=cache, is_device=stat.S_ISBLK(status.st_mode),
            )
        except BaseException:
            _close(fds)
            raise

    @staticmethod
    def _open_direct(path: str, flags: int, status: os.stat_result) -> int:
        """A second descriptor, with O_DIRECT, for what was opened before."""
        try:
            fd = os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno == errno.EINVAL:
                error = OSError(errno.EINVAL, "filesystem does not support O_DIRECT")  # QEMU's words
            raise StorageError(path, "open", error) from None
        if not os.path.samestat(os.fstat(fd), status):
            os.close(fd)
            raise StorageError(path, "open", OSError(errno.ESTALE, "replaced while it was being opened"))
        return fd

    def stat(self, path: str) -> FileStat | None:
        with _reported(path, "stat"):
            try:
                return _file_stat(os.stat(path))
            except OSError as error:
                if error.errno in _NOTHING_THERE:
                    return None
                raise

    def unlink(self, path: str) -> None:
        with _reported(path, "remove"):
            os.unlink(path)

    def rename(self, source: str, target: str) -> None:
        with _reported(source, f"rename to {target}"):
            os.rename(source, target)

    def sync_directory(self, path: str) -> None:
        with _reported(path, "open"):
            fd = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the file system cannot sync a directory, nor needs to
                raise SyncFailed(path, "sync", error) from None
        finally:
            os.close(fd)

    def list_directory(self, path: str) -> list[str]:
        with _reported(path, "list"):
            return sorted(os.listdir(path or "."))

    def resolve(self, path: str) -> str:
        with _reported(path, "resolve"):
            return os.path.realpath(path)

    def give_to(self, path: str, uid: int, gid: int) -> None:
        for owner in ((uid, gid), (-1, gid)):  # who is not root may still be a member of the group
            try:
                # Never through a link: whoever owns the directory could point it at any file
                os.chown(path, *owner, follow_symlinks=False)
                return
            except (OSError, ValueError, OverflowError):
                pass
