"""Another header for a live image, where more changes than one sector holds (DESIGN, hazard 14).

Only the first sector is switched at once. What lies behind it in the header cluster (the rest of the extensions, a
backing image's name) is written while nothing in the first sector refers to it:

    1  sector 0   as before, without the table of feature names: everything it refers to is in sector 0, but for the
                  old backing name
    2  sectors 1… the new ones, around the old backing name
    3  sector 0   the new one
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from safeimg.drivers.errors import FormatError, UnsupportedError
from safeimg.drivers.formats.api import Changes
from safeimg.drivers.formats.metadata import Phase
from safeimg.drivers.formats.qcow2.entries import SECTOR
from safeimg.drivers.formats.qcow2.extensions import EXT_FEATURE_NAMES, Extension, feature_name_table
from safeimg.drivers.formats.qcow2.header import (
    FEATURE_TABLE_MIN_CLUSTER,
    UNFINISHED,
    Header,
    backing_name_offset,
    parse_header_cluster,
    serialise,
)

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner

_BACKING = struct.Struct(">QI")


def current_header(planner: Qcow2Planner) -> Header:
    """The header as it is once everything planned so far is applied."""
    return parse_header_cluster(planner.view.read(0, planner.cluster_size), planner.path, unfinished=True)


def rewrite_header(planner: Qcow2Planner, wanted: Header) -> Iterator[Changes]:
    """Changes after which the header says what `wanted` says; the last one makes the difference.

    The table of feature names is written anew or, where it has no room, left out. Raises `UnsupportedError` if the
    extensions that matter do not fit into the first sector."""
    yield from stage_header(planner, wanted)
    switch_header(planner, wanted)
    yield planner.take()


def stage_header(planner: Qcow2Planner, wanted: Header) -> Iterator[Changes]:
    """The changes before the last one of `rewrite_header`: what is left is to switch the first sector. Nothing else
    is planned meanwhile. Raises `UnsupportedError`."""
    path, view = planner.path, planner.view
    cluster = view.read(0, planner.cluster_size)
    target = _lay_out(path, cluster, wanted)
    if target[SECTOR:] == cluster[SECTOR:]:
        return
    current = parse_header_cluster(cluster, path, unfinished=True)
    bare = current._replace(extensions=_without_names(current))
    if backing_name_offset(bare) > SECTOR:
        raise UnsupportedError(f"{path}: the header's extensions do not fit into its first sector")
    view.write(0, serialise(bare)[:SECTOR], Phase.LINK)
    changes = planner.take()
    if changes:
        yield changes
    view.write(SECTOR, target[SECTOR:], Phase.LINK)
    yield planner.take()


def switch_header(planner: Qcow2Planner, wanted: Header) -> None:
    """Plans the switch of the first sector, after `stage_header` for a header that differs from `wanted` in nothing
    that is longer or shorter."""
    cluster = planner.view.read(0, planner.cluster_size)
    target = _lay_out(planner.path, cluster, wanted)
    if target[SECTOR:] != cluster[SECTOR:]:
        raise RuntimeError(f"{planner.path}: the header was not staged")
    planner.view.write(0, target[:SECTOR], Phase.LINK)
    planner.header = parse_header_cluster(target, planner.path, unfinished=True)


def _without_names(header: Header) -> tuple[Extension, ...]:
    return tuple(extension for extension in header.extensions if extension.type != EXT_FEATURE_NAMES)


def _lay_out(path: str, cluster: bytes, wanted: Header) -> bytes:
    """The new header cluster. The old backing name stays what it is until the first sector is switched."""
    named = _name(cluster)
    old = range(max(SECTOR, named.start), max(SECTOR, named.stop))
    bare = wanted._replace(extensions=_without_names(wanted))
    candidates = [bare]
    mark = wanted.extension(EXT_FEATURE_NAMES) if wanted.incompatible_features & UNFINISHED else None
    if wanted.version > 2 and wanted.cluster_size >= FEATURE_TABLE_MIN_CLUSTER:
        candidates.insert(0, bare._replace(extensions=(*bare.extensions, feature_name_table())))
    for header in candidates:
        for name_at in (0, old.stop):  # right behind the extensions, or behind the old name
            try:
                target = bytearray(_serialised(header._replace(backing_file_offset=name_at), mark))
            except FormatError:  # no room for it all
                continue
            kept = cluster[old.start:old.stop]
            in_use = [range(backing_name_offset(header)), _name(bytes(target))]
            if target[old.start:old.stop] == kept or not any(_overlap(old, used) for used in in_use):
                target[old.start:old.stop] = kept
                return bytes(target)
    raise UnsupportedError(f"{path}: no room in the header's cluster for all that it would have to hold")


def _serialised(header: Header, mark: bytes | None) -> bytes:
    """The header cluster. Of an image that is still being made, sector 0 has `mark` for a table of feature names: the
    one that tells so; what lies behind is as it will be."""
    if mark is None:
        return serialise(header)
    marked = header.with_extension(Extension(EXT_FEATURE_NAMES, mark), EXT_FEATURE_NAMES)
    name_at = max(header.backing_file_offset, backing_name_offset(header), backing_name_offset(marked))
    marked, header = (each._replace(backing_file_offset=name_at) for each in (marked, header))
    return serialise(marked)[:SECTOR] + serialise(header)[SECTOR:]


def _name(cluster: bytes) -> range:
    """Where the backing file's name lies."""
    offset, length = _BACKING.unpack_from(cluster, 8)
    return range(offset, offset + length if offset else offset)


def _overlap(first: range, second: range) -> bool:
    return max(first.start, second.start) < min(first.stop, second.stop)
