"""What some formats can do and others cannot. A driver without the feature has None in its place.

Each plans with the image's `Planner` and answers changes to be made durable one after the other, every one a step of
its own. The last one is the switch that makes the difference; planning anew after any of those before it leads to the
same end, so that an interrupted command can start over. What loses its last reference is only unlinked: the caller's
`Planner.release` frees it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from safeimg.drivers.formats.api import Changes, Image, Planner


class Rebasing(Protocol):
    """Formats with backing images."""

    def set_backing(
        self, image: Image, planner: Planner, filename: str | None, fmt: str | None
    ) -> Iterable[Changes]:
        """Makes `filename` the backing image that the header names, or none. Guest data is not looked at."""
        ...
