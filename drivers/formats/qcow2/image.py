"""An open qcow2 image: one layer, read through its active L1 table or an internal snapshot's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from copy import copy
from functools import cached_property
from itertools import pairwise

from safeimg.drivers.errors import FormatError, NotClosed, SnapshotDamaged, UnsupportedError
from safeimg.drivers.formats.api import Cipher, Extent
from safeimg.drivers.formats.encryption import Locked
from safeimg.drivers.formats.qcow2.bitmaps import Bitmap, read_bitmaps
from safeimg.drivers.formats.qcow2.compression import InflateError, inflate
from safeimg.drivers.formats.qcow2.encryption import KEY_SECRET, read_luks, unlocked
from safeimg.drivers.formats.qcow2.header import LUKS, MAX_L1_BYTES, UNFINISHED, Header, parse_header
from safeimg.drivers.formats.qcow2.mapping import DEFAULT_CACHE_BYTES, Mapping
from safeimg.drivers.formats.qcow2.snapshots import Snapshot, read_snapshots
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import Buffer, File


class Qcow2Image:
    """Implements `formats.api.Image`."""

    def __init__(self, file: File, header: Header, *, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._file = file
        self._cache_bytes = cache_bytes
        self._cipher: Cipher | None = Locked(KEY_SECRET) if header.crypt_method else None
        self._secrets = NO_SECRETS
        self._data: File | None = None if header.has_data_file else file
        self._shown: Snapshot | None = None  # the internal snapshot whose content this is
        self._adopt(header)

    def _adopt(self, header: Header) -> None:
        self._header = header
        self._mapping = Mapping(
            self._file, header, l1_table_offset=header.l1_table_offset, l1_size=header.l1_size,
            size=self.size, cache_bytes=self._cache_bytes,
        )

    @property
    def file(self) -> File:
        return self._file

    @property
    def data(self) -> File:
        if self._data is None:
            raise UnsupportedError(f"{self._file.path}: its data file is not open")
        return self._data

    def attach(self, data: File) -> None:
        """Gives the image its external data file, to be closed with it."""
        self._data = data

    @property
    def cipher(self) -> Cipher | None:
        return self._cipher

    def unlock(self, password: bytes) -> None:
        """Makes the guest data of an encrypted image readable. `UsageError` for a wrong password."""
        self._cipher = unlocked(self._file, self._header, password)

    @property
    def secrets(self) -> Secrets:
        """Those that the image was opened with: for new passwords."""
        return self._secrets

    def unlock_with(self, secrets: Secrets, name: str | None) -> None:
        """Keeps the secrets, and unlocks the image with the one called `name`, if any."""
        self._secrets = secrets
        if name is not None:
            self.unlock(secrets.password(name))

    def inherit(self, other: Qcow2Image) -> Qcow2Image:
        """Takes over what `other`, the same image opened before, was given: its data file, its secret; and shows the
        same snapshot."""
        self._cipher, self._secrets = other._cipher, other._secrets
        if self._header.has_data_file:
            self._data = other._data
        return self if other._shown is None else self.at(other._shown)

    @property
    def format(self) -> str:
        return "qcow2"

    @property
    def header(self) -> Header:
        """The header as it was when the image was opened, or at the last `reload`."""
        return self._header

    @property
    def size(self) -> int:
        # As QEMU: whole sectors; what another program counts beyond them is not visible.
        return self._header.size & ~511

    @property
    def cluster_size(self) -> int:
        return self._header.cluster_size

    @property
    def data_may_be_holes(self) -> bool:
        from safeimg.drivers.formats.qcow2.preallocation import looks_preallocated

        return looks_preallocated(self)

    @property
    def backing_file(self) -> str | None:
        return self._header.backing_file

    @property
    def backing_format(self) -> str | None:
        return self._header.backing_format

    def extents(self, start: int, length: int) -> Iterator[Extent]:
        """See `formats.api.Image`. A compressed extent may begin or end inside its cluster, where the range
        does: `decompress` returns that part."""
        return self._mapping.extents(start, length)

    def decompress(self, extent: Extent, stored: Buffer) -> bytes:
        """The guest data of a compressed extent (`extent.length` bytes; all of its cluster, or a part)."""
        cluster_size = self._header.cluster_size
        try:
            data = inflate(self._header.compression_type, stored, cluster_size)
        except InflateError as error:
            problem = f"compressed cluster of guest offset {extent.start:#x} is damaged ({error})"
            raise FormatError(self._file.path, problem, offset=extent.offset) from None
        if extent.length == cluster_size:
            return data
        skip = extent.start % cluster_size
        return data[skip:skip + extent.length]

    @cached_property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The internal snapshots. Raises `FormatError`."""
        return read_snapshots(self._file, self._header)

    @cached_property
    def bitmaps(self) -> tuple[Bitmap, ...]:
        """The persistent bitmaps, if consistent. Raises `FormatError`."""
        return read_bitmaps(self._file, self._header)

    def at(self, snapshot: Snapshot) -> Qcow2Image:
        """The guest content of an internal snapshot, for reading. The virtual size is the present one, as QEMU has
        it. Raises `SnapshotDamaged` if the snapshot's L1 table cannot be right."""
        header, path = self._header, self._file.path
        if 8 * snapshot.l1_size > MAX_L1_BYTES:
            raise SnapshotDamaged(path, "Snapshot L1 table too large", errno=errno.EFBIG)
        end = snapshot.l1_table_offset + 8 * snapshot.l1_size
        if snapshot.l1_table_offset % header.cluster_size or end >= 1 << 63:
            raise SnapshotDamaged(path, "Snapshot L1 table offset invalid", errno=errno.EINVAL)
        image = copy(self)
        image._shown = snapshot
        image._adopt(header._replace(l1_table_offset=snapshot.l1_table_offset, l1_size=snapshot.l1_size))
        return image

    def forget(self) -> None:
        """Drops cached tables: the image's metadata was changed on disk, its header was not."""
        self._mapping.forget()

    def reload(self) -> None:
        """Reads the header again: it was changed on disk."""
        unfinished = bool(self._header.incompatible_features & UNFINISHED)
        self._adopt(parse_header(self._file, unfinished=unfinished))
        self.__dict__.pop("snapshots", None)
        self.__dict__.pop("bitmaps", None)

    def close(self) -> None:
        if self._data is not None and self._data is not self._file:
            self._data.close()
        self._file.close()


