"""bitmap: adds, removes and changes the persistent bitmaps of an image.

However many actions there are, they are one change of the image: all new tables, then one switch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from safeimg.drivers.formats.api import Changes, Image, Planner
from safeimg.drivers.formats.features import WantedBitmap
from safeimg.drivers.formats.naming import Blockdev, protocol_driver
from safeimg.drivers.formats.registry import lookup
from safeimg.ops.bitmap_plan import FILE_NODE, KINDS, NODE, BitmapAction, listed, plan
from safeimg.ops.change import Action, Changing, Settings
from safeimg.ops.errors import Conflict
from safeimg.ops.launch import Environment


async def change_bitmaps(
    environment: Environment,
    filename: str | Blockdev,
    actions: Sequence[BitmapAction],
    *,
    fmt: str | None = None,
    source: str | None = None,
    source_format: str | None = None,
    warn: Callable[[str], None] | None = None,
    complain: Callable[[str], None] = lambda message: None,
) -> None:
    """Does all of the actions, or none. `source`: the image whose bitmaps are merged, if not this one.

    `complain` gets QEMU's message about bitmaps that it cannot store and that are no error (the command succeeds).
    Raises `ActionRefused`, and what `Changing.run` raises."""

    def check(image: Image, *sources: Image) -> bool:
        node = NODE if protocol_driver(filename, fmt) is None else FILE_NODE
        wanted = plan(image, actions, *sources, node=node)
        if not image.size and any(not bitmap.kept for bitmap in wanted):
            complain(f"Lost persistent bitmaps during inactivation of node '{node}': No memory")
            return False
        if wanted == [WantedBitmap(state, True) for state in listed(image)]:
            return False
        _rehearse(image, wanted)
        return True

    sources: list[tuple[str | Blockdev, str | None]] = [] if source is None else [(source, source_format)]
    settings = {"actions": [list(action) for action in actions]}
    await _changing.run(environment, filename, settings, fmt=fmt, warn=warn, sources=sources, check=check)


def _actions(settings: Settings, *sources: Image) -> Sequence[Action]:
    recorded = settings.get("actions")
    if not isinstance(recorded, list) or len(sources) > 1:
        raise Conflict("the log does not say what was to be done to which bitmaps")
    actions = [_action(fields) for fields in recorded]

    def store(image: Image, planner: Planner) -> Iterable[Changes]:
        return storing(image, planner, plan(image, actions, *sources))

    return [store]


def _rehearse(image: Image, wanted: Sequence[WantedBitmap]) -> None:
    """Plans it all once and forgets it: what a damaged image or a full header does not allow is refused before
    anything is begun."""
    driver = lookup(image.format)
    if driver.bitmaps is not None:
        for _ in driver.bitmaps.store(image, driver.planner(image), wanted):
            pass


def storing(image: Image, planner: Planner, wanted: Sequence[WantedBitmap]) -> Iterable[Changes]:
    """The changes that make `wanted` the bitmaps of the image."""
    feature = lookup(image.format).bitmaps
    if feature is None:
        raise Conflict(f"{image.file.path}: {image.format} images have no bitmaps")
    return feature.store(image, planner, wanted)


def _action(fields: object) -> BitmapAction:
    match fields:
        case [str(kind), str(name), int(granularity), str(source)] if kind in KINDS:
            return BitmapAction(kind, name, granularity, source)
    raise Conflict("the log does not say what was to be done to which bitmaps")


_changing = Changing("bitmap", _actions)
open_layers, make_job = _changing.open_layers, _changing.make_job
