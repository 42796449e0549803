"""rebase: another backing image for an image, which then shows the same (safe) or what is there now (unsafe)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from safeimg.drivers.errors import DriverError, UsageError
from safeimg.drivers.formats.api import Changes, Image, Planner
from safeimg.drivers.formats.chain import backing_filename, close_chain, open_chain
from safeimg.drivers.formats.naming import (
    Blockdev,
    are_options,
    from_argument,
    lasting,
    protocol,
    without_backing,
)
from safeimg.drivers.formats.registry import lookup, names
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.drivers.transfer.core import Transfer
from safeimg.journal.state import OperationState
from safeimg.ops.change import Action, Changing, Settings
from safeimg.ops.errors import Conflict
from safeimg.ops.filling import STEP_BYTES
from safeimg.ops.info import shown_chain
from safeimg.ops.launch import Environment, Job, launch
from safeimg.ops.rebase_safe import Rebase, refused, set_backing
from safeimg.ops.reopening import reopen_home, started_settings, unlinked_by
from safeimg.ops.repair import open_to_change
from safeimg.ops.session import touched

Warn = Callable[[str], None]


async def rebase_unsafe(
    environment: Environment,
    filename: str | Blockdev,
    backing: str | None,
    backing_format: str | None,
    *,
    fmt: str | None = None,
    cache: str = "writeback",
    warn: Warn | None = None,
) -> None:
    """Changes the backing image's name alone (None or "": no backing image); the guest content changes with it."""
    settings = {"safe": False, "backing": backing or None, "backing_format": backing_format}

    def check(image: Image) -> None:
        _check_format(backing_format)
        _check(image, backing, backing_format)

    await _unsafe.run(environment, filename, settings, fmt=fmt, cache=cache, warn=warn, check=check)


async def rebase(
    environment: Environment,
    filename: str | Blockdev,
    backing: str,
    backing_format: str | None,
    *,
    fmt: str | None = None,
    cache: str = "writeback",
    warn: Warn | None = None,
    step_bytes: int = STEP_BYTES,
) -> None:
    """Changes the backing image ("": to none); what the new one does not show the same is copied before.

    Raises what opening raises, `UsageError` in qemu-img's words, `SomethingPending`, `OperationPaused`."""
    layers = await open_to_change(environment, filename, fmt=fmt, cache=cache, warn=warn, backing=True)
    try:
        old = len(layers) - 1
        _check_format(backing_format)
        if backing:
            _check_relative(layers, filename, fmt, backing)
            layers += _open_new(environment, layers[0].file.path, backing, backing_format)
        _check(layers[0], backing, backing_format)
        settings = {
            "safe": True, "backing": backing or None, "backing_format": backing_format, "old": old,
            "new": len(layers) - 1 - old, "cache": cache, "format": layers[0].format,
            "options": lasting(without_backing(filename), environment.fs.resolve), "step": step_bytes,
        }  # fmt: skip
        await launch(_job(layers, settings, environment.transfer), environment)
    finally:
        close_chain(layers)


def _check_relative(layers: Sequence[Image], filename: str | Blockdev, fmt: str | None, backing: str) -> None:
    """A relative name needs a file name that it could be relative to."""
    named = from_argument(filename, fmt) if isinstance(filename, str) else filename
    base = shown_chain(layers, named.options)
    if base.startswith("json:") and not backing.startswith(("/", "json:")) and protocol(backing) is None:
        raise UsageError(
            f"Could not resolve backing filename: Cannot use relative backing file names for '{base}'"
        )


def _open_new(
    environment: Environment, overlay: str, backing: str, backing_format: str | None
) -> list[Image]:
    """The new backing chain, found from where the overlay is."""
    name = backing_filename(overlay, backing)
    try:
        return open_chain(environment.fs, name, format=backing_format, steady=True, secrets=environment.secrets)
    except DriverError as error:
        reason = str(error).removeprefix(f"Could not open '{name}': ")
        raise UsageError(f"Could not open new backing file '{backing}': {reason}") from error


def _check(image: Image, backing: str | None, backing_format: str | None) -> None:
    if backing and backing_format is None:
        raise refused(backing, "backing format must be specified")
    feature = lookup(image.format).rebasing
    if feature is None:
        raise refused(backing, "Operation not supported")
    if backing and not feature.accepts(image, backing):
        raise refused(backing, "Invalid argument")


def _check_format(name: str | None) -> None:
    if name is not None and name not in names():
        raise UsageError(f"Invalid format name: '{name}'")


def _actions(settings: Settings) -> Sequence[Action]:
    backing, backing_format = _names(settings)

    def switch(image: Image, planner: Planner) -> Iterable[Changes]:
        return set_backing(image, planner, backing, backing_format)

    return [switch]


def _names(settings: Settings) -> tuple[str | None, str | None]:
    backing, backing_format = settings.get("backing"), settings.get("backing_format")
    if not isinstance(backing, str | None) or not isinstance(backing_format, str | None):
        raise Conflict("the log does not say which backing image the rebase was for")
    return backing, backing_format


_unsafe = Changing("rebase", _actions)


def open_layers(fs: FileSystem, home: str, state: OperationState, secrets: Secrets) -> list[Image]:
    """See `registry.Reopener`."""
    if state.started is None or not state.started.settings.get("safe"):
        return _unsafe.open_layers(fs, home, state, secrets)
    settings = _settings(home, state)
    layers = reopen_home(fs, home, settings, secrets)
    try:
        # The overlay may name either backing image by now.
        for count in (settings["old"], settings["new"]):
            if count:
                record = state.declared.images[len(layers)]
                path = os.path.join(os.path.dirname(home), record.path)
                chain = open_chain(fs, path, format=record.format, steady=True, secrets=secrets)
                layers += chain
                if len(chain) != count:
                    raise Conflict(f"{path}: its backing chain is not as it was when the rebase began")
        return layers
    except BaseException:
        close_chain(layers)
        raise


def make_job(layers: list[Image], state: OperationState, environment: Environment) -> Job:
    """See `registry.Reopener`."""
    if state.started is None or not state.started.settings.get("safe"):
        return _unsafe.make_job(layers, state, environment)
    settings = _settings(layers[0].file.path, state)
    return _job(layers, settings, environment.transfer, unlinked=unlinked_by(state))


def _settings(home: str, state: OperationState) -> dict[str, Any]:
    """What the operation was started with, checked: it comes from a file."""
    kinds = {"old": int, "new": int, "cache": str, "format": str, "step": int}
    settings = started_settings(home, state, kinds, "rebase")
    _names(settings)
    old, new, step = settings["old"], settings["new"], settings["step"]
    if min(old, new) < 0 or step < 1 or not are_options(settings.get("options")) or (
        len(state.declared.images) < 1 + old + new
    ):
        raise Conflict(f"{home}: the log's images do not fit a rebase")
    return settings


def _job(
    layers: list[Image], settings: Settings, transfer: Transfer, *, unlinked: Sequence[tuple[int, int]] = ()
) -> Job:
    old = settings["old"]
    operation = Rebase(
        layers, old, transfer, settings["backing"], settings["backing_format"], unlinked=unlinked,
        step_bytes=settings["step"],
    )  # fmt: skip
    roles = ["overlay"] + ["old backing"] * old + ["new backing"] * (len(layers) - 1 - old)
    files = touched([(role, image, role == "overlay") for role, image in zip(roles, layers, strict=True)])
    return Job("rebase", operation, files, layers, operation.view, settings, total=operation.total())
