"""Keeping writers away from an image that is half-changed (DESIGN, "Fence"; spec: "incompatible_features").

Version 3 has the corrupt bit: QEMU opens such an image for reading only. Version 2 has nothing of the kind.
"""

from __future__ import annotations

from collections.abc import Sequence

from safeimg.drivers.formats.api import Changes, Patch
from safeimg.drivers.formats.qcow2.header import CORRUPT, DIRTY, KNOWN_AUTOCLEAR
from safeimg.drivers.storage.api import File

_OFFSET = 72  # incompatible, compatible and autoclear features, 8 bytes each
_LENGTH = 24


def fence(file: File, version: int) -> Changes:
    """Sets the corrupt bit. Autoclear features that we do not know are cleared with it: no writer may keep
    them."""
    if version < 3:
        return Changes()
    before = file.pread(_OFFSET, _LENGTH)
    incompatible = int.from_bytes(before[:8], "big") | CORRUPT
    autoclear = int.from_bytes(before[16:], "big") & KNOWN_AUTOCLEAR
    after = incompatible.to_bytes(8, "big") + before[8:16] + autoclear.to_bytes(8, "big")
    return Changes() if after == before else Changes(link=(Patch(_OFFSET, before, after),))


def unfence(file: File, version: int) -> Sequence[Patch]:
    """Clears the corrupt bit, whatever else has become of the features meanwhile."""
    return _clear(file, version, CORRUPT)


def clear_marks(file: File, version: int) -> Sequence[Patch]:
    """Clears the corrupt and the dirty bit."""
    return _clear(file, version, CORRUPT | DIRTY)


def _clear(file: File, version: int, bits: int) -> Sequence[Patch]:
    if version < 3:
        return ()
    before = file.pread(_OFFSET, 8)
    after = (int.from_bytes(before, "big") & ~bits).to_bytes(8, "big")
    return () if after == before else (Patch(_OFFSET, before, after),)
