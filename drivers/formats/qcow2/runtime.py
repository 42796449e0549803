"""What a qcow2 image can be told when it is opened (QEMU's `-blockdev driver=qcow2,…`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from errno import ENOENT
from typing import Any

from safeimg.drivers.errors import StorageError, UsageError
from safeimg.drivers.formats.api import Opening, RuntimeOption
from safeimg.drivers.formats.chain import backing_filename
from safeimg.drivers.formats.naming import below, from_filename
from safeimg.drivers.formats.qcow2.image import Qcow2Image
from safeimg.drivers.storage.api import File

DATA_FILE = "data-file"

RUNTIME_OPTIONS = (
    *map(RuntimeOption, ("lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other")),
    *(RuntimeOption(name, "size")
      for name in ("cache-size", "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size")),
    RuntimeOption("cache-clean-interval", "num"),
    RuntimeOption("overlap-check", "str"),
    RuntimeOption("overlap-check.template", "str"),
    *(RuntimeOption(f"overlap-check.{part}")
      for part in ("main-header", "active-l1", "active-l2", "refcount-table", "refcount-block", "snapshot-table",
                   "inactive-l1", "inactive-l2", "bitmap-directory")),
    RuntimeOption(DATA_FILE, "file", strong=True),
    RuntimeOption("encrypt.format", "str", strong=True),
    RuntimeOption("encrypt.key-secret", "str", strong=True),
)  # fmt: skip

_OVERLAP_CHECKS = ("none", "constant", "cached", "all")


def apply_runtime(image: Qcow2Image, given: Opening, *, repair: bool) -> None:
    """Unlocks an encrypted image, and refuses values that make no sense. Other options ask for nothing that a program
    as brief as this one has."""
    for name in ("overlap-check", "overlap-check.template"):
        value = given.options.get(name, "all")
        if value not in _OVERLAP_CHECKS:
            raise UsageError(
                f"Unsupported value '{value}' for qcow2 option 'overlap-check'. Allowed are any of the following: "
                f"{', '.join(_OVERLAP_CHECKS)}"
            )
    entry = given.options.get("l2-cache-entry-size", image.cluster_size)
    if not isinstance(entry, int) or not 512 <= entry <= image.cluster_size or entry & (entry - 1):
        raise UsageError(
            "L2 cache entry size must be a power of two between 512 and the cluster size "
            f"({image.cluster_size})"
        )
    if given.options.get("lazy-refcounts") and image.header.version < 3:
        raise UsageError("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
    _attach(image, given)
    secret = given.options.get("encrypt.key-secret")
    if image.cipher is not None and given.open_file is not None:
        # Recovery takes steps back without a secret; the log still names the one that there was.
        known = isinstance(secret, str) and (not repair or secret in given.secrets)
        image.unlock_with(given.secrets, str(secret) if known else None)
    if image.cipher is None and "encrypt.format" in given.options:
        raise UsageError(
            f"No encryption in image header, but options specified format '{given.options['encrypt.format']}'"
        )


def _attach(image: Qcow2Image, given: Opening) -> None:
    """Opens the external data file: the one given, or the one that the image names."""
    header, wanted = image.header, given.files.get(DATA_FILE)
    if not header.has_data_file:
        if wanted is not None:
            raise UsageError("'data-file' can only be set for images with an external data file")
        if header.data_file_is_raw and given.open_file is not None:
            raise UsageError("data-file-raw requires a data file")
        return
    if given.open_file is None:
        return
    if wanted is None:
        if not header.data_file:
            raise UsageError("'data-file' is required for this image")
        image.attach(_open_named(given.open_file, image.file.path, header.data_file))
        return
    image.attach(given.open_file(wanted))


def _open_named(open_file: Callable[[Mapping[str, Any]], File], image: str, name: str) -> File:
    """The data file that an image names: as in QEMU it is looked for from here; where it is not, beside the image."""
    try:
        return open_file(below(from_filename(name).options, "file"))
    except StorageError as missing:
        beside = backing_filename(image, name)
        if missing.errno != ENOENT or beside == name:
            raise
        try:
            return open_file(below(from_filename(beside).options, "file"))
        except StorageError:
            raise missing from None
