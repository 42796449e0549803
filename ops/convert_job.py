"""A convert as a job: made from its settings and open images, at first or again from the log.

The job's layers are those of the target's chain, then those of each source's; `settings["layers"]` says how
many each has. Its images, as steps and the log number them: the target (0), then all layers of the sources,
then external data files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.formats.naming import are_options, recalled
from safeimg.drivers.formats.snapshots import load
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.part import PartialView
from safeimg.drivers.transfer.salvage import Salvaged
from safeimg.drivers.transfer.view import ConcatenatedView, Source, View
from safeimg.journal.state import OperationState
from safeimg.ops.convert_options import NO_WINDOW
from safeimg.ops.convert_steps import Convert, Policy
from safeimg.ops.convert_write import Compress
from safeimg.ops.errors import Conflict
from safeimg.ops.launch import Environment, Job
from safeimg.ops.reopening import started_settings, unlinked_by
from safeimg.ops.session import DATA_FILE, data_index, touched

_KINDS: dict[str, type | tuple[type, ...]] = {
    "layers": list, "formats": list, "options": list, "cache": str,
    "source_cache": str, "force_share": bool, "created": bool,
    "undo": bool, "compress": bool, "window": (int, type(None)), "bitmaps": bool, "salvage": bool,
    "sparse": int, "zero_below": int, "skip_below": int, "step_bytes": int,
    "step_seconds": (int, float), "defer": (int, float), "snapshot": (str, type(None)),
    "part": (list, type(None)),
}  # fmt: skip


def open_layers(fs: FileSystem, home: str, state: OperationState, secrets: Secrets) -> list[Image]:
    """See `registry.Reopener`."""
    settings = _settings(home, state)
    paths = [image.path for image in state.declared.images]
    found: list[Image] = []
    try:
        found += open_chain(
            fs, recalled(settings["options"][0], home), format=settings["formats"][0], write=True,
            cache=settings["cache"], repair=True, secrets=secrets,
        )  # fmt: skip
        _check_depth(home, len(found), settings["layers"][0])
        top = 1
        sources = zip(settings["layers"][1:], settings["formats"][1:], settings["options"][1:], strict=True)
        for depth, format, options in sources:
            path = os.path.join(os.path.dirname(home), paths[top])
            chain = open_chain(
                fs, recalled(options, path), format=format, cache=settings["source_cache"],
                force_share=settings["force_share"], steady=True, secrets=secrets,
            )  # fmt: skip
            found += chain
            _check_depth(path, len(chain), depth)
            if settings["snapshot"] is not None:
                found[-depth:] = load(chain, settings["snapshot"])
            top += depth
        return found
    except BaseException:
        close_chain(found)
        raise


def make_job(layers: list[Image], state: OperationState, environment: Environment) -> Job:
    """See `registry.Reopener`."""
    settings = _settings(layers[0].file.path, state)
    return job_of(layers, settings, environment.transfer, unlinked=unlinked_by(state))


def job_of(layers: Sequence[Image], settings: dict[str, Any], transfer: Transfer, *,
           unlinked: Sequence[tuple[int, int]] = ()) -> Job:
    """`unlinked`: by the steps that an earlier run has applied."""
    chains: list[Sequence[Image]] = []
    at = 0
    for depth in settings["layers"]:
        chains.append(layers[at : at + depth])
        at += depth
    target = chains[0]
    source, part = joined(chains[1:]), settings["part"]
    if part is not None:
        source = PartialView(source, *part)
    if settings["salvage"]:
        source = Salvaged(source, transfer.warn)
        source.survey()
    policy = Policy(
        sparse=settings["sparse"],
        compress=compressor(target[0], settings["window"]) if settings["compress"] else None,
        zero_below=settings["zero_below"],
        skip_below=settings["skip_below"],
        existing=not settings["created"],
        undo=settings["undo"],
        preallocate=settings["created"] and not target[0].data.stat().is_device,
        step_bytes=settings["step_bytes"],
        step_seconds=settings["step_seconds"],
    )
    roles = [("target", target[0], True)]
    roles += [("source" if layer is chain[0] else "backing", layer, False) for chain in chains[1:] for layer in chain]
    data_file = data_index([image for _, image, _ in roles], 0)
    operation = Convert(
        source, target, transfer, policy, data_file=data_file, unlinked=unlinked,
        bitmaps=chains[1][0] if settings["bitmaps"] else None,
    )  # fmt: skip
    created = tuple(dict.fromkeys((0, data_file))) if settings["created"] else ()
    return Job(
        "convert" if part is None else "dd", operation, touched(roles), layers, source, settings, undo=settings["undo"],
        defer=settings["defer"], created=created, total=source.size,
    )  # fmt: skip


def joined(chains: Sequence[Sequence[Image]]) -> Source:
    """What the sources show, one after the other."""
    views = [View(chain) for chain in chains]
    return views[0] if len(views) == 1 else ConcatenatedView(views)


def compressor(target: Image, window: int | None) -> Compress:
    """Compresses a cluster as the target wants it. `UsageError` if its format has no compressed clusters, or its
    compression no `window`."""
    from safeimg.drivers.formats.qcow2.image import Qcow2Image

    if not isinstance(target, Qcow2Image):
        raise UsageError("Compression not supported for this file format")
    from safeimg.drivers.formats.qcow2.compression import WINDOW, compress
    from safeimg.drivers.formats.qcow2.header import ZLIB

    kind = target.header.compression_type
    if window is not None and kind != ZLIB:
        raise UsageError(NO_WINDOW)
    packed: Callable[[memoryview], bytes | None] = partial(compress, kind, window=window or WINDOW)
    return packed


def _settings(home: str, state: OperationState) -> dict[str, Any]:
    """What the operation was started with, checked: it comes from a file."""
    from safeimg.drivers.formats.qcow2.compression import LARGE_WINDOW, WINDOW

    settings = started_settings(home, state, _KINDS, "convert")
    layers, formats = settings["layers"], settings["formats"]
    if (
        len(layers) < 2
        or not len(layers) == len(formats) == len(settings["options"])
        or not all(map(are_options, settings["options"]))
        or not all(isinstance(depth, int) and depth > 0 for depth in layers)
        or not all(isinstance(format, str) for format in formats)
        or sum(layers[1:]) != sum(image.role != DATA_FILE for image in state.declared.images) - 1
        or settings["step_bytes"] < 1
        or not _is_part(settings["part"])
        or settings["window"] not in (None, WINDOW, LARGE_WINDOW)
        or min(settings["sparse"], settings["zero_below"], settings["skip_below"]) < 0
    ):
        raise Conflict(f"{home}: the log's settings do not fit a convert")
    return settings


def _is_part(value: object) -> bool:
    return value is None or (
        isinstance(value, list | tuple) and len(value) == 2 and all(type(x) is int and x >= 0 for x in value)
    )


def _check_depth(path: str, found: int, expected: int) -> None:
    if found != expected:
        raise Conflict(f"{path}: its chain has {found} images; it had {expected} when the convert began")
