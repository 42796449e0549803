"""Making empty images as `qemu-img create` does, and unfinished ones that every other program refuses.

    | header | refcount table | refcount blocks | L1 table | L2 table, its data clusters | … | LUKS header |
                                                           `---- with preallocation only ----'

An unfinished image (DESIGN, "Fence") carries an incompatible feature bit whose name in the feature name table
says what it is. Finishing it is one write of sector 0, so what lies behind already looks as it will in the
end:

    unfinished   header | backing format | table of one name | end |  zeroes ¦ rest of the final table, name
    finished     header | backing format | table of all feature names        ¦ rest of the final table, name
                                                                        sector 1

Version 2 has no feature bits; there the version number itself is an impossible one until the end.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

from safeimg.drivers.errors import FormatError, UsageError
from safeimg.drivers.formats.api import Patch
from safeimg.drivers.formats.chain import local_path
from safeimg.drivers.formats.new_file import empty, fill_anew, new_file
from safeimg.drivers.formats.options import (
    bool_option,
    check_names,
    choice_option,
    number_option,
    size_option,
)
from safeimg.drivers.formats.qcow2.data_file import data_file_extension
from safeimg.drivers.formats.qcow2.driver import CREATE_OPTIONS
from safeimg.drivers.formats.qcow2.encryption import asked_encryption, new_encryption, refuse_two_methods
from safeimg.drivers.formats.qcow2.entries import COPIED, encode_table
from safeimg.drivers.formats.qcow2.extensions import (
    EXT_BACKING_FORMAT,
    EXT_FEATURE_NAMES,
    EncryptionHeader,
    Extension,
    FeatureName,
    feature_name_table,
)
from safeimg.drivers.formats.qcow2.header import (
    COMPRESSION_TYPE,
    EXTENDED_L2,
    EXTERNAL_DATA_FILE,
    FEATURE_TABLE_MIN_CLUSTER,
    LAZY_REFCOUNTS,
    MAX_BACKING_NAME,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    RAW_EXTERNAL_DATA,
    UNFINISHED,
    UNFINISHED_BIT,
    Header,
    backing_name_offset,
    parse_header,
    serialise,
)
from safeimg.drivers.formats.qcow2.l2 import EXTENDED_MIN_CLUSTER_BITS
from safeimg.drivers.formats.registry import names
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import File, FileSystem

SECTOR = 512
CHUNK = 1 << 20
MAX_SIZE = (1 << 63) - (1 << 30)  # bytes of any disk, to QEMU
DEFAULT_CLUSTER_SIZE = 65536

VERSIONS = {"1.1": 3, "v3": 3, "0.10": 2, "v2": 2}
_NEWER = "compatibility level 1.1 and above (use version=v3 or greater)"


class _Layout(NamedTuple):
    """Where everything goes, in clusters."""

    table_clusters: int
    blocks: int
    l1_clusters: int
    l2_tables: int  # 0 without preallocation
    data_clusters: int
    encryption_clusters: int  # of the LUKS header
    outside: bool  # data clusters lie in another file

    @property
    def l1_start(self) -> int:
        return 1 + self.table_clusters + self.blocks

    @property
    def mapped_start(self) -> int:
        """The first L2 table."""
        return self.l1_start + self.l1_clusters

    @property
    def encryption_start(self) -> int:
        return self.mapped_start + self.l2_tables + (0 if self.outside else self.data_clusters)

    @property
    def total(self) -> int:
        return self.encryption_start + self.encryption_clusters


def create(fs: FileSystem, path: str, size: int, options: Mapping[str, str], *, cache: str = "writeback",
           unfinished: str | None = None, secrets: Secrets = NO_SECRETS,
           ready: Callable[[], None] = lambda: None) -> None:
    """Writes an empty image at `path`, into the file that is there if there is one (its content is dropped).

    `size` is rounded up to whole sectors; the options `size` and `nocow` are for others to look at. Backing
    files are not opened. The first sector is written last, and not synced. Raises `UsageError` in qemu-img's words,
    `UnsupportedError` and `StorageError`. `secrets`: for encrypted images, whose key takes a while to make.
    `unfinished` is the command that is to fill the image; until `finish_patch` is applied, no other program takes it.
    """
    check_names(path, options, CREATE_OPTIONS)
    refuse_two_methods(path, options)
    size = -(-size // SECTOR) * SECTOR
    with ExitStack() as opened:
        file = opened.enter_context(new_file(fs, path, cache=cache))
        name = options.get("data_file")
        data = None if name is None else opened.enter_context(new_file(fs, local_path(name), cache=cache))
        # In QEMU's order: first, whether each value is one at all.
        choice_option(path, options, "compat", tuple(VERSIONS), "version")
        if options.get("backing_fmt", "raw") not in names():
            raise UsageError(f"{path}: Parameter 'backing-fmt' does not accept value '{options['backing_fmt']}'")
        encryption = asked_encryption(path, options)
        preallocation = choice_option(path, options, "preallocation", ("off", "metadata", "falloc", "full"))
        choice_option(path, options, "compression_type", ("zlib", "zstd"), "compression-type")
        header = _header(path, size, options, preallocation)
        _check_size(path, header)
        method, luks_header = new_encryption(encryption, secrets)
        # A raw data file is all allocated from the beginning.
        layout = _lay_out(path, header, preallocation != "off" or header.data_file_is_raw, len(luks_header))
        if luks_header:
            place = EncryptionHeader(layout.encryption_start << header.cluster_bits, len(luks_header))
            header = header._replace(extensions=_inserted(header.extensions, place.extension()))
        header = header._replace(
            crypt_method=method,
            refcount_table_offset=header.cluster_size,
            refcount_table_clusters=layout.table_clusters,
            l1_table_offset=layout.l1_start << header.cluster_bits if header.l1_size else 0,
        )
        first_cluster = _first_cluster(path, header, unfinished)
        ready()
        if data is not None:
            unit = header.l2.subcluster_size if layout.data_clusters else 1
            fill_anew(data, -(-header.size // unit) * unit, preallocation)
        empty(file)
        _write_refcounts(file, header, layout)
        _write_tables(file, header, layout)
        if data is None:
            _preallocate(file, header, layout, preallocation)
        if luks_header:
            length = layout.encryption_clusters << header.cluster_bits
            file.pwrite(layout.encryption_start << header.cluster_bits, luks_header.ljust(length, b"\0"))
        file.pwrite(SECTOR, first_cluster[SECTOR:])
        if unfinished is None:  # no header that a power cut leaves tells of what is not there
            file.sync()
            if data is not None:
                data.sync()
        file.pwrite(0, first_cluster[:SECTOR])


def finish_patch(file: File) -> Patch:
    """The write that makes an unfinished image a normal one: sector 0, whatever else has become of the
    header.

    Raises `FormatError` if the image is not an unfinished one, or its header cluster was changed behind
    sector 0."""
    header = parse_header(file, unfinished=True)
    if not header.incompatible_features & UNFINISHED:
        raise FormatError(file.path, "the image is not an unfinished one")
    before = file.pread(0, header.cluster_size)
    after = serialise(_finished(header))
    if before[SECTOR:] != after[SECTOR:]:
        problem = "the header of the unfinished image is not as safeimg left it"
        raise FormatError(file.path, problem, offset=SECTOR)
    return Patch(0, before[:SECTOR], after[:SECTOR])


def _header(path: str, size: int, options: Mapping[str, str], preallocation: str) -> Header:
    """The header that the options ask for, without table offsets. What is wrong is found in QEMU's order."""
    cluster_size = size_option(path, options, "cluster_size", DEFAULT_CLUSTER_SIZE)
    if not 512 <= cluster_size <= 2 << 20 or cluster_size & (cluster_size - 1):
        raise UsageError(f"{path}: Cluster size must be a power of two between 512 and 2048k")
    version = VERSIONS[choice_option(path, options, "compat", tuple(VERSIONS), "version")]
    zstd = choice_option(path, options, "compression_type", ("zlib", "zstd"), "compression-type") == "zstd"
    extended_l2 = bool_option(path, options, "extended_l2")
    if extended_l2 and version < 3:
        raise UsageError(f"{path}: Extended L2 entries are only supported with {_NEWER}")
    if extended_l2 and cluster_size < 1 << EXTENDED_MIN_CLUSTER_BITS:
        raise UsageError(f"{path}: Extended L2 entries are only supported with cluster sizes of at least "
                         f"{1 << EXTENDED_MIN_CLUSTER_BITS} bytes")
    if preallocation != "off" and "backing_file" in options and not extended_l2:
        raise UsageError(
            f"{path}: Backing file and preallocation can only be used at the same time if extended_l2 is on"
        )
    backing_file, extensions = _backing(path, options)
    lazy_refcounts = bool_option(path, options, "lazy_refcounts")
    if version < 3 and lazy_refcounts:
        raise UsageError(f"{path}: Lazy refcounts only supported with {_NEWER}")
    refcount_bits = number_option(path, options, "refcount_bits", 16)
    if not 1 <= refcount_bits <= 64 or refcount_bits & (refcount_bits - 1):
        raise UsageError(f"{path}: Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and refcount_bits != 16:
        raise UsageError(f"{path}: Different refcount widths than 16 bits require compatibility level 1.1 or "
                         "above (use version=v3 or greater)")
    outside = data_file_extension(path, options, version)
    data_file_raw = bool_option(path, options, "data_file_raw")
    if data_file_raw and backing_file is not None:
        raise UsageError(f"{path}: Backing file and data-file-raw cannot be used at the same time")
    if version < 3 and zstd:
        raise UsageError(f"{path}: Non-zlib compression type is only supported with {_NEWER}")
    cluster_bits = cluster_size.bit_length() - 1
    extensions += outside
    feature_names = _feature_names(cluster_size)
    if version == 3 and feature_names is not None:
        extensions += (feature_names,)
    header = Header(
        version=version, backing_file_offset=0, backing_file_size=0, cluster_bits=cluster_bits, size=size,
        crypt_method=0, l1_size=0, l1_table_offset=0, refcount_table_offset=0, refcount_table_clusters=0,
        nb_snapshots=0, snapshots_offset=0,
        incompatible_features=(COMPRESSION_TYPE if zstd else 0) | (EXTENDED_L2 if extended_l2 else 0)
        | (EXTERNAL_DATA_FILE if outside else 0),
        autoclear_features=RAW_EXTERNAL_DATA if data_file_raw else 0,
        compatible_features=LAZY_REFCOUNTS if lazy_refcounts else 0,
        refcount_order=refcount_bits.bit_length() - 1, compression_type=int(zstd), extensions=extensions,
        backing_file=backing_file,
    )
    return header._replace(l1_size=header.l1_needed)


def _check_size(path: str, header: Header) -> None:
    if header.size >> 63:
        raise UsageError(f"{path}: Could not resize image: Image size cannot be negative")
    if header.size > MAX_SIZE:
        raise UsageError(f"{path}: Could not resize image: offset({header.size}) exceeds maximum({MAX_SIZE})")
    if 8 * header.l1_needed > MAX_L1_BYTES:
        raise _too_large(path)


def _inserted(extensions: tuple[Extension, ...], new: Extension) -> tuple[Extension, ...]:
    """With the new one where QEMU has it: in front of the feature names."""
    at = next((at for at, old in enumerate(extensions) if old.type == EXT_FEATURE_NAMES), len(extensions))
    return (*extensions[:at], new, *extensions[at:])


def _backing(path: str, options: Mapping[str, str]) -> tuple[str | None, tuple[Extension, ...]]:
    backing_file = options.get("backing_file")
    backing_format = options.get("backing_fmt")
    if backing_file is None:
        if backing_format is not None:
            raise UsageError(f"{path}: Backing format cannot be used without backing file")
        return None, ()
    if not backing_file:
        raise UsageError(f"{path}: Expected backing file name, got empty string")
    if backing_format is None:
        return backing_file, ()
    return backing_file, (Extension(EXT_BACKING_FORMAT, backing_format.encode()),)


def _lay_out(path: str, header: Header, preallocate: bool, luks_bytes: int) -> _Layout:
    bits = header.cluster_bits
    data = -(-header.size >> bits) if preallocate else 0
    layout = _Layout(
        table_clusters=1, blocks=1, l1_clusters=-(-8 * header.l1_size >> bits), data_clusters=data,
        l2_tables=header.l1_size if preallocate else 0, encryption_clusters=-(-luks_bytes >> bits),
        outside=header.has_data_file,
    )
    while True:  # more blocks take more clusters, which may need more blocks
        blocks = -(-layout.total // header.refcount_block_entries)
        table_clusters = -(-8 * blocks >> bits)
        if table_clusters << bits > MAX_REFCOUNT_TABLE_BYTES:
            raise _too_large(path)
        if (blocks, table_clusters) == (layout.blocks, layout.table_clusters):
            return layout
        layout = layout._replace(blocks=blocks, table_clusters=table_clusters)


def _too_large(path: str) -> UsageError:
    return UsageError(
        f"{path}: The image size is too large for file format 'qcow2' (try using a larger cluster size)"
    )


def _first_cluster(path: str, header: Header, unfinished: str | None) -> bytes:
    """The header cluster; with `unfinished`, all but sector 0 is that of the finished image."""
    try:
        if unfinished is None:
            return serialise(header)
        marked = _unfinished(header, unfinished)
        return serialise(marked)[:SECTOR] + serialise(_finished(marked))[SECTOR:]
    except FormatError:
        name = header.backing_file or ""
        problem = "Invalid argument" if len(name) > MAX_BACKING_NAME else "No space left on device"
        raise UsageError(f"{path}: Could not assign backing file '{name}' with format "
                         f"'{header.backing_format or ''}': {problem}") from None


def _unfinished(header: Header, command: str) -> Header:
    """The header of the image while it is being made; the backing file's name lies where it will in the
    end."""
    marked = header._replace(incompatible_features=header.incompatible_features | UNFINISHED)
    if header.version == 2:
        return marked
    mark = feature_name_table((FeatureName(0, UNFINISHED_BIT, f"unfinished safeimg {command}"),))
    marked = marked.with_extension(mark, EXT_FEATURE_NAMES)
    offset = max(backing_name_offset(header), backing_name_offset(marked))
    return marked if header.backing_file is None else marked._replace(backing_file_offset=offset)


def _finished(header: Header) -> Header:
    """The inverse of `_unfinished`."""
    header = header._replace(incompatible_features=header.incompatible_features & ~UNFINISHED)
    if header.version == 2:
        return header
    return header.with_extension(_feature_names(header.cluster_size), EXT_FEATURE_NAMES)


def _feature_names(cluster_size: int) -> Extension | None:
    return feature_name_table() if cluster_size >= FEATURE_TABLE_MIN_CLUSTER else None


def _write_refcounts(file: File, header: Header, layout: _Layout) -> None:
    """Table and blocks: every cluster up to the end of the layout has one reference."""
    bits = header.cluster_bits
    first_block = (1 + layout.table_clusters) << bits
    table = encode_table(array("Q", range(first_block, first_block + (layout.blocks << bits), 1 << bits)))
    file.pwrite(header.refcount_table_offset, table.ljust(layout.table_clusters << bits, b"\0"))
    offset = first_block
    for chunk in _ones(layout.total, header.refcount_order, layout.blocks << bits):
        file.pwrite(offset, chunk)
        offset += len(chunk)


def _ones(count: int, order: int, length: int) -> Iterator[bytes]:
    """`count` refcounts of 1, then zeroes, `length` bytes in all. Entries narrower than a byte: lowest bits
    first."""
    if order >= 3:
        pattern = (1).to_bytes(1 << (order - 3), "big")
        full, rest = count * len(pattern), b""
    else:
        per_byte = 8 >> order
        byte = sum(1 << (index << order) for index in range(per_byte))
        pattern = bytes((byte,))
        full, left = divmod(count, per_byte)
        rest = bytes((byte & ((1 << (left << order)) - 1),)) if left else b""
    repeated = pattern * (CHUNK // len(pattern))
    written = 0
    while written < length:
        ones = min(CHUNK, full - written) if written < full else 0
        chunk = repeated[:ones]
        if ones < CHUNK and written + ones == full:
            chunk += rest
        chunk = chunk.ljust(min(CHUNK, length - written), b"\0")
        yield chunk
        written += len(chunk)


def _write_tables(file: File, header: Header, layout: _Layout) -> None:
    """The L1 table, and with preallocation the L2 tables, each in front of the clusters that it maps."""
    bits = header.cluster_bits
    entries = header.l2_entries
    stride = 1 if layout.outside else entries + 1
    l2_tables = range(layout.mapped_start, layout.mapped_start + layout.l2_tables * stride, stride)
    l1_table = array("Q", [COPIED | cluster << bits for cluster in l2_tables])
    if l1_table:
        file.pwrite(header.l1_table_offset, encode_table(l1_table))
    elif file.stat().is_device:
        # A device keeps what was on it; a file was truncated and reads as zeroes.
        file.write_zeroes(header.l1_table_offset, layout.l1_clusters << bits, unmap=False)
    for number, cluster in enumerate(l2_tables):
        mapped = min(entries, layout.data_clusters - number * entries)
        first = COPIED | (number * entries if layout.outside else cluster + 1) << bits
        # With extended entries, nothing of the clusters that have their places is allocated yet.
        table = header.l2.encode(range(first, first + (mapped << bits), 1 << bits))
        file.pwrite(cluster << bits, table.ljust(1 << bits, b"\0"))
    if not file.stat().is_device:
        end = layout.encryption_start << bits if l2_tables else (layout.l1_start << bits) + 8 * header.l1_size
        if file.length() < end:
            file.truncate(end)


def _preallocate(file: File, header: Header, layout: _Layout, mode: str) -> None:
    """Gives the data clusters their space (`falloc`), or fills them with zeroes (`full`)."""
    if mode not in ("falloc", "full"):
        return
    bits = header.cluster_bits
    zeroes = bytes(CHUNK)
    for number in range(layout.l2_tables):
        start = layout.mapped_start + number * (header.l2_entries + 1) + 1
        clusters = min(header.l2_entries, layout.data_clusters - number * header.l2_entries)
        offset, end = start << bits, (start + clusters) << bits
        if mode == "falloc":
            file.preallocate(offset, end - offset, keep_size=False)
            continue
        while offset < end:
            length = min(CHUNK, end - offset)
            file.pwrite(offset, zeroes[:length])
            offset += length
