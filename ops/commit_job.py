"""Opening the images of a commit: from the command's arguments, or again from the log."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from safeimg.drivers.errors import DriverError, StorageError, UnsupportedError, UsageError
from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.chain import (
    backing_filename,
    close_chain,
    local_path,
    look_at,
    open_chain,
    try_open,
)
from safeimg.drivers.formats.naming import Blockdev, are_options, lasting, protocol, recalled, text_of
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.view import View
from safeimg.journal.state import OperationState
from safeimg.ops.commit import Commit
from safeimg.ops.errors import Conflict
from safeimg.ops.filling import STEP_BYTES
from safeimg.ops.launch import Environment, Job, launch
from safeimg.ops.reopening import started_settings, unlinked_by
from safeimg.ops.repair import open_sound
from safeimg.ops.session import DATA_FILE, refuse_pending_on, touched


async def commit(
    environment: Environment,
    filename: str | Blockdev,
    *,
    base: str | None = None,
    fmt: str | None = None,
    drop: bool = False,
    cache: str = "writeback",
    undo: bool = True,
    step_bytes: int = STEP_BYTES,
    warn: Callable[[str], None] | None = None,
    begun: Callable[[], None] = lambda: None,
    emptying_failed: Callable[[], None] = lambda: None,
) -> None:
    """Commits `filename` into its backing image, or into `base` further down (which implies `drop`).

    `drop`: the committed image keeps its content. `begun` is called once the images are open, `emptying_failed` when
    a call failed as the base had everything and the committed image was being emptied. Raises what opening raises,
    `SomethingPending`, `OperationPaused`, `StorageError`."""
    job = await open_sound(
        environment,
        lambda: open_job(
            environment.fs, filename, environment.transfer, base=base, fmt=fmt, drop=drop or base is not None,
            cache=cache, undo=undo, step_bytes=step_bytes, warn=warn, begun=begun,
            secrets=environment.secrets,
        ),
    )  # fmt: skip
    try:
        await launch(job, environment)
    except StorageError:
        if isinstance(job.operation, Commit) and job.operation.emptying:
            emptying_failed()
        raise
    finally:
        job.close()


def open_job(
    fs: FileSystem,
    filename: str | Blockdev,
    transfer: Transfer,
    *,
    base: str | None,
    fmt: str | None,
    drop: bool,
    cache: str,
    undo: bool,
    step_bytes: int,
    warn: Callable[[str], None] | None = None,
    begun: Callable[[], None] = lambda: None,
    secrets: Secrets = NO_SECRETS,
) -> Job:
    """The chain is opened twice: read-only to find the base, and what may be pending there; then the base and the top
    for writing, which a pending operation's fence would refuse in less helpful words."""
    layers = look_at(fs, filename, format=fmt, cache=cache, warn=warn, secrets=secrets)
    depth = _depth(fs, layers, base)
    if depth is None:  # told once the image is open for writing
        try_open(fs, filename, format=fmt, cache=cache, warn=warn, secrets=secrets)
        begun()
        raise UsageError(f"Did not find '{base}' in the backing chain of '{text_of(filename)}'")
    layers = open_chain(
        fs, filename, format=fmt, write=lambda level, _: level in (0, depth), cache=cache, warn=warn,
        secrets=secrets,
    )  # fmt: skip
    begun()
    try:
        if depth >= len(layers):
            raise UsageError("Image does not have a backing file")
        _check_growth(layers, depth)
        settings = {
            "base": depth, "drop": drop, "cache": cache, "format": layers[0].format, "step": step_bytes,
            "options": lasting(filename, fs.resolve),
        }  # fmt: skip
        return _job(layers, settings, transfer, undo=undo, unlinked=())
    except BaseException:
        close_chain(layers)
        raise


