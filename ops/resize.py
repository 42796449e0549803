"""resize: another virtual size for an image.

Growing: fence | what the backing image would show is zeroed, or everything preallocated | the size | release.
Shrinking: fence | the size | what lay behind is unmapped | release | the file is cut, behind the point of no return.

A raw image is its file, a LUKS image what its file has behind the header: they grow by its length first, and shrinking
them is nothing but the cut.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from safeimg.drivers.errors import StorageError, UsageError
from safeimg.drivers.formats.api import Image, Patch, Placement
from safeimg.drivers.formats.chain import close_chain
from safeimg.drivers.formats.naming import Blockdev, are_options, lasting
from safeimg.drivers.formats.options import check_offset
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.drivers.transfer.buffers import Buffers
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.loop import blocking
from safeimg.drivers.transfer.target import Target
from safeimg.drivers.transfer.view import View
from safeimg.journal.state import OperationState
from safeimg.ops.errors import Conflict
from safeimg.ops.filling import STEP_BYTES, Filler, grow
from safeimg.ops.launch import Environment, Job, launch
from safeimg.ops.phases import END, in_phases
from safeimg.ops.reopening import reopen_home, started_settings, unlinked_by
from safeimg.ops.repair import open_to_change
from safeimg.ops.session import data_index, touched
from safeimg.ops.steps import Step

PREALLOCATIONS = ("off", "metadata", "falloc", "full")
GROWING = ("fence", "grow", "reserve", "release")
SHRINKING = ("fence", "shrink", "forget", "release", "trim")
TABLES = 64  # L2 tables that a step of shrinking unmaps


class ShrinkRefused(UsageError):
    """Nobody said that what lies behind the new end may be lost."""


class Resize:
    """The steps for `layers[0]`, with its backing images behind it.

    `old`, `new`: virtual sizes in bytes, when the operation started and as wanted."""

    def __init__(
        self,
        layers: Sequence[Image],
        transfer: Transfer,
        old: int,
        new: int,
        preallocation: str,
        *,
        unlinked: Sequence[tuple[int, int]] = (),
        step_bytes: int = STEP_BYTES,
    ) -> None:
        self._layers = layers
        self._image = layers[0]
        self._old, self._new = old, new
        self._preallocation = preallocation
        self._filler = Filler([self._image], transfer, unlinked=unlinked, step_bytes=step_bytes)
        self._planner = self._filler.planner
        self._is_whole = _is_whole(self._image)

    def finish(self) -> Sequence[tuple[int, Patch]]:
        """Takes the fence down."""
        return tuple((0, patch) for patch in lookup(self._image.format).unfence(self._image))

    def discards(self) -> Sequence[tuple[int, int, int]]:
        """Space that nobody uses any more: (image, offset, length)."""
        return tuple((0, *freed) for freed in self._planner.freed())

    async def steps(self, cursor: Any | None) -> AsyncIterator[Step]:
        async for step in in_phases(self, GROWING if self._new > self._old else SHRINKING, cursor):
            yield step

    async def _fence(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        changes = lookup(self._image.format).fence(self._image)
        after = {"phase": "grow" if self._new > self._old else "shrink"}
        yield Step("fence", after, 0, changes=[(0, changes)] if changes else [])

    async def _grow(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        fill = None if self._preallocation == "off" or self._is_whole else self._allocate
        async for step in grow(self._filler, self._layers, self._new, cursor, {"phase": "reserve"}, fill=fill):
            yield step

    async def _reserve(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        """Space for what an image without clusters has grown by."""
        if self._preallocation != "off" and self._is_whole:
            await blocking(self._allocate_whole)
            yield Step("preallocate", {"phase": "release"}, 0)

    def _allocate_whole(self) -> None:
        for place in self._planner.place(self._old, self._new - self._old):
            self._image.data.write_zeroes(place.offset, place.length, unmap=False)
        self._image.data.sync()

    async def _release(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        changes = self._planner.release()
        if changes:
            after = END if self._new > self._old else "trim"
            yield Step("release", {"phase": after}, 0, changes=[(0, changes)])

    async def _shrink(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        switches = self._planner.shrink(self._new)
        for number, changes in enumerate(switches, 1):
            after = {"phase": "forget"} if number == len(switches) else None
            yield Step("size", after, 0, changes=[(0, changes)])

    async def _forget(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        at: int | None = cursor.get("at", 0)
        while at is not None:
            async for step in self._filler.reserve({"phase": "forget", "at": at}, 0, TABLES):
                yield step
            at = self._planner.forget(at, TABLES)
            changes = self._planner.take()
            if changes:
                after = {"phase": "release"} if at is None else {"phase": "forget", "at": at}
                yield Step("forget", after, 0, changes=[(0, changes)])

    async def _trim(self, cursor: dict[str, Any]) -> AsyncIterator[Step]:
        driver = lookup(self._image.format)
        end = driver.used_end(driver.reopen(self._image))
        length = self._planner.place(0, 1)[0].offset + self._new if end is None else end
        cuts = [(0, length)] if length < self._image.file.length() else []
        if self._image.data is not self._image.file and self._new < self._image.data.length():
            cuts.append((data_index([self._image], 0), self._new))  # where it is seen, there it lies
        if cuts:
            yield Step("trim", {"phase": END}, 0, truncate=cuts, no_return=True)

    def _allocate(self, placements: Sequence[Placement]) -> None:
        """Zeroes for clusters that are allocated ahead. Encrypted ones have to be written."""
        buffers, target = Buffers(), Target(self._image.data, self._image.cipher)
        for place in placements:
            length = -(-place.length // self._filler.cluster) * self._filler.cluster
            if target.cipher is not None:
                target.zero(place.offset, length, place.start, buffers)
            else:
                target.file.write_zeroes(place.offset, length, unmap=self._preallocation == "metadata")


async def resize(
    environment: Environment,
    filename: str | Blockdev,
    size: Callable[[int], int],
    *,
    fmt: str | None = None,
    preallocation: str = "off",
    shrink: bool = False,
    cache: str = "writeback",
    warn: Callable[[str], None] | None = None,
    check: Callable[[Image], None] | None = None,
    step_bytes: int = STEP_BYTES,
) -> None:
    """Makes the virtual disk `size(present size)` bytes large. `check` may refuse the image before anything is begun.
    Raises what opening raises, `UsageError` in qemu-img's words, `SomethingPending`, `OperationPaused`."""
    layers = await open_to_change(environment, filename, fmt=fmt, cache=cache, warn=warn, backing=True)
    try:
        if check is not None:
            check(layers[0])
        old = layers[0].size
        new = size(old)
        _check(layers[0], old, new, preallocation, shrink=shrink)
        if new != old:
            settings = {
                "old": old, "new": new, "preallocation": preallocation, "cache": cache,
                "format": layers[0].format, "options": lasting(filename, environment.fs.resolve), "step": step_bytes,
            }
            await launch(_job(layers, settings, environment.transfer), environment)
    except StorageError as error:
        if error.errno == errno.EFBIG and error.action == "truncate":  # trying again would not help
            what = "preallocate new data" if preallocation == "falloc" else "resize file"
            raise UsageError(f"Could not {what}: {error.strerror}") from error
        raise
    finally:
        close_chain(layers)


