"""The reporting check, with the messages and counters of `qemu-img check`. Loaded only for it: it needs numpy."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from safeimg.drivers.formats.api import CheckResult
from safeimg.drivers.formats.vdi.header import DISCARDED
from safeimg.drivers.formats.vdi.image import VdiImage, read_map

MAX_MESSAGES = 10_000  # kept; all are counted


def check(image: VdiImage) -> CheckResult:
    """Entries that lead nowhere or to one block, and the header's count. Raises `FormatError` if the map is cut."""
    header = image.header
    seen = np.zeros(header.blocks, np.bool_)
    messages: list[str] = []
    corruptions = allocated = 0
    for first, piece in read_map(image.file, header, 0, header.blocks):
        entries = np.frombuffer(piece, np.uint32)
        present = entries[entries < DISCARDED]
        valid = present[present < header.blocks]
        unique = np.unique(valid)
        wrong = len(present) - len(unique) + int(np.count_nonzero(seen[unique]))
        if wrong:
            found = _describe(first, piece, header.blocks, seen)
            messages += islice(found, MAX_MESSAGES - len(messages))
        corruptions += wrong
        allocated += len(valid)
        seen[unique] = True
    if allocated != header.allocated:
        corruptions += 1
        messages.append(f"ERROR: allocated blocks mismatch, is {allocated}, should be {header.allocated}")
    return CheckResult(corruptions=corruptions, messages=tuple(messages))


def _describe(first: int, entries: array[int], blocks: int, seen: NDArray[np.bool_]) -> Iterator[str]:
    """What is wrong with a piece of the map. `seen`: the blocks that pieces before it refer to."""
    here: set[int] = set()
    for block, entry in enumerate(entries, first):
        if entry >= DISCARDED:
            continue
        if entry >= blocks:
            yield f"ERROR: block index {block} too large, is {entry}"
        elif entry in here or seen[entry]:
            yield f"ERROR: block index {entry} also used by {entry}"
        here.add(entry)
