"""measure: how large the file of a new image will be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import Image
from safeimg.drivers.formats.chain import close_chain, open_chain
from safeimg.drivers.formats.features import Measured, Measuring
from safeimg.drivers.formats.naming import Blockdev, protocol_driver
from safeimg.drivers.formats.snapshots import load
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.ops.create import format_driver
from safeimg.ops.create_options import parse_options
from safeimg.ops.map import blocks


def measure_size(
    size: int, target_format: str, options: Sequence[str], *, secrets: Secrets = NO_SECRETS
) -> Measured:
    """For an empty image of `size` bytes. `UsageError` in qemu-img's words."""
    measuring, values = _target(target_format, options)
    return measuring.measure(size, values, None, None, secrets)


def measure_image(
    fs: FileSystem,
    filename: str | Blockdev,
    target_format: str,
    options: Sequence[str],
    *,
    fmt: str | None = None,
    snapshot: str | None = None,
    force_share: bool = False,
    secrets: Secrets = NO_SECRETS,
) -> Measured:
    """For a copy of an image, or of one of its snapshots. Raises what opening raises, and `UsageError`."""
    layers = open_chain(fs, filename, format=fmt, force_share=force_share, secrets=secrets)
    try:
        shown = layers if snapshot is None else load(layers, snapshot, protocol_driver(filename, fmt))
        measuring, values = _target(target_format, options)
        top = shown[0]
        return measuring.measure(top.size, values, _data(shown), layers[0], secrets)
    finally:
        close_chain(layers)


def _target(name: str, options: Sequence[str]) -> tuple[Measuring, dict[str, str]]:
    driver = format_driver(name)
    try:
        values = parse_options(driver.create_options, options)
    except UsageError as error:
        raise UsageError(str(error), f"Invalid options for file format '{name}'") from error
    if driver.measuring is None:
        raise UsageError(f"Block driver '{name}' does not support size measurement")
    return driver.measuring, values


def _data(layers: Sequence[Image]) -> Iterator[tuple[int, int]]:
    """The guest ranges (start, length) that hold data, in order."""
    for entry in blocks(layers, 0, layers[0].size):
        if entry.data and not entry.zero:
            yield entry.start, entry.length
