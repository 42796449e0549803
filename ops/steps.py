"""An operation is a generator of steps; the engine makes any operation's steps durable (docs/design.md)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from safeimg.drivers.formats.api import Changes, Patch
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.transfer.digest import Written as Written


class Move(NamedTuple):
    """Guest data written in place: `length` bytes at offset `source` of the operation's view (None: zeroes) to
    `offset` of the file, which is guest offset `guest` of the image that the file belongs to."""

    image: int
    offset: int
    length: int
    source: int | None
    guest: int

    def continues(self, last: Move) -> bool:
        """Whether `last` and this move are one."""
        after = last.length
        return (last.image, last.offset + after, last.guest + after) == (self.image, self.offset, self.guest) and (
            self.source is None is last.source
            if self.source is None or last.source is None
            else last.source + after == self.source
        )


class Step(NamedTuple):
    """The unit of durability. Images by index: 0 is the home image; an external data file has an index of its
    own (`session.touched`)."""

    name: str
    cursor: Any  # where the next step starts, JSON-like; None: not a place to resume from, see `OperationState.cursor`
    done: int  # guest bytes processed once this step is applied
    fresh: Sequence[Written] = ()  # guest data that the generator has already written into fresh space
    moves: Sequence[Move] = ()
    changes: Sequence[tuple[int, Changes]] = ()
    no_return: bool = False  # this step and those after it cannot be taken back
    truncate: Sequence[tuple[int, int]] = ()  # (image, length), once the step is durable; only with `no_return`


class Operation(Protocol):
    """What a command does, as steps that can be started anywhere."""

    def steps(self, cursor: Any | None) -> AsyncIterator[Step]:
        """Yields steps from `cursor` (None: the beginning). When resumed the images on disk hold exactly the steps
        before the cursor. The engine applies each step before it asks for the next."""
        ...

    def finish(self) -> Sequence[tuple[int, Patch]]:
        """Patches made once the outcome is decided: fences come down. From what is on disk now."""
        ...

    def discards(self) -> Sequence[tuple[int, int, int]]:
        """Space that nobody uses any more once the operation is completed: (image, offset, length)."""
        ...
