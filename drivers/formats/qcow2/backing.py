"""Which image a qcow2 image is based on (spec: "backing_file_offset", "Backing file format name")."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import Changes
from safeimg.drivers.formats.qcow2.extensions import EXT_BACKING_FORMAT, MAX_BACKING_FORMAT, Extension
from safeimg.drivers.formats.qcow2.header import MAX_BACKING_NAME, Header
from safeimg.drivers.formats.qcow2.rewrite import current_header, rewrite_header

if TYPE_CHECKING:
    from safeimg.drivers.formats.qcow2.planner import Qcow2Planner


def accepts_backing(header: Header, filename: str) -> bool:
    """See `features.Rebasing`. A raw data file is all that the guest sees."""
    return not header.data_file_is_raw and len(os.fsencode(filename)) <= MAX_BACKING_NAME


def set_backing(planner: Qcow2Planner, filename: str | None, fmt: str | None) -> Iterator[Changes]:
    """See `features.Rebasing`. Raises `UsageError` for names that no header holds."""
    if filename is not None and len(os.fsencode(filename)) > MAX_BACKING_NAME:
        raise UsageError(f"{planner.path}: the backing file name is longer than {MAX_BACKING_NAME} bytes")
    extension = None
    if filename is not None and fmt is not None:
        if len(os.fsencode(fmt)) > MAX_BACKING_FORMAT:
            raise UsageError(f"{planner.path}: the backing format is longer than {MAX_BACKING_FORMAT} bytes")
        extension = Extension(EXT_BACKING_FORMAT, os.fsencode(fmt))
    header = current_header(planner)
    extensions = tuple(kept for kept in header.extensions if kept.type != EXT_BACKING_FORMAT)
    if extension is not None:  # in front: it has to be in the first sector
        extensions = (extension, *extensions)
    yield from rewrite_header(planner, header._replace(backing_file=filename or None, extensions=extensions))
