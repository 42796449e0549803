"""The list of cases: which of QEMU's iotests are run, and for which image formats."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

LIST = Path(__file__).with_name("iotests.txt")
_CASE = re.compile(r"\d{3}|[a-z][a-z0-9-]*")


def read(path: Path = LIST) -> dict[str, tuple[str, ...]]:
    """The cases of each format, in the order of the list. `ValueError` for a line that is not `FORMAT CASE…`."""
    listing: dict[str, tuple[str, ...]] = {}
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, *cases = line.split()
        if not cases or name in listing or not all(_CASE.fullmatch(case) for case in cases):
            raise ValueError(f"{path}: not a format, new, with its cases: {line}")
        listing[name] = tuple(cases)
    return listing


def every_case(listing: Mapping[str, tuple[str, ...]]) -> frozenset[str]:
    """All cases listed, whatever the format."""
    return frozenset(case for cases in listing.values() for case in cases)
