"""Whether an image looks as if its metadata was preallocated, so that data clusters may be holes of its
file."""

from __future__ import annotations

from safeimg.drivers.formats.qcow2.entries import REFCOUNT_BLOCK_MASK
from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.formats.qcow2.refcounts import RefcountLayout

_AT_ONCE = 64 << 10  # bytes of a refcount block that are decoded at a time


def looks_preallocated(image: Qcow2Image) -> bool:
    """True if clearly more clusters are in use than the file occupies space for: a tenth more, at least two.

    qemu-img looks for holes below data clusters only then (`map` shows them as zero); observed from its
    output. Damaged refcounts count as none: this is a guess, and `check` is where they are reported."""
    header, file = image.header, image.file
    real = file.stat().allocated // header.cluster_size
    threshold = max(real * 10 // 9, real + 2)
    layout = RefcountLayout(header.cluster_size.bit_length() - 1, header.refcount_bits.bit_length() - 1)
    left = -(-file.length() // header.cluster_size)
    used = 0
    for index in range(min(header.refcount_table_entries, -(-left // layout.block_entries))):
        entry = int.from_bytes(file.pread(header.refcount_table_offset + 8 * index, 8), "big")
        block, here = entry & REFCOUNT_BLOCK_MASK, min(left, layout.block_entries)
        left -= here
        if not block or block % header.cluster_size:
            continue
        data = file.pread(block, layout.span(0, here)[1])
        for at in range(0, len(data), _AT_ONCE):
            part = data[at : at + _AT_ONCE]
            if part.strip(b"\0"):
                used += sum(map(bool, layout.decode(part, 0, (len(part) << 3) >> layout.refcount_order)))
            if used >= threshold:
                return True
    return used >= threshold
