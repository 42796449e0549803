"""From paths to nodes in the simulated file system: symbolic links, `..`, and the errors on the way."""

from __future__ import annotations

import errno
from pathlib import Path

from safeimg.drivers.storage.durability import Model, Name, Node
from safeimg.drivers.storage.recorder import failure

_MAX_LINKS = 40  # Linux's limit


def joined(place: Name) -> str:
    """The path of a directory and a name in it (or of the directory, if the name is empty)."""
    directory, name = place
    return f"{directory.rstrip('/')}/{name}" if name else directory


def locate(model: Model, path: str, action: str, *, follow: bool = True) -> Name:
    """The real directory and the name in it; the name is empty if `path` is a directory itself. The name need
    not exist, the directory must (`StorageError`). Relative paths start at `/`. Symbolic links are followed,
    the last one if `follow`."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    current, links = "/", 0
    while parts:
        part = parts.pop(0)
        if part == "..":
            current = str(Path(current).parent)
            continue
        child = joined((current, part))
        if child in model.directories:
            current = child
            continue
        number = model.directories[current].get(part)
        target = "" if number is None else model.nodes[number].target
        if target and (parts or follow):
            links += 1
            if links > _MAX_LINKS:
                raise failure(path, action, errno.ELOOP)
            parts = [step for step in target.split("/") if step not in ("", ".")] + parts
            current = "/" if target.startswith("/") else current
        elif parts:
            raise failure(path, action, errno.ENOENT if number is None else errno.ENOTDIR)
        else:
            return current, part
    return current, ""


def find(model: Model, path: str, action: str) -> Node:
    """The file at `path`, links followed. `StorageError` if it is a directory or is not there."""
    return named(model, path, action, follow=True)[1]


def named(model: Model, path: str, action: str, *, follow: bool = False) -> tuple[Name, Node]:
    """An existing name and its file. `StorageError` as `find`."""
    place = locate(model, path, action, follow=follow)
    if not place[1]:
        raise failure(path, action, errno.EISDIR)
    number = model.directories[place[0]].get(place[1])
    if number is None:
        raise failure(path, action, errno.ENOENT)
    return place, model.nodes[number]


def find_directory(model: Model, path: str) -> str:
    """The real path of a directory. `StorageError` if it is something else or nothing."""
    directory, name = locate(model, path, "open directory")
    if name:
        known = name in model.directories[directory]
        raise failure(path, "open directory", errno.ENOTDIR if known else errno.ENOENT)
    return directory
