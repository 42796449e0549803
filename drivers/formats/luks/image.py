"""An open LUKS image: header, key material and, from a place that the header names, the encrypted guest disk.

The virtual size is what the file has behind the header, in whole sectors, as in QEMU."""

from __future__ import annotations

from collections.abc import Iterator

from safeimg.drivers.crypto.luks import HEADER_BYTES, Luks, parse, sector_cipher, unlock
from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Cipher, Extent, Kind
from safeimg.drivers.formats.encryption import SECTOR, GuestSectors, Locked
from safeimg.drivers.formats.plain import PlainImage
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import File

KEY_SECRET = "key-secret"


class LuksImage(PlainImage):
    """Implements `formats.api.Image`."""

    format = "luks"

    def __init__(self, file: File, header: Luks) -> None:
        super().__init__(file)
        self._header = header
        self._cipher: Cipher = Locked(KEY_SECRET)
        self._secrets = NO_SECRETS

    @property
    def header(self) -> Luks:
        """As it was when the image was opened."""
        return self._header

    @property
    def cipher(self) -> Cipher:
        return self._cipher

    @property
    def secrets(self) -> Secrets:
        """Those that the image was opened with: for new passwords."""
        return self._secrets

    @property
    def size(self) -> int:
        return max(-(-self._file.length() // SECTOR) * SECTOR - self._header.payload_offset, 0)

    @property
    def cluster_size(self) -> int:
        return 1

    @property
    def data_may_be_holes(self) -> bool:
        """Holes decrypt to something, too."""
        return False

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        end = min(start + length, self.size)
        if start < end:
            yield Extent(start, end - start, Kind.DATA, self._header.payload_offset + start)

    def read(self, offset: int, length: int) -> bytes:
        """A part of header and key material; zeroes behind the end of the file, as in QEMU."""
        return self._file.pread(offset, length).ljust(length, b"\0")

    def unlock(self, secrets: Secrets, name: str | None) -> None:
        """Keeps the secrets, and makes guest data readable with the one called `name`, if any. `UsageError` for a
        wrong password."""
        self._secrets = secrets
        if name is not None:
            key = unlock(self._header, self.read, secrets.password(name), self._file.path)
            self._cipher = GuestSectors(sector_cipher(self._header, key), key)

    def inherit(self, other: LuksImage) -> LuksImage:
        """Takes over what `other`, the same image opened before, was given."""
        self._cipher, self._secrets = other._cipher, other._secrets
        return self


def open_image(file: File, *, repair: bool = False) -> LuksImage:
    """Parses the header; `repair` opens an unfinished image too. `FormatError` in QEMU's words."""
    return LuksImage(file, parse(file.pread(0, HEADER_BYTES), file.path, unfinished=repair))


def check_length(image: LuksImage) -> None:
    """`FormatError` if the file ends before the guest disk would begin."""
    if -(-image.file.length() // SECTOR) * SECTOR < image.header.payload_offset:
        raise FormatError(image.file.path, "Could not refresh total sector count: Input/output error")
