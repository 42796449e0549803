"""What `info` says about a qcow2 image under "Format specific information", in qemu-img's order."""

from __future__ import annotations

from collections.abc import Mapping

from safeimg.drivers.formats.qcow2.encryption import read_luks
from safeimg.drivers.formats.qcow2.header import AES, COMPRESSION_NAMES
from safeimg.drivers.formats.qcow2.image import Qcow2Image


def specific_info(image: Qcow2Image) -> Mapping[str, object]:
    """The members of qemu-img's JSON `data`. Raises `FormatError` if the bitmap directory is damaged."""
    header = image.header
    info: dict[str, object] = {
        "compat": "0.10" if header.version == 2 else "1.1",
        "compression-type": COMPRESSION_NAMES[header.compression_type],
    }
    if header.version == 2:
        info["refcount-bits"] = header.refcount_bits
        if header.crypt_method:
            info["encrypt"] = _encrypt(image)
        return info
    info["lazy-refcounts"] = header.lazy_refcounts
    if image.bitmaps:
        info["bitmaps"] = [
            {
                "flags": [
                    name for name, is_set in (("in-use", bitmap.in_use), ("auto", bitmap.enabled)) if is_set
                ],
                "name": bitmap.name,
                "granularity": bitmap.granularity,
            }
            for bitmap in image.bitmaps
        ]
    info["refcount-bits"] = header.refcount_bits
    if header.crypt_method:
        info["encrypt"] = _encrypt(image)
    if header.data_file is not None:
        info["data-file"] = header.data_file
    if header.has_data_file:
        info["data-file-raw"] = header.data_file_is_raw
    info["corrupt"] = header.is_corrupt
    info["extended-l2"] = header.extended_l2
    return info


def _encrypt(image: Qcow2Image) -> Mapping[str, object]:
    if image.header.crypt_method == AES:
        return {"format": "aes"}
    from safeimg.drivers.crypto.luks import describe

    return describe(read_luks(image.file, image.header), format="luks")
