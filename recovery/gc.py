"""gc: drops what is kept for undo, the oldest first, and what crashes left in the state directory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from safeimg.drivers.storage.api import FileSystem
from safeimg.journal import find, kept, place
from safeimg.journal.errors import JournalError
from safeimg.journal.files import remove_durably
from safeimg.journal.undo import SUFFIX as UNDO_SUFFIX
from safeimg.ops.launch import Environment


@dataclass(frozen=True, slots=True)
class Dropped:
    """What was removed. `operation`: whose; empty where nobody can tell."""

    paths: tuple[str, ...]
    operation: str
    size: int  # bytes
    reason: str  # "old" or "orphaned"


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` did. `left`: bytes that are kept on."""

    dropped: tuple[Dropped, ...]
    left: int


def collect(environment: Environment, *, total: int, older_than: float | None = None, dry: bool = False) -> Collected:
    """Drops records until no more than `total` bytes are kept, and those that are older than `older_than` seconds; not
    those that a pending undo needs. With `dry` nothing is removed."""
    fs, keeping = environment.fs, environment.keeping
    dropped: list[Dropped] = []
    left = 0
    if keeping is not None:
        gone = kept.drop(
            fs, keeping, total=total, older_than=older_than, orphans=True, dry=dry,
            spared=lambda: kept.being_undone(fs, environment.history),
        )  # fmt: skip
        dropped += [
            Dropped(each.paths, each.operation, each.size, "old" if each.whole else "orphaned") for each in gone
        ]
        paths = {each.paths for each in gone}  # a dry run leaves them
        left = sum(each.size for each in kept.entries(fs, keeping) if each.paths not in paths)
    dropped += _orphans(fs, dry)
    return Collected(tuple(dropped), left)


def _orphans(fs: FileSystem, dry: bool) -> Iterator[Dropped]:
    """In the state directory: logs of operations that never began, and undo files without a log."""
    for path in place.state_files(fs):
        there = fs.stat(path)
        if there is None:
            continue
        try:
            if path.endswith(place.SUFFIX + UNDO_SUFFIX) and fs.stat(path.removesuffix(UNDO_SUFFIX)) is None:
                if not dry:
                    remove_durably(fs, path)
                yield Dropped((path,), "", there.size, "orphaned")
            elif path.endswith(place.SUFFIX):
                found = find.look(fs, path)
                if isinstance(found, find.VoidFound):
                    if not dry:
                        find.clear_void(fs, found)
                    yield Dropped((path,), "", there.size, "orphaned")
        except JournalError:  # in use, or damaged: not ours to remove
            continue
