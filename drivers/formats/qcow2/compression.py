"""Compresses and inflates single clusters: raw deflate (zlib), or zstd frames.

All functions may be called from several threads at once. The libraries are imported when first needed.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from safeimg.drivers.formats.qcow2.header import ZLIB
from safeimg.drivers.storage.api import Buffer

if TYPE_CHECKING:
    import zstandard

ZLIB_LEVEL = 2  # of ISA-L's 0 to 3: as fast as 1, a little smaller
ZSTD_LEVEL = 3

# Bytes of deflate's windows. Those of 32 KiB take a tenth less space, and QEMU reads them, since it inflates a cluster
# in one piece; but readers that do so bit by bit, as Python's `decompressobj(-12)` does, know those of QEMU only.
WINDOW = 4 << 10
LARGE_WINDOW = 32 << 10
_READ_BITS = 15  # other programs write any window
# zstd frames of clusters never need more (a cluster has at most 2 MiB); a hostile frame may ask for 2 GiB.
_ZSTD_MAX_WINDOW = 8 << 20

_local = threading.local()


class InflateError(Exception):
    """The compressed bytes are damaged, or hold less than a cluster."""


def compress(kind: int, data: Buffer, level: int | None = None, window: int = WINDOW) -> bytes | None:
    """A cluster's data compressed, or None if that saves nothing. `kind`: the header's compression_type. `window`:
    bytes that deflate may reach back, a power of two."""
    if kind == ZLIB:
        from isal import isal_zlib

        bits = window.bit_length() - 1
        out: bytes = isal_zlib.compress(data, ZLIB_LEVEL if level is None else level, -bits)
    else:
        out = _zstd_compressor(ZSTD_LEVEL if level is None else level).compress(data)
    return out if len(out) < len(data) else None


def inflate(kind: int, stored: Buffer, cluster_size: int) -> bytes:
    """The cluster (`cluster_size` bytes) at the start of `stored`; what follows it there is ignored.

    Never produces more than a cluster. Raises `InflateError`."""
    if kind == ZLIB:
        from isal import igzip_lib

        failure: type[Exception] = igzip_lib.error  # type: ignore[assignment]  # the stub calls it an instance
        try:
            decompressor = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE, _READ_BITS)
            out: bytes = decompressor.decompress(stored, cluster_size)
        except failure as error:
            raise InflateError(str(error)) from None
    else:
        import zstandard

        try:
            with _zstd_decompressor().stream_reader(stored, read_across_frames=True) as reader:
                out = reader.read(cluster_size)
        except zstandard.ZstdError as error:
            raise InflateError(str(error)) from None
    if len(out) < cluster_size:
        raise InflateError(f"it holds {len(out)} bytes instead of {cluster_size}")
    return out


def _zstd_compressor(level: int) -> zstandard.ZstdCompressor:
    compressors: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in compressors:
        import zstandard

        compressors[level] = zstandard.ZstdCompressor(level)
    return compressors[level]


def _zstd_decompressor() -> zstandard.ZstdDecompressor:
    decompressor: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if decompressor is None:
        import zstandard

        decompressor = _local.decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW)
    return decompressor
