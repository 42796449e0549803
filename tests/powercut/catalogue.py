"""All scenarios: those that tests run, and with the undo of every operation those that the soak runs."""

from __future__ import annotations

from powercut.bare import BARE
from powercut.bitmaps import BITMAPS
from powercut.features import FEATURES
from powercut.journals import JOURNALS
from powercut.luks_disks import LUKS_DISKS
from powercut.outside import OUTSIDE
from powercut.repairs import REPAIRS
from powercut.resizes import REBASES, RESIZES
from powercut.scenarios import AMENDMENTS, CHANGES, COMMITS, CONVERSIONS, SNAPSHOTS
from powercut.undos import chosen, undo_of

OPERATIONS = [
    *COMMITS, *CONVERSIONS, *CHANGES, *AMENDMENTS, *SNAPSHOTS, *RESIZES, *REBASES, *BITMAPS, *REPAIRS, *OUTSIDE,
    *LUKS_DISKS, *FEATURES, *BARE, *JOURNALS,
]  # fmt: skip
SCENARIOS = [*OPERATIONS, *map(undo_of, chosen(OPERATIONS))]
_FINAL = [*OUTSIDE, *LUKS_DISKS]  # with changes of key slots among them, of which no material is kept
EVERYTHING = [
    *OPERATIONS,
    *(
        undo_of(each)
        for each in OPERATIONS
        if each.kept and not each.created and not each.bare and not (each in _FINAL and each.name.startswith("amend"))
    ),
]