def open_image(file: File, *, write: bool = False, repair: bool = False,
               cache_bytes: int = DEFAULT_CACHE_BYTES) -> Qcow2Image:
    """Parses the header. `repair` takes images marked as corrupt, dirty, fenced or unfinished for writing.

    Raises `FormatError` and `UnsupportedError`. With `write`, also if the tables that writing relies on are
    not in the file or overlap.
    """
    header = parse_header(file, unfinished=repair, snapshots=not repair)
    if write and not repair:
        if header.is_corrupt:
            raise FormatError(file.path, "qcow2: Image is corrupt; cannot be opened read/write")
        if header.is_dirty:
            raise NotClosed(file.path)
        check_tables(file, header)
    if header.crypt_method == LUKS:
        read_luks(file, header)
    return Qcow2Image(file, header, cache_bytes=cache_bytes)


def check_tables(file: File, header: Header) -> None:
    """`FormatError` if header, refcount table, L1 table or snapshot table overlap, or leave the file; of a snapshot
    table, that part reads as zeroes."""
    length = file.length()
    tables = [
        ("header", 0, header.cluster_size),
        ("refcount table", header.refcount_table_offset, 8 * header.refcount_table_entries),
        ("L1 table", header.l1_table_offset, 8 * header.l1_size),
    ]
    if header.nb_snapshots:
        tables.append(("snapshot table", header.snapshots_offset, 40 * header.nb_snapshots))
    tables = sorted((table for table in tables if table[2]), key=lambda table: table[1])
    for name, offset, size in tables:
        if name not in ("header", "snapshot table") and offset + size > length:
            raise FormatError(file.path, f"{name} lies past the end of the file", offset=offset)
    for (first, first_offset, first_size), (second, second_offset, _) in pairwise(tables):
        if first_offset + first_size > second_offset:
            raise FormatError(file.path, f"{first} and {second} overlap", offset=second_offset)
