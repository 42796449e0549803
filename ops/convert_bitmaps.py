"""convert --bitmaps: the persistent bitmaps of the source's top image, in the target."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import Driver, Image
from safeimg.drivers.formats.features import BitmapState, WantedBitmap
from safeimg.drivers.formats.registry import lookup
from safeimg.ops.bitmap_plan import ActionRefused, BitmapAction, listed, plan


def check_source(chains: Sequence[Sequence[Image]], skip_broken: bool, warn: Callable[[str], None]) -> None:
    """Refuses sources whose bitmaps cannot be copied, in qemu-img's words; `warn` gets those that are left out."""
    if len(chains) > 1:
        raise UsageError("Copying bitmaps only possible with single source")
    source = chains[0][0]
    feature = lookup(source.format).bitmaps
    if feature is None or not feature.supported(source):
        raise UsageError("Source lacks bitmap support")
    for state in reversed(listed(source)):
        if state.inconsistent and not skip_broken:
            raise UsageError(
                f"Cannot copy inconsistent bitmap '{state.name}'\n"
                "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
            )
        if state.inconsistent:
            warn(f"Skipping inconsistent bitmap '{state.name}'")


def check_target(driver: Driver, target: Image | None = None) -> None:
    """Refuses a target that has no place for bitmaps. `target`: the image, once it is open."""
    if driver.bitmaps is None or (target is not None and not driver.bitmaps.supported(target)):
        raise UsageError(f"Format driver '{driver.name}' does not support bitmaps")


def with_copies(target: Image, source: Image) -> list[WantedBitmap]:
    """The bitmaps of `target` once it has those of `source` too, but for inconsistent ones.

    Raises `UsageError` in qemu-img's words if it cannot have them."""
    copied = [state for state in listed(source) if not state.inconsistent]
    try:
        wanted = plan(target, [action for state in reversed(copied) for action in _copy(state)], source)
    except ActionRefused as error:
        what = "create" if error.action.kind == "add" else "populate"
        raise UsageError(f"Failed to {what} bitmap {error.action.name}: {error.reason}") from None
    first = len(listed(target))
    return wanted[:first] + wanted[first:][::-1]


def _copy(state: BitmapState) -> list[BitmapAction]:
    actions = [BitmapAction("add", state.name, state.granularity)]
    if not state.enabled:
        actions.append(BitmapAction("disable", state.name))
    return [*actions, BitmapAction("merge", state.name, source=state.name)]
