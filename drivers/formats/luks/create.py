"""Making empty images as `qemu-img create` does, and unfinished ones that every other program refuses.

A new guest disk is a hole of the file: noise, once it is decrypted. An unfinished image names an impossible hash until
the end, so that it is still told for a LUKS image (and not taken for a raw disk), and refused.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping

from safeimg.drivers.crypto import luks
from safeimg.drivers.crypto.sectors import SECTOR
from safeimg.drivers.errors import FormatError, SecretMissing, StorageError, UsageError
from safeimg.drivers.formats.api import Image, Patch
from safeimg.drivers.formats.features import Measured
from safeimg.drivers.formats.luks.driver import CREATE_OPTIONS
from safeimg.drivers.formats.luks.image import KEY_SECRET
from safeimg.drivers.formats.new_file import empty, new_file
from safeimg.drivers.formats.options import check_names, storage_preallocation
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import File, FileSystem


def create(fs: FileSystem, path: str, size: int, options: Mapping[str, str], secrets: Secrets, *,
           cache: str = "writeback", unfinished: bool = False, ready: Callable[[], None] = lambda: None) -> None:
    """Writes an empty image at `path`, into the file that is there if there is one (its content is dropped).

    As with qemu-img, a file that was there is gone after an error, but for values of options that make no sense; not
    the target of an operation, which may be pending on it. The first sector is written last, and not synced.
    `ready`: see `api.Driver.create`. Raises `UsageError` and `UnsupportedError` in qemu-img's words,
    `SecretMissing`, `StorageError`."""
    check_names(path, options, CREATE_OPTIONS)
    wanted = luks.choice(options)
    preallocation = storage_preallocation(path, options)
    with new_file(fs, path, cache=cache, doomed=not unfinished) as file:
        password = _password(options, secrets)
        header, head = luks.create(wanted, password, unfinished=unfinished)
        if header.payload_offset + size >> 63:
            raise _too_large()
        ready()
        empty(file)
        _fill(file, size, header, head, preallocation, unfinished=unfinished)


def _password(options: Mapping[str, str], secrets: Secrets) -> bytes:
    if KEY_SECRET not in options:
        raise SecretMissing(KEY_SECRET)
    return secrets.password(options[KEY_SECRET])


def _fill(file: File, size: int, header: luks.Luks, head: bytes, preallocation: str, *, unfinished: bool) -> None:
    start = header.payload_offset
    material = header.slots[0].offset + header.material_bytes
    if not file.stat().is_device:
        try:
            file.truncate(start + size)
        except StorageError as error:
            if error.errno == errno.EFBIG:
                raise _too_large() from error
            raise
        if preallocation == "falloc":
            file.preallocate(0, start + size, keep_size=False)
        elif preallocation == "full":
            file.write_zeroes(material, start + size - material, unmap=False)
    file.pwrite(SECTOR, head[SECTOR : material])
    if not unfinished:  # no header that a power cut leaves tells of what is not there
        file.sync()
    file.pwrite(0, head[: SECTOR])


def _too_large() -> UsageError:
    return UsageError("The requested file size is too large")


def finish_patch(file: File) -> Patch:
    """The write that makes an unfinished image a normal one. `FormatError` if the image is not an unfinished one."""
    before = file.pread(luks.HASH_OFFSET, luks.HASH_BYTES)
    if not before.startswith(luks.UNFINISHED.encode()):
        raise FormatError(file.path, "the image is not an unfinished one")
    after = before.removeprefix(luks.UNFINISHED.encode()).ljust(luks.HASH_BYTES, b"\0")
    return Patch(luks.HASH_OFFSET, before, after)


class LuksMeasuring:
    """Implements `features.Measuring`."""

    def measure(
        self,
        size: int,
        options: Mapping[str, str],
        data: Iterable[tuple[int, int]] | None,
        source: Image | None,
        secrets: Secrets,
    ) -> Measured:
        wanted = luks.choice(options)
        _password(options, secrets)
        whole = luks.header_bytes(wanted) + size
        return Measured(whole, whole)
