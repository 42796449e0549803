"""The format drivers: looking one up by name, and finding out which one a file is for."""

from __future__ import annotations

from importlib import import_module

from safeimg.drivers.errors import UnsupportedError, UsageError
from safeimg.drivers.formats.api import Driver
from safeimg.drivers.storage.api import File

PROBE_BYTES = 2048

# Modules that hold an object called `driver`, imported when asked for.
_MODULES = {
    "qcow2": "safeimg.drivers.formats.qcow2.driver",
    "luks": "safeimg.drivers.formats.luks.driver",
    "raw": "safeimg.drivers.formats.raw",
    "vdi": "safeimg.drivers.formats.vdi.driver",
}

# Formats that QEMU would recognise and safeimg does not handle: (offset, bytes, name). To take such a file
# for a raw disk would show the guest its metadata, and writing would destroy it.
_FOREIGN = (
    (0, b"QFI\xfb\0\0\0\x01", "qcow"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
)


def names() -> tuple[str, ...]:
    """The formats that safeimg handles."""
    return tuple(_MODULES)


def lookup(name: str) -> Driver:
    """The driver of this name; `UsageError` in QEMU's words if there is none."""
    try:
        module = _MODULES[name]
    except KeyError:
        raise UsageError(f"Unknown driver '{name}'") from None
    driver: Driver = import_module(module).driver
    return driver


def probe(file: File) -> Driver:
    """The driver for a file of unknown format. Anything unknown is raw, as in QEMU.

    Raises `UnsupportedError` for files that are clearly of a format that safeimg does not handle."""
    head = file.pread(0, PROBE_BYTES)
    for offset, magic, name in _FOREIGN:
        if head[offset:offset + len(magic)] == magic:
            raise UnsupportedError(f"{name} images are not supported yet")
    drivers = [lookup(name) for name in _MODULES]
    return max(drivers, key=lambda driver: driver.probe(head, file.path))