def _check(image: Image, old: int, new: int, preallocation: str, *, shrink: bool) -> None:
    if new <= 0:
        raise UsageError("New image size must be positive")
    if new <= old and preallocation != "off":
        raise UsageError("Preallocation can only be used for growing images")
    if new < old and not shrink:
        raise ShrinkRefused("Use the --shrink option to perform a shrink operation.")
    if _is_whole(image) and preallocation == "metadata":
        raise UsageError("Unsupported preallocation mode: metadata")
    check_offset(new)
    planner = lookup(image.format).planner(image)  # what it refuses is refused before anything is begun
    if new < old:
        planner.shrink(new)
    else:
        planner.prepare_resize(new)


def _is_whole(image: Image) -> bool:
    """Whether the virtual disk is one stretch of the file, that needs no metadata to grow."""
    return image.cluster_size == 1


def open_layers(fs: FileSystem, home: str, state: OperationState, secrets: Secrets) -> list[Image]:
    """See `registry.Reopener`."""
    return reopen_home(fs, home, _settings(home, state), secrets, backing=True)


def make_job(layers: list[Image], state: OperationState, environment: Environment) -> Job:
    """See `registry.Reopener`."""
    released = isinstance(state.cursor, dict) and state.cursor.get("phase") in ("trim", END)
    unlinked = () if released else unlinked_by(state)  # what is freed may lie beyond the end of a file that was cut
    return _job(layers, _settings(layers[0].file.path, state), environment.transfer, unlinked=unlinked)


def _settings(home: str, state: OperationState) -> dict[str, Any]:
    """What the operation was started with, checked: it comes from a file."""
    kinds = {"old": int, "new": int, "preallocation": str, "cache": str, "format": str, "step": int}
    settings = started_settings(home, state, kinds, "resize")
    if min(settings["old"], settings["new"]) < 0 or settings["step"] < 1 or not are_options(settings.get("options")):
        raise Conflict(f"{home}: the log's sizes do not fit a resize")
    return settings


def _job(
    layers: list[Image], settings: dict[str, Any], transfer: Transfer, *, unlinked: Sequence[tuple[int, int]] = ()
) -> Job:
    operation = Resize(
        layers, transfer, settings["old"], settings["new"], settings["preallocation"], unlinked=unlinked,
        step_bytes=settings["step"],
    )
    files = touched([("image", layers[0], True)])
    view = View(layers, size=min(layers[0].size, settings["old"]))  # behind the old end there are zeroes
    return Job("resize", operation, files, layers, view, settings)
