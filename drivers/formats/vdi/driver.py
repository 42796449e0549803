"""The VDI driver: the parts of this package behind `formats.api.Driver`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence

from safeimg.drivers.formats.api import (
    PLAIN,
    CheckResult,
    CreateOption,
    Driver,
    Image,
    Opening,
    Patch,
    Planner,
)
from safeimg.drivers.formats.plain import PlainDriver
from safeimg.drivers.formats.vdi.header import SIGNATURE, SIGNATURE_OFFSET, UNFINISHED
from safeimg.drivers.formats.vdi.image import VdiImage, open_image
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import File, FileSystem

CREATE_OPTIONS = (
    CreateOption("size", "size", "Virtual disk size"),
    CreateOption("static", "bool", "VDI static (pre-allocated) image", "off"),
    CreateOption("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    CreateOption("preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)"),
)
_MAGIC = struct.pack("<I", SIGNATURE)


class VdiDriver(PlainDriver):
    """Implements `formats.api.Driver`."""

    name = "vdi"
    create_options: Sequence[CreateOption] = CREATE_OPTIONS

    def probe(self, head: bytes, path: str) -> int:
        return 100 if head[SIGNATURE_OFFSET : SIGNATURE_OFFSET + 4] == _MAGIC else 0

    def open(
        self, file: File, *, write: bool = False, repair: bool = False, given: Opening = PLAIN
    ) -> VdiImage:
        return open_image(file, write=write, repair=repair)

    def reopen(self, image: Image) -> Image:
        return open_image(image.file, write=image.file.writable, repair=True)

    def create(self, fs: FileSystem, path: str, size: int, options: Mapping[str, str], *,
               cache: str = "writeback", unfinished: str | None = None, secrets: Secrets = NO_SECRETS,
               ready: Callable[[], None] = lambda: None) -> None:
        from safeimg.drivers.formats.vdi.create import create

        create(fs, path, size, options, cache=cache, unfinished=unfinished is not None, ready=ready)

    def planner(self, image: Image) -> Planner:
        from safeimg.drivers.formats.vdi.planner import VdiPlanner

        return VdiPlanner(_own(image))

    def unfence(self, image: Image) -> Sequence[Patch]:
        """There is no fence; an unfinished image becomes a normal one."""
        from safeimg.drivers.formats.vdi.create import finish_patch

        own = _own(image)
        return (finish_patch(own.file),) if own.header.version == UNFINISHED else ()

    def referenced(self, image: Image, ranges: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        from safeimg.drivers.formats.vdi.usage import referenced

        return referenced(_own(image), ranges)

    def used_end(self, image: Image) -> int:
        from safeimg.drivers.formats.vdi.usage import used_end

        return used_end(_own(image))

    def check(self, image: Image) -> CheckResult:
        from safeimg.drivers.formats.vdi.check import check

        return check(_own(image))

    def specific_info(self, image: Image) -> Mapping[str, object] | None:
        return None


def _own(image: Image) -> VdiImage:
    if not isinstance(image, VdiImage):
        raise TypeError(f"{image.file.path} was not opened by the vdi driver")
    return image


driver: Driver = VdiDriver()
