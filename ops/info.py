"""info: what an image is, as the members of qemu-img's JSON, in QEMU's order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.chain import InfiniteLoop, backing_filename, close_chain, open_chain
from safeimg.drivers.formats.features import SnapshotEntry
from safeimg.drivers.formats.naming import (
    FILE_DRIVERS,
    PROTOCOLS,
    STRONG,
    Blockdev,
    Value,
    below,
    from_argument,
    from_filename,
    members,
    name_of,
)
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.formats.snapshots import entries
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import FileSystem

# The order of members in QEMU's output (that of its hash table, hence no order that makes sense)
_ORDER = (
    "backing-filename-format",
    "snapshots",
    "virtual-size",
    "filename",
    "cluster-size",
    "format",
    "actual-size",
    "format-specific",
    "full-backing-filename",
    "encrypted",
    "backing-filename",
    "dirty-flag",
)

_CLEAN = ("nbd", "ssh", "null-co", "null-aio", "quorum")  # say nothing about themselves, not even that they are clean


def info(
    fs: FileSystem,
    filename: str | Blockdev,
    *,
    fmt: str | None = None,
    chain: bool = False,
    force_share: bool = False,
    secrets: Secrets = NO_SECRETS,
) -> list[dict[str, Any]]:
    """One dictionary an image: `filename`, and with `chain` its backing images down to the last.

    Opens one image at a time, so that an image whose backing image is missing can still be looked at. Raises
    `DriverError`; a chain that comes back to an image is `InfiniteLoop`."""
    found = []
    seen: set[tuple[int, int]] = set()
    name: str | Blockdev | None = filename
    while name is not None:
        images = open_chain(fs, name, format=fmt, backing=False, force_share=force_share, inspect=True)
        try:
            image = images[0]
            status = image.file.stat()
            if (status.device, status.inode) in seen:
                raise InfiniteLoop(f"Backing file '{name}' creates an infinite loop.")
            if status.inode:
                seen.add((status.device, status.inode))
            options = (from_argument(name, fmt) if isinstance(name, str) else name).options
            found.append(_describe(image, options))
            backing = image.backing_file if chain else None
            name = None if backing is None else _below(image, backing)
            fmt = image.backing_format
        finally:
            close_chain(images)
    return found


def _lowest(options: Mapping[str, Value]) -> Value:
    """The driver at the lower end of a description, if it names one."""
    found = [key for key in options if re.fullmatch(r"((file|image)\.)*driver", key)]
    return options[max(found, key=len)] if found else None


def _below(image: Image, backing: str) -> str:
    try:
        return backing_filename(image.file.path, backing)
    except UsageError:
        raise UsageError(
            f"Could not determine absolute backing filename, but backing filename '{backing}' present"
        ) from None


def shown_name(image: Image, options: Mapping[str, Value]) -> str:
    """What QEMU calls an image that was opened with `options`: `json:{…}` where no file name says it all."""
    return name_of(_own_members(image, options))


def shown_chain(layers: Sequence[Image], options: Mapping[str, Value]) -> str:
    """The same of the top of a chain, whose backing images may be others than those that it names."""
    return name_of(_chain_members(layers, options))


def _own_members(image: Image, options: Mapping[str, Value]) -> dict[str, Any]:
    format = _shown_format(image, options)
    strong = STRONG.get(format) or [each.name for each in lookup(image.format).runtime_options if each.strong]
    return members(options, format, strong)


def _chain_members(layers: Sequence[Image], options: Mapping[str, Value]) -> dict[str, Any]:
    top, own = layers[0], _own_members(layers[0], options)
    named = None if top.backing_file is None else backing_filename(top.file.path, top.backing_file)
    if len(layers) == 1:
        return own if named is None else {"backing": None, **own}
    replaced = below(options, "backing")
    if not replaced:
        return own
    if named is not None and not any(key.startswith("file") for key in replaced):
        replaced = {**from_filename(named).options, **replaced}
    backing = _chain_members(layers[1:], replaced)
    return own if name_of(backing) == named else {"backing": backing, **own}


def _shown_format(image: Image, options: Mapping[str, Value]) -> str:
    return str(options["driver"]) if options.get("driver") in (*FILE_DRIVERS, *PROTOCOLS) else image.format


def _describe(image: Image, options: Mapping[str, Value]) -> dict[str, Any]:
    """`options`: what it was opened with."""
    driver, format = lookup(image.format), _shown_format(image, options)
    status = image.file.stat()
    header = getattr(image, "header", None)
    members: dict[str, Any] = {
        "virtual-size": image.size,
        "filename": shown_name(image, options),
        "format": format,
    }
    if image.format != "raw" or _lowest(options) not in _CLEAN:
        members["dirty-flag"] = bool(getattr(header, "is_dirty", False))
    if image.cipher is not None:
        members["encrypted"] = True
    if status.allocated >= 0:
        members["actual-size"] = status.allocated
    if image.cluster_size > 1:
        members["cluster-size"] = image.cluster_size
    if image.backing_file is not None:
        members["backing-filename"] = image.backing_file
        try:
            members["full-backing-filename"] = backing_filename(image.file.path, image.backing_file)
        except UsageError:
            pass  # it lies in no folder that the name could start at
        if image.backing_format is not None:
            members["backing-filename-format"] = image.backing_format
    snapshots = [snapshot_members(entry) for entry in entries(image)]
    if snapshots:
        members["snapshots"] = snapshots
    specific: Mapping[str, object] | None = driver.specific_info(image)
    if specific is not None:
        members["format-specific"] = {"type": image.format, "data": dict(specific)}
    return {name: members[name] for name in _ORDER if name in members}


def snapshot_members(snapshot: SnapshotEntry) -> dict[str, Any]:
    """A snapshot as in qemu-img's JSON."""
    seconds, nanoseconds = divmod(snapshot.vm_clock_nsec, 10**9)
    members: dict[str, Any] = {} if snapshot.icount is None else {"icount": snapshot.icount}
    return members | {
        "vm-clock-nsec": nanoseconds,
        "name": snapshot.name,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": seconds,
        "id": snapshot.id,
        "vm-state-size": snapshot.vm_state_size,
    }
