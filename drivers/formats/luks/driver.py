"""The LUKS driver: the parts of this package behind `formats.api.Driver`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from safeimg.drivers.errors import FormatError, SecretMissing
from safeimg.drivers.formats.api import (
    PLAIN,
    CreateOption,
    Driver,
    Image,
    Opening,
    Patch,
    Planner,
    RuntimeOption,
)
from safeimg.drivers.formats.encryption import luks_create_options
from safeimg.drivers.formats.features import Amending, Measuring
from safeimg.drivers.formats.plain import PlainDriver
from safeimg.drivers.secrets import NO_SECRETS, Secrets
from safeimg.drivers.storage.api import File, FileSystem

if TYPE_CHECKING:
    from safeimg.drivers.formats.luks.image import LuksImage

CREATE_OPTIONS = (
    CreateOption("size", "size", "Virtual disk size"),
    CreateOption("key-secret", "str", "ID of the secret that provides the keyslot passphrase"),
    *luks_create_options(),
    CreateOption("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    CreateOption("preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)"),
)
_MAGIC = b"LUKS\xba\xbe\0\1"


class LuksDriver(PlainDriver):
    """Implements `formats.api.Driver`."""

    name = "luks"
    shared = True
    create_options: Sequence[CreateOption] = CREATE_OPTIONS
    runtime_options: Sequence[RuntimeOption] = (RuntimeOption("key-secret", "str", strong=True),)

    @property
    def measuring(self) -> Measuring | None:
        from safeimg.drivers.formats.luks.create import LuksMeasuring

        return LuksMeasuring()

    @property
    def amending(self) -> Amending | None:
        from safeimg.drivers.formats.luks.amend import LuksAmending

        return LuksAmending()

    def probe(self, head: bytes, path: str) -> int:
        """Version 2 is a raw disk to QEMU."""
        return 100 if head[: len(_MAGIC)] == _MAGIC else 0

    def open(self, file: File, *, write: bool = False, repair: bool = False, given: Opening = PLAIN) -> Image:
        from safeimg.drivers.formats.luks.image import KEY_SECRET, check_length, open_image

        secret = given.options.get(KEY_SECRET)
        try:
            image = open_image(file, repair=repair)
        except FormatError:
            if given.open_file is not None and secret is None:  # missed before the image is looked at
                raise SecretMissing(KEY_SECRET) from None
            raise
        if given.open_file is not None:
            # Recovery takes steps back without a secret; the log still names the one that there was.
            known = isinstance(secret, str) and (not repair or secret in given.secrets)
            image.unlock(given.secrets, str(secret) if known else None)
        check_length(image)
        return image

    def reopen(self, image: Image) -> Image:
        from safeimg.drivers.formats.luks.image import open_image

        return open_image(image.file, repair=True).inherit(own_image(image))

    def create(self, fs: FileSystem, path: str, size: int, options: Mapping[str, str], *,
               cache: str = "writeback", unfinished: str | None = None, secrets: Secrets = NO_SECRETS,
               ready: Callable[[], None] = lambda: None) -> None:
        from safeimg.drivers.formats.luks.create import create

        create(fs, path, size, options, secrets, cache=cache, unfinished=unfinished is not None, ready=ready)

    def planner(self, image: Image) -> Planner:
        from safeimg.drivers.formats.luks.planner import LuksPlanner

        return LuksPlanner(own_image(image))

    def unfence(self, image: Image) -> Sequence[Patch]:
        """There is no fence; an unfinished image becomes a normal one."""
        from safeimg.drivers.formats.luks.create import finish_patch

        own = own_image(image)
        return (finish_patch(own.file),) if own.header.unfinished else ()

    def referenced(self, image: Image, ranges: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """All but the key material of empty slots."""
        header = own_image(image).header
        empty = [(slot.offset, slot.offset + header.material_bytes) for slot in header.slots if not slot.active]
        return [
            (offset, length)
            for offset, length in ranges
            if not any(start <= offset and offset + length <= end for start, end in empty)
        ]

    def used_end(self, image: Image) -> int | None:
        return None

    def specific_info(self, image: Image) -> Mapping[str, object]:
        from safeimg.drivers.crypto.luks import describe

        return describe(own_image(image).header)


def own_image(image: Image) -> LuksImage:
    from safeimg.drivers.formats.luks.image import LuksImage

    if not isinstance(image, LuksImage):
        raise TypeError(f"{image.file.path} was not opened by the luks driver")
    return image


driver: Driver = LuksDriver()
