"""What a row of actions on persistent bitmaps comes to: which bitmaps the image has afterwards (`plan`).

The actions are judged one after the other, in qemu-img's order and with its messages, before anything is changed:
if one is refused, none is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.features import BitmapBits, BitmapState, WantedBitmap, inconsistent
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.records import NamedTuple

NODE = "#block100"  # what QEMU calls an image, which it opens after its file; it makes the last two digits up
FILE_NODE = "#block000"  # …and a file that it opens without a format
KINDS = ("add", "remove", "clear", "enable", "disable", "merge")


class BitmapAction(NamedTuple):
    """One change of the bitmap `name`."""

    kind: str  # of KINDS
    name: str
    granularity: int = 0  # add: bytes a bit stands for; 0: the default
    source: str = ""  # merge: the bitmap whose bits are set besides


class ActionRefused(UsageError):
    """An action that cannot be done; the message is that of `qemu-img bitmap`."""

    def __init__(self, action: BitmapAction, reason: str) -> None:
        self.action = action
        self.reason = reason
        super().__init__(f"Operation {action.kind} on bitmap {action.name} failed: {reason}")


def listed(image: Image) -> Sequence[BitmapState]:
    """The image's bitmaps; none where its format has no such thing."""
    feature = lookup(image.format).bitmaps
    return () if feature is None else feature.listed(image)


def plan(
    image: Image, actions: Sequence[BitmapAction], source: Image | None = None, *, node: str = NODE
) -> list[WantedBitmap]:
    """The bitmaps of `image` once `actions` are done. `source`: the image whose bitmaps are merged, if not this one.
    `node`: what QEMU would call the image.

    Raises `ActionRefused`, and `FormatError` for damaged bitmaps."""
    steps: dict[str, Callable[[_Plan, BitmapAction], None]] = {
        "add": _Plan.add, "remove": _Plan.remove, "clear": _Plan.clear, "enable": _Plan.enable,
        "disable": _Plan.disable, "merge": _Plan.merge,
    }  # fmt: skip
    result = _Plan(image, source, node)
    for action in actions:
        steps[action.kind](result, action)
    return list(result.wanted.values())


class _Plan:
    """`wanted`: the bitmaps by name, after the actions so far."""

    def __init__(self, image: Image, source: Image | None, node: str) -> None:
        self._image = image
        self._source = source
        self._node = node
        self.wanted = {state.name: WantedBitmap(state, True) for state in listed(image)}

    def add(self, action: BitmapAction) -> None:
        name = action.name
        granularity = action.granularity or min(max(self._image.cluster_size, 4096), 65536)
        if not name:
            raise ActionRefused(action, "Bitmap name cannot be empty")
        if granularity & (granularity - 1) or not 512 <= granularity < 1 << 32:
            raise ActionRefused(action, "Granularity must be power of 2 and at least 512")
        feature = lookup(self._image.format).bitmaps
        if feature is None:
            reason = f"Can't store persistent bitmaps to {self._node}: Operation not supported"
            raise ActionRefused(action, reason)
        if name in self.wanted:
            raise ActionRefused(action, f"Bitmap already exists: {name}")
        refusal = feature.refusal(self._image, name, granularity)
        if refusal is not None:
            raise ActionRefused(action, f"Can't make bitmap '{name}' persistent in '{self._node}': {refusal}")
        self.wanted[name] = WantedBitmap(BitmapState(name, granularity, True, False), False)

    def remove(self, action: BitmapAction) -> None:
        self._find(action)
        del self.wanted[action.name]

    def clear(self, action: BitmapAction) -> None:
        self.wanted[action.name] = WantedBitmap(self._usable(action).state, False)

    def enable(self, action: BitmapAction) -> None:
        self._set(action, True)

    def disable(self, action: BitmapAction) -> None:
        self._set(action, False)

    def _set(self, action: BitmapAction, enabled: bool) -> None:
        found = self._usable(action)
        self.wanted[action.name] = found._replace(state=found.state._replace(enabled=enabled))

    def merge(self, action: BitmapAction) -> None:
        target = self._find(action)
        image = self._source or self._image
        if self._source is None:
            states = {name: wanted.state for name, wanted in self.wanted.items()}
        else:
            states = {state.name: state for state in listed(self._source)}
        if action.source not in states:
            raise ActionRefused(action, f"Dirty bitmap '{action.source}' not found")
        for state in (target.state, states[action.source]):
            _refuse_inconsistent(action, state)
        if image is self._image and action.source == action.name:
            return
        if image.size != self._image.size:
            sizes = f"destination size is {self._image.size}, source size is {image.size}"
            raise ActionRefused(action, f"Bitmaps are of different sizes ({sizes}) and can't be merged")
        self.wanted[action.name] = target._replace(merged=(*target.merged, self._bits(image, action.source)))

    def _bits(self, image: Image, name: str) -> BitmapBits:
        feature = lookup(image.format).bitmaps
        assert feature is not None  # it has this bitmap
        return feature.bits(image, name)

    def _find(self, action: BitmapAction) -> WantedBitmap:
        if action.name not in self.wanted:
            raise ActionRefused(action, f"Dirty bitmap '{action.name}' not found")
        return self.wanted[action.name]

    def _usable(self, action: BitmapAction) -> WantedBitmap:
        found = self._find(action)
        _refuse_inconsistent(action, found.state)
        return found


def _refuse_inconsistent(action: BitmapAction, state: BitmapState) -> None:
    if state.inconsistent:
        raise ActionRefused(action, inconsistent(state.name))
