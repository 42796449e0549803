"""check: what is wrong with an image's metadata."""

from __future__ import annotations

from safeimg.drivers.errors import UnsupportedError
from safeimg.drivers.formats.api import CheckResult, Image
from safeimg.drivers.formats.chain import OpenError, close_chain, only_top, open_chain, refuse_locked
from safeimg.drivers.formats.naming import Blockdev, text_of
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import FileSystem


class Checked(NamedTuple):
    """The result for one image."""

    format: str
    result: CheckResult | None  # None: the format has no checks


def check(
    fs: FileSystem,
    filename: str | Blockdev,
    *,
    fmt: str | None = None,
    cache: str = "writeback",
    force_share: bool = False,
    secrets: Secrets = NO_SECRETS,
) -> Checked:
    """Checks the top image of a chain; its backing images have to open, as in qemu-img. `DriverError`."""
    layers = open_chain(
        fs, filename, format=fmt, cache=cache, force_share=force_share, repair=only_top, secrets=secrets
    )
    try:
        refuse_locked(layers[0], filename, secrets)
        return Checked(layers[0].format, checked(layers[0], filename))
    finally:
        close_chain(layers)


def checked(image: Image, filename: str | Blockdev) -> CheckResult | None:
    """The result for an open image; None if its format has no checks."""
    try:
        return lookup(image.format).check(image)
    except UnsupportedError as error:
        raise OpenError(f"Could not open '{text_of(filename)}': {error}") from error
