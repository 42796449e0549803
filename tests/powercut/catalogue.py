"""All scenarios."""

from __future__ import annotations

from powercut.bitmaps import BITMAPS
from powercut.luks_disks import LUKS_DISKS
from powercut.outside import OUTSIDE
from powercut.repairs import REPAIRS
from powercut.resizes import REBASES, RESIZES
from powercut.scenarios import AMENDMENTS, CHANGES, COMMITS, CONVERSIONS, SNAPSHOTS

SCENARIOS = [
    *COMMITS, *CONVERSIONS, *CHANGES, *AMENDMENTS, *SNAPSHOTS, *RESIZES, *REBASES, *BITMAPS, *REPAIRS, *OUTSIDE,
    *LUKS_DISKS,
]  # fmt: skip
