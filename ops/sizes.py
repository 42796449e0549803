"""Sizes as qemu-img reads and prints them."""

from __future__ import annotations

import re
from collections.abc import Callable

_SUFFIXES = "bkmgtpe"
_DECIMAL = re.compile(r"[ \t\n\v\f\r]*\+?([0-9]+)(\.[0-9]*)?([bkmgtpe])?", re.IGNORECASE | re.ASCII)
_HEXADECIMAL = re.compile(r"[ \t\n\v\f\r]*\+?0[xX]([0-9a-fA-F]+)([kmgtp])?", re.ASCII | re.IGNORECASE)
_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def parse_size(text: str, warn: Callable[[str], None] | None = None) -> int | None:
    """Bytes from a number with one of the suffixes b, k, M, G, T, P, E (powers of 1024); None if it is none.

    Fractions need a suffix that makes them worth something; hexadecimal numbers are whole (and `warn` is told
    when they have a suffix). Not limited: the caller knows what is too much."""
    if (match := _HEXADECIMAL.match(text)) is not None:
        digits, suffix = match.groups()
        if suffix and warn is not None:
            warn(f"Using a multiplier suffix on hex numbers is deprecated: {text}")
        if match.end() < len(text):
            return None
        return int(digits, 16) << 10 * _SUFFIXES.index((suffix or "b").lower())
    if (match := _DECIMAL.fullmatch(text)) is None:
        return None
    whole, fraction, suffix = match.groups()
    if len(whole) > 40:  # more than any size; keeps the conversion cheap
        whole = "9" * 40
    shift = 10 * _SUFFIXES.index((suffix or "b").lower())
    part = float("0" + fraction + "0") % 1.0 if fraction else 0.0
    if part and not shift:
        return None
    return (int(whole) << shift) + int(part * (1 << shift))


def human_size(size: int) -> str:
    """Three significant digits and a binary unit, as in qemu-img's "virtual size"."""
    unit = 0
    while unit < len(_UNITS) - 1 and size >= 1000 << 10 * unit:
        unit += 1
    return f"{size / (1 << 10 * unit):.3g} {_UNITS[unit]}B"
