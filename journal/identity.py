"""Which file an image is: device, inode, and an id of our own in an extended attribute where there can be
one.

`fdatasync` does not make a file's times durable: the identity of an image that is only read is recorded after
`sync_all` on it, or a power cut brings an older mtime back and the image looks changed.
"""

from __future__ import annotations

import os
import re

from safeimg.journal.events import Identity
from safeimg.journal.files import File, FileSystem

ATTRIBUTE = "user.safeimg.id"

_TAG = re.compile(rb"[0-9a-f]{32}")


def identify(file: File, *, tag: bool = False) -> Identity:
    """The image's identity now. With `tag`, it gets an id of its own first if it has none and can have
    one."""
    mark = ensure_tag(file) if tag else read_tag(file)
    found = file.stat()
    return Identity(found.device, found.inode, found.size, found.mtime_ns, found.ctime_ns, mark)


def identify_at(files: FileSystem, path: str) -> Identity:
    """The identity of the file at `path`. Raises what opening it raises."""
    file = files.open(path)
    try:
        return identify(file)
    finally:
        file.close()


def read_tag(file: File) -> str | None:
    """The image's id; None if it has none, or something that is not one."""
    value = file.get_attribute(ATTRIBUTE)
    return value.decode("ascii") if value is not None and _TAG.fullmatch(value) else None


def ensure_tag(file: File) -> str | None:
    """The image's id, made up if it has none; None where the file system keeps no attributes."""
    found = read_tag(file)
    if found is None:
        made = os.urandom(16).hex()
        found = made if file.set_attribute(ATTRIBUTE, made.encode("ascii")) else None
    return found


def same_file(recorded: Identity, now: Identity) -> bool:
    """The same file, whatever it holds. A device number may change when a disk is attached elsewhere; then
    the ids must agree. A copy carries the id of the original, but not its inode."""
    if recorded.inode != now.inode:
        return False
    if recorded.tag is not None and now.tag is not None:
        return recorded.tag == now.tag
    return recorded.device == now.device


def unchanged(recorded: Identity, now: Identity) -> bool:
    """The same file, and nobody wrote to it since. (A rename or chmod changes ctime, which is not looked
    at.)"""
    return same_file(recorded, now) and (recorded.size, recorded.mtime_ns) == (now.size, now.mtime_ns)


def untouched(recorded: Identity, now: Identity) -> bool:
    """The same file, and nobody did anything to it since, not even what a restored modification time would hide."""
    return unchanged(recorded, now) and recorded.ctime_ns == now.ctime_ns