def _check_growth(layers: Sequence[Image], depth: int) -> None:
    """A base that cannot grow is refused before anything has begun, in qemu-img's words; so is one that would show
    something else than zeroes where the layers above it hold nothing (qemu-img commits all the same)."""
    top, base = layers[0], layers[depth]
    if top.size <= base.size:
        return
    planner = lookup(base.format).planner(base)
    try:
        planner.prepare_resize(top.size)
    except UnsupportedError as error:
        raise UsageError("Block job failed: Operation not supported") from error
    above = View(layers[:depth])
    for start, length in planner.noise(top.size):
        if any(layer == depth for layer, _ in above.extents(start, length)):
            raise UsageError(
                f"Block job failed: {base.file.path} is smaller than its overlay and would read as noise where it grows"
            )


def open_layers(fs: FileSystem, home: str, state: OperationState, secrets: Secrets) -> list[Image]:
    """See `registry.Reopener`."""
    settings = _settings(home, state)
    top = os.path.join(os.path.dirname(home), state.declared.images[1].path)
    layers = open_chain(
        fs, recalled(settings["options"], top), format=settings["format"],
        write=lambda level, _: level in (0, settings["base"]), cache=settings["cache"], repair=True, secrets=secrets,
    )  # fmt: skip
    if len(layers) <= settings["base"]:
        close_chain(layers)
        raise Conflict(f"{top}: its backing chain is shorter than when the commit began")
    return layers


def make_job(layers: list[Image], state: OperationState, environment: Environment) -> Job:
    """See `registry.Reopener`."""
    settings = _settings(layers[-1].file.path, state)
    undo = state.started is not None and state.started.undo
    return _job(layers, settings, environment.transfer, undo=undo, unlinked=unlinked_by(state))


def _settings(home: str, state: OperationState) -> dict[str, Any]:
    """What the operation was started with, checked: it comes from a file."""
    kinds = {"base": int, "drop": bool, "cache": str, "format": str, "step": int}
    settings = started_settings(home, state, kinds, "commit")
    images = [image for image in state.declared.images if image.role != DATA_FILE]
    if len(images) != settings["base"] + 1 or settings["base"] < 1 or settings["step"] < 1 or (
        not are_options(settings.get("options"))
    ):
        raise Conflict(f"{home}: the log's images do not fit a commit")
    return settings


def _job(
    layers: list[Image],
    settings: dict[str, Any],
    transfer: Transfer,
    *,
    undo: bool,
    unlinked: Sequence[tuple[int, int]],
) -> Job:
    depth = settings["base"]
    operation = Commit(
        layers, depth, transfer, drop=settings["drop"], unlinked=unlinked, step_bytes=settings["step"]
    )
    roles = ["base", "overlay"] + ["between"] * (depth - 1)
    images = touched(
        (role, image, role != "between") for role, image in zip(roles, operation.images, strict=True)
    )
    return Job(
        "commit", operation, images, layers, operation.view, settings, undo=undo, total=operation.total()
    )


def _depth(fs: FileSystem, layers: list[Image], base: str | None) -> int | None:
    """How far down the chain the image called `base` is (None: nowhere); 1 without a name. Closes the chain. Raises
    `SomethingPending` for it or the top."""
    try:
        depth = 1 if base is None else _find(fs, layers, base)
        for layer in (layers[0], *(() if depth is None else layers[depth : depth + 1])):
            refuse_pending_on(fs, layer.file.path)
        return depth
    finally:
        close_chain(layers)


def _find(fs: FileSystem, layers: Sequence[Image], base: str) -> int | None:
    """As QEMU: a relative name starts at the folder of the image above, as it does where an image names its backing
    image, and not at the current one."""
    for depth, image in enumerate(layers[1:], start=1):
        overlay = layers[depth - 1]
        named = overlay.backing_file or ""
        if base in (image.file.path, named) and protocol(base) is not None:
            return depth
        if protocol(named) is not None or named.startswith("json:"):  # which is no path
            continue
        if _resolved(fs, backing_filename(overlay.file.path, base)) == _resolved(fs, image.file.path):
            return depth
    return None


def _resolved(fs: FileSystem, name: str) -> str:
    try:
        return fs.resolve(local_path(name))
    except DriverError:
        return name
