"""What some formats can do and others cannot. A driver without the feature has None in its place.

Each plans with the image's `Planner` and answers changes to be made durable one after the other, every one a step of
its own. The last one is the switch that makes the difference; planning anew after any of those before it leads to the
same end, so that an interrupted command can start over. What loses its last reference is only unlinked: the caller's
`Planner.release` frees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from safeimg.drivers.formats.api import Changes, CreateOption, Image, Planner


class Rebasing(Protocol):
    """Formats with backing images."""

    def set_backing(
        self, image: Image, planner: Planner, filename: str | None, fmt: str | None
    ) -> Iterable[Changes]:
        """Makes `filename` the backing image that the header names, or none. Guest data is not looked at."""
        ...


class Amendment(Protocol):
    """One thing that `amend` does. Plans nothing where the image is like that already."""

    def __call__(self, image: Image, planner: Planner) -> Iterable[Changes]: ...


class Amending(Protocol):
    """Formats whose options can be changed on images that exist."""

    options: Sequence[CreateOption]  # what `-o` takes, as `amend -o help` lists them

    def check(self, image: Image, values: Mapping[str, str], *, force: bool) -> None:
        """Refuses what cannot be made of the image: `UsageError` in QEMU's words. Writes nothing."""
        ...

    def amendments(self, values: Mapping[str, str]) -> Sequence[Amendment]:
        """What the options ask for, in the order of doing. Does not depend on the image: an interrupted command asks
        again."""
        ...
