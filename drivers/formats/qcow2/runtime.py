"""What a qcow2 image can be told when it is opened (QEMU's `-blockdev driver=qcow2,…`)."""

from __future__ import annotations

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import Opening, RuntimeOption
from safeimg.drivers.formats.qcow2.image import Qcow2Image

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
    RuntimeOption("encrypt.format", "str", strong=True),
    RuntimeOption("encrypt.key-secret", "str", strong=True),
)  # fmt: skip

_OVERLAP_CHECKS = ("none", "constant", "cached", "all")


def apply_runtime(image: Qcow2Image, given: Opening) -> None:
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
    secret = given.options.get("encrypt.key-secret")
    if image.cipher is not None and isinstance(secret, str):
        image.unlock(given.secrets.password(secret))
    if image.cipher is None and "encrypt.format" in given.options:
        raise UsageError(
            f"No encryption in image header, but options specified format '{given.options['encrypt.format']}'"
        )
