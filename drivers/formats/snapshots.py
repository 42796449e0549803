"""Internal snapshots of any format: found as qemu-img finds them, and read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from safeimg.drivers.errors import SnapshotDamaged, UsageError
from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.features import SnapshotEntry
from safeimg.drivers.formats.options import split_options
from safeimg.drivers.formats.registry import lookup


def entries(image: Image) -> Sequence[SnapshotEntry]:
    """The image's snapshots; none where its format has no such thing. `FormatError`."""
    snapshots = lookup(image.format).snapshots
    return () if snapshots is None else snapshots.entries(image)


def by_id_or_name(found: Iterable[SnapshotEntry], text: str) -> SnapshotEntry | None:
    """The snapshot with this id; if there is none, the first with this name."""
    listed = list(found)
    return next((entry for entry in listed if entry.id == text), None) or by_name(listed, text)


def by_name(found: Iterable[SnapshotEntry], text: str) -> SnapshotEntry | None:
    return next((entry for entry in found if entry.name == text), None)


def load(layers: Sequence[Image], wanted: str, driver: str | None = None) -> list[Image]:
    """The chain of open images with the top one as a snapshot has it (`-l` of convert and measure).

    `driver`: what messages call the top one's format, if not that. `wanted`: an id or a name, or
    `snapshot.id=…,snapshot.name=…`. Raises `UsageError` with qemu-img's message."""
    top = layers[0]
    snapshots = lookup(top.format).snapshots
    if snapshots is None:
        raise UsageError(
            f"Failed to load snapshot: Block format '{driver or top.format}' used by device '' does not support "
            "temporarily loading internal snapshots"
        )
    listed = snapshots.entries(top)
    if wanted.startswith("snapshot."):
        given = dict(split_options(wanted))
        identifier, name = given.get("snapshot.id"), given.get("snapshot.name")
        entry = next(
            (each for each in listed if identifier in (None, each.id) and name in (None, each.name)), None
        )
    else:
        entry = by_id_or_name(listed, wanted)
    if entry is None:
        raise UsageError("Failed to load snapshot: Can't find snapshot")
    try:
        return [snapshots.at(top, entry), *layers[1:]]
    except SnapshotDamaged as error:
        raise UsageError(f"Failed to load snapshot: {error.problem}") from error
