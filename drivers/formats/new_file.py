"""The file of an image that is to be made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safeimg.drivers.errors import DriverError
from safeimg.drivers.storage.api import File, FileSystem, look

SECTOR = 512


@contextmanager
def new_file(fs: FileSystem, path: str, *, cache: str, doomed: bool = False) -> Iterator[File]:
    """The file at `path`, open and locked, with what it holds: made if it is not there, and gone again if the body
    fails; with `doomed` gone then even if it was there, unless it is a device.

    As in QEMU, it comes before everything else: where it cannot be made, that is what is wrong, whatever is asked for
    besides. Raises `StorageError`, `LockError`."""
    is_new = look(fs, path) is None
    file = fs.create(path, truncate=False, cache=cache, locking=True)
    try:
        yield file
    except DriverError:
        if is_new or (doomed and not file.stat().is_device):
            fs.unlink(path)
        raise
    finally:
        file.close()


def fill_anew(file: File, size: int, preallocation: str) -> None:
    """Gives a file `size` bytes and nothing but zeroes, whatever it held: with preallocation `falloc` their space is
    reserved, with `full` they are written."""
    empty(file)
    file.truncate(size)
    if preallocation == "falloc":
        file.preallocate(0, size, keep_size=False)
    elif preallocation == "full":
        file.write_zeroes(0, size, unmap=False)


def empty(file: File) -> None:
    """Drops what a file holds; an old image's header first, and durably, which must not tell of what is written now."""
    length = file.length()
    if length:
        file.pwrite(0, bytes(min(length, SECTOR)))
        file.sync()
        file.truncate(0)
