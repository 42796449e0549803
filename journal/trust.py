"""Which files beside an image are believed: an image may arrive with a hostile log next to it."""

from __future__ import annotations

import os
import stat

from safeimg.journal.errors import LogForeign
from safeimg.journal.files import FileStat, FileSystem


def sidecar_stat(files: FileSystem, path: str, image_owner: int | None = None) -> FileStat | None:
    """The status of the log, pointer or undo file at `path`; None if nothing is there.

    Raises `LogForeign` unless it is a regular file (not a link to one) of the caller's, root's or
    `image_owner`'s.
    """
    found = files.stat(path)
    if found is None:
        return None
    folder, name = os.path.split(path)
    if files.resolve(path) != os.path.join(files.resolve(folder or "."), name):
        raise LogForeign(
            f"{path}: a symbolic link stands where a journal would; remove it or name the image itself"
        )
    check_trusted(found, path, image_owner)
    return found


def check_trusted(found: FileStat, path: str, image_owner: int | None = None) -> None:
    """Raises `LogForeign` if what `found` describes (of the open file, so that nobody can swap it) is not
    believed."""
    kind = stat.S_IFMT(found.mode)
    if found.is_device or kind not in (0, stat.S_IFREG):
        raise LogForeign(f"{path}: not a regular file, so not a journal of safeimg's; move it away")
    if found.uid not in (os.geteuid(), 0, image_owner):
        raise LogForeign(
            f"{path}: belongs to user {found.uid}, neither you, root nor the image's owner, and is not "
            "trusted; if you trust it, change its owner to yours, else move it away"
        )
