"""A guest for the simulation: writes to an image as a running machine would, straight and without any journal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from safeimg.drivers.errors import SecretMissing
from safeimg.drivers.formats.api import Changes, Image
from safeimg.drivers.formats.chain import OpenError, close_chain, open_chain
from safeimg.drivers.formats.features import BitmapState, WantedBitmap
from safeimg.drivers.formats.naming import Blockdev
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.drivers.transfer.target import Target
from safeimg.drivers.transfer.view import View

SECRETS = Secrets()
SECRETS.add("s0", b"hunter2")
SECRETS.add("s1", b"another")


def create(fs: FileSystem, path: str, fmt: str, size: int, **options: str) -> None:
    lookup(fmt).create(fs, path, size, spelled(options), secrets=SECRETS)


def spelled(options: Mapping[str, str]) -> dict[str, str]:
    """Options whose names are Python's, as `-o` has them."""
    return {name.replace("encrypt_", "encrypt.").replace(".key_", ".key-"): value for name, value in options.items()}


def named(path: str, key: dict[str, str]) -> Blockdev:
    return Blockdev(path, {"file.driver": "file", "file.filename": path, **key})


def opened(fs: FileSystem, path: str, fmt: str | None = None, **options: bool) -> list[Image]:
    """The chain at `path`; encrypted images are opened with the secret "s0"."""
    keys: dict[str, str] = {}
    while True:
        try:
            return open_chain(fs, named(path, keys), format=fmt, secrets=SECRETS, **options)  # type: ignore[arg-type]
        except OpenError as error:
            if not isinstance(error.__cause__, SecretMissing):
                raise
            depth = str(error).count("Could not open backing file: ")
            keys["backing." * depth + error.__cause__.option] = "s0"


def write(fs: FileSystem, path: str, pieces: Iterable[tuple[int, bytes | None]], fmt: str = "qcow2") -> None:
    """Writes (guest offset, data) pieces to the top of the chain at `path`; data None zeroes one cluster."""
    chain = opened(fs, path, fmt, write=True)
    image = chain[0]
    planner = lookup(fmt).planner(image)
    for offset, data in pieces:
        length = planner.cluster_size if data is None else len(data)
        _apply(image, planner.reserve(16 + length // planner.cluster_size))
        whole = data is None
        places = planner.zero(offset, length) if whole else planner.place(offset, length)
        view = View(chain)
        for place in places:
            content = bytearray(place.length)
            view.read_into(place.start, memoryview(content))
            low, high = max(place.start, offset), min(place.start + place.length, offset + length)
            content[low - place.start : high - place.start] = (
                bytes(high - low) if data is None else data[low - offset : high - offset]
            )
            Target(image.data, image.cipher).write(memoryview(content), place.offset, place.start)
        _apply(image, planner.take())
        image = chain[0] = lookup(fmt).reopen(image)
    _apply(image, planner.release())
    image.file.sync_all()
    image.data.sync_all()
    close_chain(chain)


def write_compressed(fs: FileSystem, path: str, pieces: Iterable[tuple[int, bytes]]) -> None:
    """Writes whole clusters of data, compressed."""
    from safeimg.drivers.formats.qcow2.compression import compress

    chain = opened(fs, path, "qcow2", write=True, backing=False)
    image = chain[0]
    planner = lookup("qcow2").planner(image)
    details: Any = lookup("qcow2").specific_info(image)
    kind = ("zlib", "zstd").index(details.get("compression-type", "zlib"))
    for offset, data in pieces:
        _apply(image, planner.reserve(16))
        stored = compress(kind, data)
        assert stored is not None
        (host,) = planner.place_compressed(offset, [len(stored)])
        image.file.pwrite(host, stored)
        _apply(image, planner.take())
    image.file.sync_all()
    close_chain(chain)


def snapshot(fs: FileSystem, path: str, name: str) -> None:
    """Takes an internal snapshot."""
    chain = opened(fs, path, "qcow2", write=True, backing=False)
    image = chain[0]
    driver = lookup("qcow2")
    assert driver.snapshots is not None
    for changes in driver.snapshots.create(image, driver.planner(image), name, 1_700_000_000, 0):
        for offset, content in changes.fresh:
            image.file.pwrite(offset, content)
        _apply(image, changes)
    image.file.sync_all()
    close_chain(chain)


def bitmaps(fs: FileSystem, path: str, wanted: Iterable[tuple[str, int, bool]]) -> None:
    """Adds bitmaps given as (name, granularity, enabled)."""
    chain = opened(fs, path, write=True, backing=False)
    states = [WantedBitmap(BitmapState(name, size, enabled, False), False) for name, size, enabled in wanted]
    planner = lookup("qcow2").planner(chain[0])
    feature = lookup("qcow2").bitmaps
    assert feature is not None
    for changes in feature.store(chain[0], planner, states):
        _apply(chain[0], changes)
    _apply(chain[0], planner.release())
    chain[0].file.sync_all()
    close_chain(chain)


def mark(fs: FileSystem, path: str, ranges: list[tuple[int, int]]) -> None:
    """Sets bits of the enabled bitmaps, without writing data."""
    chain = opened(fs, path, write=True, backing=False)
    planner = lookup("qcow2").planner(chain[0])
    _apply(chain[0], planner.reserve(planner.marking_clusters(ranges)))
    _apply(chain[0], planner.mark_dirty(ranges))
    chain[0].file.sync_all()
    close_chain(chain)


def _apply(image: Image, changes: Changes) -> None:
    if changes.length is not None and image.file.length() < changes.length:
        image.file.truncate(changes.length)
    for patch in (*changes.allocate, *changes.link):
        image.file.pwrite(patch.offset, patch.after)


def content(fs: FileSystem, path: str, fmt: str | None = None) -> bytes:
    """What a guest sees."""
    chain = opened(fs, path, fmt)
    try:
        view = View(chain)
        data = bytearray(view.size)
        view.read_into(0, memoryview(data))
        return bytes(data)
    finally:
        close_chain(chain)
