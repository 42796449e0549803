"""rebase: another backing image for an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import Changes, Image, Planner
from safeimg.drivers.formats.registry import lookup
from safeimg.ops.change import Action, Changing, Settings
from safeimg.ops.errors import Conflict
from safeimg.ops.launch import Environment


async def rebase_unsafe(
    environment: Environment,
    filename: str,
    backing: str | None,
    backing_format: str | None,
    *,
    fmt: str | None = None,
    cache: str = "writeback",
    warn: Callable[[str], None] | None = None,
) -> None:
    """Changes the backing image's name alone (None: no backing image); the guest content changes with it."""
    settings = {"backing": backing, "backing_format": backing_format}
    await _unsafe.run(environment, filename, settings, fmt=fmt, cache=cache, warn=warn, check=_check)


def _check(image: Image) -> None:
    if lookup(image.format).rebasing is None:
        raise UsageError(f"Could not change the backing file of '{image.file.path}': Operation not supported")


def _actions(settings: Settings) -> Sequence[Action]:
    backing, backing_format = settings.get("backing"), settings.get("backing_format")
    if not isinstance(backing, str | None) or not isinstance(backing_format, str | None):
        raise Conflict("the log does not say which backing image the rebase was for")

    def set_backing(image: Image, planner: Planner) -> Iterable[Changes]:
        rebasing = lookup(image.format).rebasing
        if rebasing is None:
            raise Conflict(f"{image.file.path}: {image.format} images have no backing image")
        return rebasing.set_backing(image, planner, backing, backing_format)

    return [set_backing]


_unsafe = Changing("rebase", _actions)
open_layers, make_job = _unsafe.open_layers, _unsafe.make_job
