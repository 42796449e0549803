"""snapshot: internal snapshots are taken, applied and deleted. Each is one switch of the image's metadata."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence

from safeimg.drivers.errors import FormatError, RefusedError, SnapshotDamaged
from safeimg.drivers.formats.api import Changes, Image, Planner
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.formats.features import SnapshotEntry
from safeimg.drivers.formats.naming import Blockdev
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.formats.snapshots import by_id_or_name, by_name, entries
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.ops.change import Action, Changing, Settings
from safeimg.ops.errors import Conflict
from safeimg.ops.launch import Environment


def list_snapshots(
    fs: FileSystem,
    filename: str | Blockdev,
    *,
    force_share: bool = False,
    secrets: Secrets = NO_SECRETS,
) -> Sequence[SnapshotEntry]:
    """The image's snapshots; its backing images have to be there. Raises `DriverError`."""
    layers = open_chain(fs, filename, force_share=force_share, secrets=secrets)
    try:
        return entries(layers[0])
    finally:
        close_chain(layers)


async def create(
    environment: Environment,
    filename: str | Blockdev,
    name: str,
    date_ns: int,
    *,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Takes a snapshot. `date_ns`: when, in nanoseconds since the epoch.

    This and the others raise `RefusedError` for what the image does not allow, and what `Changing.run` raises."""
    settings = {"action": "create", "name": name, "date": date_ns}

    def check(image: Image) -> None:
        snapshots = lookup(image.format).snapshots
        if snapshots is None:
            raise RefusedError(image.file.path, "no snapshots", errno=errno.ENOTSUP)
        snapshots.refuse(image, applying=False)

    await _changing.run(environment, filename, settings, backing=True, warn=warn, check=check)


async def apply(
    environment: Environment,
    filename: str | Blockdev,
    name: str,
    *,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Makes the guest content that of the snapshot with the id `name` or, if there is none, with that name."""

    def check(image: Image) -> None:
        snapshots = lookup(image.format).snapshots
        if snapshots is None:
            raise RefusedError(image.file.path, "Block driver does not support snapshots")
        snapshots.refuse(image, applying=True)
        entry = by_id_or_name(snapshots.entries(image), name)
        if entry is None:
            raise RefusedError(image.file.path, f"there is no snapshot '{name}'", errno=errno.ENOENT)
        try:
            snapshots.at(image, entry)
        except SnapshotDamaged as error:
            raise RefusedError(image.file.path, error.problem, errno=error.errno, explain=True) from None

    settings = {"action": "apply", "name": name}
    await _changing.run(environment, filename, settings, backing=True, warn=warn, check=check)


async def delete(
    environment: Environment,
    filename: str | Blockdev,
    name: str,
    *,
    warn: Callable[[str], None] | None = None,
) -> None:
    """Deletes the first snapshot with that name."""

    def check(image: Image) -> None:
        snapshots, entry = lookup(image.format).snapshots, by_name(entries(image), name)
        if snapshots is None or entry is None:
            raise RefusedError(image.file.path, "snapshot not found")
        try:
            snapshots.at(image, entry)
        except SnapshotDamaged as error:
            raise RefusedError(image.file.path, error.problem) from None

    settings = {"action": "delete", "name": name}
    await _changing.run(environment, filename, settings, backing=True, warn=warn, check=check)


def _actions(settings: Settings) -> Sequence[Action]:
    action, name, date = settings.get("action"), settings.get("name"), settings.get("date", 0)
    if action not in ("create", "apply", "delete") or not isinstance(name, str) or not isinstance(date, int):
        raise Conflict("the log does not say what was to become of which snapshot")
    seconds, nanoseconds = divmod(date, 10**9)
    if not 0 <= seconds < 1 << 32:
        raise Conflict("the log gives a date that a snapshot cannot have")

    def plan(image: Image, planner: Planner) -> Iterable[Changes]:
        snapshots = lookup(image.format).snapshots
        if snapshots is None:
            raise Conflict(f"{image.file.path}: {image.format} images have no snapshots")
        if action == "create":
            return snapshots.create(image, planner, name, seconds, nanoseconds)
        find = by_id_or_name if action == "apply" else by_name
        entry = find(snapshots.entries(image), name)
        if entry is None:
            raise Conflict(f"{image.file.path}: the snapshot '{name}' is gone")
        return snapshots.apply(image, planner, entry) if action == "apply" else snapshots.delete(image, planner, entry)

    return [_refusing(plan)]


def _refusing(plan: Action) -> Action:
    """Damage that shows while a change is planned is a reason to take it back, as what is not supported is."""

    def refusing(image: Image, planner: Planner) -> Iterator[Changes]:
        try:
            yield from plan(image, planner)
        except FormatError as error:
            raise RefusedError(image.file.path, str(error), errno=error.errno, explain=True) from error

    return refusing


_changing = Changing("snapshot", _actions)
open_layers, make_job = _changing.open_layers, _changing.make_job
