"""Digests of what images show (`--digest`): on record when an operation ends, compared by `audit verify`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.chain import backing_filename, close_chain, open_chain
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.drivers.transfer.content import content_digest
from safeimg.drivers.transfer.core import Transfer
from safeimg.drivers.transfer.view import View


async def digest_of(
    fs: FileSystem, image: Image, secrets: Secrets, transfer: Transfer, look_up: Callable[[], None] = lambda: None
) -> bytes:
    """Of what an open image shows now, its metadata read afresh, with its backing images. `look_up`: see
    `content_digest`. Raises what opening the backing images raises."""
    own = lookup(image.format).reopen(image)
    below: Sequence[Image] = ()
    if own.backing_file is not None:
        name = backing_filename(own.file.path, own.backing_file)
        below = open_chain(fs, name, format=own.backing_format, force_share=True, secrets=secrets)
    try:
        return await content_digest(View([own, *below]), Transfer(transfer.settings), look_up)
    finally:
        close_chain([*below])


async def digest_at(fs: FileSystem, path: str, format: str) -> bytes:
    """Of what the image at `path` shows. Raises what opening it raises."""
    layers = open_chain(fs, path, format=format)
    try:
        return await content_digest(View(layers), Transfer())
    finally:
        close_chain(layers)
