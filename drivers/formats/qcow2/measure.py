"""How large a qcow2 file will be: its metadata, and the clusters that data is copied into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from safeimg.drivers.errors import SecretMissing, UsageError
from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.encryption import named
from safeimg.drivers.formats.features import Measured
from safeimg.drivers.formats.options import bool_option, number_option, size_option
from safeimg.drivers.formats.qcow2.bitmaps import Bitmap, table_entries
from safeimg.drivers.formats.qcow2.create import DEFAULT_CLUSTER_SIZE
from safeimg.drivers.formats.qcow2.encryption import KEY_SECRET, PREFIX
from safeimg.drivers.formats.qcow2.header import MAX_L1_BYTES
from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.l2 import EXTENDED_MIN_CLUSTER_BITS
from safeimg.drivers.secrets import Secrets

SECTOR = 512
_PREALLOCATIONS = ("off", "metadata", "falloc", "full")
_MIN_EXTENDED_CLUSTER = 1 << EXTENDED_MIN_CLUSTER_BITS
_DIRECTORY_ENTRY = 24  # bytes of a bitmap's entry in the directory, without its name


class Qcow2Measuring:
    """Implements `features.Measuring`."""

    def measure(
        self,
        size: int,
        options: Mapping[str, str],
        data: Iterable[tuple[int, int]] | None,
        source: Image | None,
        secrets: Secrets,
    ) -> Measured:
        cluster = size_option("", options, "cluster_size", DEFAULT_CLUSTER_SIZE)
        if not 512 <= cluster <= 2 << 20 or cluster & (cluster - 1):
            raise UsageError("Cluster size must be a power of two between 512 and 2048k")
        is_extended = bool_option("", options, "extended_l2")
        if is_extended and cluster < _MIN_EXTENDED_CLUSTER:
            raise UsageError(
                f"Extended L2 entries are only supported with cluster sizes of at least {_MIN_EXTENDED_CLUSTER} bytes"
            )
        version = {"0.10": 2, "1.1": 3}.get(options.get("compat", "1.1"))  # as in qemu-img, no v2 and v3
        if version is None:
            raise UsageError(f"Invalid compatibility level: '{options['compat']}'")
        refcount_bits = _refcount_bits(options, version)
        preallocation = options.get("preallocation", "off")
        if preallocation not in _PREALLOCATIONS:
            raise UsageError(f"invalid parameter value: {preallocation}")
        disk = -(-size // SECTOR) * SECTOR
        luks = _rounded(_luks_bytes(options, secrets), cluster)
        clusters = -(-disk // cluster)
        metadata = _metadata(clusters, cluster, refcount_bits, 16 if is_extended else 8)
        whole = metadata + luks + clusters * cluster
        if preallocation in ("falloc", "full") or (data is not None and "backing_file" in options):
            required = whole
        else:
            required = metadata + luks + _clusters_of(data or (), cluster) * cluster
        return Measured(required, whole, _bitmap_bytes(source, cluster) if version > 2 else None)


def _rounded(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def _refcount_bits(options: Mapping[str, str], version: int) -> int:
    bits = number_option("", options, "refcount_bits", 16)
    if not 1 <= bits <= 64 or bits & (bits - 1):
        raise UsageError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and bits != 16:
        raise UsageError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use compat=1.1 or "
            "greater)"
        )
    return bits


def _luks_bytes(options: Mapping[str, str], secrets: Secrets) -> int:
    """Length of the encryption header; 0 without one."""
    if options.get("encrypt.format") != "luks":
        return 0
    from safeimg.drivers.crypto import luks

    wanted = luks.choice(named(options, PREFIX))
    if KEY_SECRET not in options:
        raise SecretMissing(KEY_SECRET)
    secrets.password(options[KEY_SECRET])
    return luks.header_bytes(wanted)


def _metadata(clusters: int, cluster: int, refcount_bits: int, l2_entry: int) -> int:
    """Bytes of header, tables and refcounts of an image all of whose clusters are allocated."""
    l2_tables = -(-clusters * l2_entry // cluster)
    l1_bytes = _rounded(8 * l2_tables, cluster)
    if l1_bytes > MAX_L1_BYTES:
        raise UsageError("The image size is too large (try using a larger cluster size)")
    fixed = 1 + l2_tables + l1_bytes // cluster
    per_block = cluster * 8 // refcount_bits
    blocks = tables = 0
    while True:  # they count themselves
        needed = -(-(clusters + fixed + blocks + tables) // per_block)
        needed_tables = -(-8 * needed // cluster)
        if (needed, needed_tables) == (blocks, tables):
            return (fixed + blocks + tables) * cluster
        blocks, tables = needed, needed_tables


def _clusters_of(ranges: Iterable[tuple[int, int]], cluster: int) -> int:
    """How many clusters the ranges (start, length), which are in order, lie in."""
    count, behind = 0, 0  # the first cluster that was not counted
    for start, length in ranges:
        first, last = max(start // cluster, behind), -(-(start + length) // cluster)
        if last > first:
            count += last - first
            behind = last
    return count


def _bitmap_bytes(source: Image | None, cluster: int) -> int | None:
    """What copies of the source's persistent bitmaps take; None if it is of a kind that has none."""
    if not isinstance(source, Qcow2Image) or source.header.version < 3:
        return None
    bitmaps: tuple[Bitmap, ...] = source.bitmaps
    if not bitmaps:
        return 0
    bits = cluster.bit_length() - 1
    tables = [table_entries(source.size, bitmap.granularity_bits, bits) for bitmap in bitmaps]
    content = sum(entries * cluster + _rounded(8 * entries, cluster) for entries in tables)
    names = sum(_rounded(_DIRECTORY_ENTRY + len(bitmap.name.encode()), 8) for bitmap in bitmaps)
    return content + _rounded(names, cluster)
