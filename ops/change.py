"""Commands that change one image's metadata by switches: snapshots, bitmaps, options, the backing image, repairs.

Steps: fence | the actions, one after the other | release. An action plans changes with the image's planner; its last
change is the switch that makes the difference, and planning it anew after any change before that leads to the same
end (see `formats.features`). So a resumed operation starts at the first action whose switch is not on disk.

A command's module says what its actions are; from there on all commands are alike (`Changing`).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any

from safeimg.drivers.formats.api import Changes, Image, Patch, Planner
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.formats.naming import Blockdev, are_options, lasting, recalled, without_backing
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.drivers.transfer.loop import blocking
from safeimg.journal.state import OperationState
from safeimg.ops.errors import Conflict
from safeimg.ops.launch import Environment, Job, launch
from safeimg.ops.moving import write_fresh
from safeimg.ops.reopening import reopen_home, started_settings, unlinked_by
from safeimg.ops.repair import open_to_change
from safeimg.ops.session import DATA_FILE, touched
from safeimg.ops.steps import Move, Step

Action = Callable[[Image, Planner], Iterable[Changes]]
Settings = Mapping[str, Any]
SOURCE = "source"  # the role of an image that is only read


class Change:
    """The steps of `actions` on one image. `unlinked`: host ranges that earlier steps took a reference from."""

    def __init__(
        self,
        command: str,
        image: Image,
        actions: Sequence[Action],
        *,
        unlinked: Sequence[tuple[int, int]] = (),
        erased: Sequence[tuple[int, int]] = (),
    ) -> None:
        """`erased`: host ranges that hold what nobody may read any more once the actions have replaced them."""
        self._command = command
        self._image = image
        self._actions = actions
        self._unlinked = list(unlinked)
        self._erased = erased
        self._planner: Planner | None = None

    async def steps(self, cursor: Any | None) -> AsyncIterator[Step]:
        at = -1 if cursor is None else int(cursor["at"])
        if at < 0:
            fence = lookup(self._image.format).fence(self._image)
            yield Step("fence", {"at": 0}, 0, changes=[(0, fence)] if fence else [])
        for number in range(max(at, 0), len(self._actions)):
            image = self._reopened()
            self._plan_anew(image)
            assert self._planner is not None
            held: Changes | None = None
            for changes in self._actions[number](image, self._planner):
                if held is not None:  # planned anew, what is fresh would be written once more
                    yield await self._step(None if held.fresh else {"at": number}, held)
                held = changes
            if held is not None:
                yield await self._step({"at": number + 1}, held)
        if at <= len(self._actions):
            moves = [Move(0, *piece, None, 0) for piece in self._erased if self._is_free(*piece)]
            if moves:
                yield Step("erase", {"at": len(self._actions)}, 0, moves=moves, no_return=True)
            if self._planner is None:
                self._plan_anew(self._reopened())
            assert self._planner is not None
            changes = self._planner.release()
            if changes:
                yield Step("release", {"at": len(self._actions) + 1}, 0, changes=[(0, changes)])

    def _is_free(self, offset: int, length: int) -> bool:
        """Whether nothing refers to the range any more."""
        return any(start <= offset and offset + length <= start + size for start, size in self._unlinked)

    async def _step(self, cursor: Any, changes: Changes) -> Step:
        self._unlinked += changes.unlinked
        fresh = await blocking(write_fresh, self._image.file, changes.fresh)
        return Step(self._command, cursor, 0, fresh=fresh, changes=[(0, changes)])

    def _reopened(self) -> Image:
        """The same open file, its metadata read afresh."""
        return lookup(self._image.format).reopen(self._image)

    def _plan_anew(self, image: Image) -> None:
        self._planner = lookup(image.format).planner(image)
        self._planner.recall(self._unlinked)

    def finish(self) -> Sequence[tuple[int, Patch]]:
        """Takes the fence down."""
        return tuple((0, patch) for patch in lookup(self._image.format).unfence(self._reopened()))

    def discards(self) -> Sequence[tuple[int, int, int]]:
        """Space that nobody uses any more: (image, offset, length)."""
        return () if self._planner is None else tuple((0, *freed) for freed in self._planner.freed())


class Changing:
    """A command that changes one image by actions; implements `registry.Reopener`.

    `actions` makes them from the settings, which are JSON-like and come from a log when an operation is resumed: it
    raises `Conflict` for settings that make no sense. It gets the images that are only read besides, if there are."""

    def __init__(self, command: str, actions: Callable[..., Sequence[Action]]) -> None:
        self._command = command
        self._actions = actions

    async def run(
        self,
        environment: Environment,
        filename: str | Blockdev,
        settings: Settings,
        *,
        fmt: str | None = None,
        cache: str = "writeback",
        warn: Callable[[str], None] | None = None,
        sources: Sequence[tuple[str | Blockdev, str | None]] = (),
        check: Callable[..., bool | None] = lambda *images: None,
        backing: bool = False,
    ) -> None:
        """Changes the image. `sources`: names and formats of images that are read, each without its backing images.

        `check` may refuse the image, given with the sources, before anything is begun, or find that there is nothing
        to do (False); `backing` refuses an image whose backing image is not there. Raises what opening raises,
        `SomethingPending`, `OperationPaused`."""
        fs, secrets = environment.fs, environment.secrets
        layers = await open_to_change(
            environment, filename, fmt=fmt, cache=cache, warn=warn, backing=False, present=backing
        )
        try:
            for name, source_format in sources:
                layers += open_chain(fs, name, format=source_format, backing=False, secrets=secrets)
            if check(*layers) is not False:
                names = zip([name for name, _ in sources], layers[1:], strict=True)
                opened = {
                    "cache": cache, "format": layers[0].format,
                    "options": lasting(without_backing(filename), fs.resolve),
                    "sources": [[image.format, lasting(name, fs.resolve)] for name, image in names],
                }  # fmt: skip
                await launch(self._job(layers, {**settings, **opened}), environment)
        finally:
            close_chain(layers)

    def open_layers(self, fs: FileSystem, home: str, state: OperationState, secrets: Secrets) -> list[Image]:
        """See `registry.Reopener`."""
        settings = _settings(home, state)
        layers = reopen_home(fs, home, settings, secrets)
        try:
            folder = os.path.dirname(fs.resolve(home))
            paths = [image.path for image in state.declared.images if image.role == SOURCE]
            for path, (fmt, options) in zip(paths, settings["sources"], strict=True):
                name = recalled(options, os.path.join(folder, path))
                layers += open_chain(fs, name, format=fmt, backing=False, secrets=secrets)
        except BaseException:
            close_chain(layers)
            raise
        return layers

    def make_job(self, layers: list[Image], state: OperationState, environment: Environment) -> Job:
        """See `registry.Reopener`."""
        settings = _settings(layers[0].file.path, state)
        return self._job(layers, settings, unlinked=unlinked_by(state))

    def _job(self, layers: list[Image], settings: Settings, unlinked: Sequence[tuple[int, int]] = ()) -> Job:
        image = layers[0]
        operation = Change(
            self._command, image, self._actions(settings, *layers[1:]), unlinked=unlinked,
            erased=_erased(image.file.path, settings),
        )  # fmt: skip
        files = touched([("image", image, True), *((SOURCE, source, False) for source in layers[1:])])
        return Job(self._command, operation, files, layers, None, settings)


def _erased(home: str, settings: Settings) -> list[tuple[int, int]]:
    found = settings.get("erased", [])
    if not isinstance(found, list) or not all(
        isinstance(piece, list) and len(piece) == 2 and all(type(number) is int and number > 0 for number in piece)
        for piece in found
    ):
        raise Conflict(f"{home}: the log does not say what was to be erased")
    return [(offset, length) for offset, length in found]


def _settings(home: str, state: OperationState) -> Settings:
    """What the operation was started with, checked: it comes from a file."""
    settings = started_settings(home, state, {"cache": str, "format": str})
    sources = settings.get("sources")
    images = [image.role for image in state.declared.images if image.role != DATA_FILE]
    if (
        not are_options(settings.get("options"))
        or not isinstance(sources, list)
        or not all(_is_source(source) for source in sources)
        or images != ["image"] + [SOURCE] * len(sources)
    ):
        raise Conflict(f"{home}: the log's images do not fit a {state.declared.command}")
    return settings


def _is_source(value: object) -> bool:
    match value:
        case [str(), options]:
            return are_options(options)
    return False
