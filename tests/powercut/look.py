"""What can be told of the images in a simulated file system: for the judge, and to tell crash states apart."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from powercut import guest
from safeimg.drivers.errors import FormatError
from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.chain import close_chain
from safeimg.drivers.formats.features import BitmapState
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.formats.snapshots import entries, load
from safeimg.drivers.storage.simulated import SimulatedFileSystem
from safeimg.drivers.transfer.view import View
from safeimg.ops.bitmap_plan import listed
from safeimg.ops.info import snapshot_members

SIDECAR = ".safeimg"
_REMEMBERED = 20_000  # looks; many crash states share their images


class Violation(AssertionError):
    """A promise that a crash state breaks. `legs`: how the state came about (`judge.Leg`), if it is one."""

    def __init__(self, message: str, legs: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.legs = legs


def sidecars(fs: SimulatedFileSystem) -> Sequence[str]:
    """The journal's own files."""
    return [name for name in fs.list_directory("/") if SIDECAR in name]


def _is_image(path: str) -> bool:
    return path.count("/") == 1 and SIDECAR not in path


def digest_of(content: bytes) -> bytes:
    """Stands for what a guest sees: contents themselves would fill the memory."""
    return hashlib.blake2b(content, digest_size=16).digest()


def state_digest(
    fs: SimulatedFileSystem, keep: Callable[[str], bool] = lambda path: True, *, times: bool = True
) -> bytes:
    """Of all that a process finds: names, and each file's bytes, holes, length, attributes and `times`."""
    model = fs.model
    hasher = hashlib.blake2b(digest_size=16)
    for directory in sorted(model.directories):
        hasher.update(f"{directory}\0".encode())
        for name, number in sorted(model.directories[directory].items()):
            if not keep(f"{directory.rstrip('/')}/{name}"):
                continue
            node = model.nodes[number]
            live = node.live
            seen = (name, number, live.length, live.attributes, node.target, (live.mtime, live.ctime) if times else ())
            hasher.update(repr(seen).encode() + live.content.digest())
    return hasher.digest()


def unsynced_digest(fs: SimulatedFileSystem) -> bytes:
    """Of what a power cut could still take away from `fs`."""
    model = fs.model
    hasher = hashlib.blake2b(repr((model.disk_names, model.name_changes)).encode(), digest_size=16)
    for number, node in sorted(model.nodes.items()):
        hasher.update(repr((number, node.disk.length, node.disk.mtime, node.disk.attributes)).encode())
        hasher.update(node.disk.content.digest())
        for change in node.changes:
            hasher.update(repr((change.serial, change.offset, change.size, change.length, change.poisoned)).encode())
    return hasher.digest()


@dataclass(frozen=True)
class Look:
    """What a user can tell of an image: all that a rollback restores and a resume reaches."""

    content: bytes  # its digest
    size: int
    backing: tuple[str | None, str | None]
    leaks: int
    bitmaps: tuple[tuple[BitmapState, bytes], ...]
    details: object
    snapshots: object  # what is listed of each, and its content
    mistakes: int  # in the metadata; none is allowed but of images that were `broken` before

    @classmethod
    def at(cls, fs: SimulatedFileSystem, path: str, fmt: str, *, broken: bool = False) -> Look:
        """What `path` shows. `Violation` if its metadata is wrong."""
        key = path.encode() + bytes([broken]) + state_digest(fs, _is_image, times=False)
        if key not in _LOOKS:
            if len(_LOOKS) > _REMEMBERED:
                _LOOKS.clear()
            _LOOKS[key] = cls._at(fs, path, fmt, broken)
        return _LOOKS[key]

    @classmethod
    def _at(cls, fs: SimulatedFileSystem, path: str, fmt: str, broken: bool) -> Look:
        chain = guest.opened(fs, path, fmt)
        try:
            driver = lookup(fmt)
            leaks = mistakes = 0
            found = driver.check(chain[0])
            if found is not None:
                lost = lost_blocks(fmt, found.messages)
                leaks = found.leaks + lost
                if broken:
                    mistakes = found.corruptions + found.check_errors
                elif found.corruptions != bool(lost) or found.check_errors:
                    raise Violation(f"{path}: {found.messages}")
            backing = chain[0].backing_file, chain[0].backing_format
            snapshots = [
                (snapshot_members(entry), entry.disk_size, _content(load(chain, f"snapshot.id={entry.id}")))
                for entry in entries(chain[0])
            ]
            bitmaps = tuple((state, _bits(chain[0], state)) for state in listed(chain[0]))
            details = driver.specific_info(chain[0])
            content = _content(chain, broken=broken)
            return cls(content, chain[0].size, backing, leaks, bitmaps, details, snapshots, mistakes)
        finally:
            close_chain(chain)


_LOOKS: dict[bytes, Look] = {}


def _content(chain: Sequence[Image], *, broken: bool = False) -> bytes:
    view = View(chain)
    data = bytearray(view.size)
    try:
        view.read_into(0, memoryview(data))
    except FormatError as error:
        if not broken:
            raise
        return digest_of(str(error).encode())
    return digest_of(data)


def lost_blocks(fmt: str, messages: Iterable[str]) -> int:
    """Blocks that a VDI image counts and does not refer to, if that is all that is wrong: what a leak is elsewhere is
    an error in the words of its check."""
    found = re.fullmatch(r"ERROR: allocated blocks mismatch, is (\d+), should be (\d+)\n?", "\n".join(messages))
    return 0 if fmt != "vdi" or found is None else max(0, int(found[2]) - int(found[1]))


def _bits(image: Image, state: BitmapState) -> bytes:
    """All bits of a bitmap; of an inconsistent one they mean nothing."""
    feature = lookup(image.format).bitmaps
    if feature is None or state.inconsistent:
        return b""
    return feature.bits(image, state.name).read(0, -(-image.size // (8 * state.granularity)))
