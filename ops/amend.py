"""amend: options of an image that exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import Driver, Image
from safeimg.drivers.formats.chain import close_chain, look_at, open_chain
from safeimg.drivers.formats.features import Amending
from safeimg.drivers.formats.naming import Blockdev, protocol_driver
from safeimg.drivers.formats.registry import lookup
from safeimg.ops.change import Action, Changing, Settings
from safeimg.ops.create_options import parse_amend_options
from safeimg.ops.errors import Conflict
from safeimg.ops.launch import Environment
from safeimg.ops.repair import open_sound, open_to_change
from safeimg.ops.resize import resize
from safeimg.ops.session import refuse_pending_on


async def amend(
    environment: Environment,
    filename: str | Blockdev,
    given: Sequence[str],
    *,
    fmt: str | None = None,
    cache: str = "writeback",
    force: bool = False,
    warn: Callable[[str], None] | None = None,
    begun: Callable[[], None] = lambda: None,
) -> None:
    """Changes what the option lists `given` (as of `-o`) ask for; `force` allows what may lose access to data. `begun`
    is called once these are understood.

    The size is an operation of its own, behind that for the others, or before it where these name another data file:
    begun anew, an amendment that was interrupted in between finds the first part done. Raises `UsageError` in
    qemu-img's words for what cannot be."""
    fs, secrets = environment.fs, environment.secrets
    values: dict[str, str] = {}
    erased: list[list[int]] = []

    def check(image: Image) -> None:
        amending = amendable(lookup(image.format), filename, fmt)
        begun()
        amending.check(image, values, force=force)
        erased[:] = ([offset, length] for offset, length in amending.erased(image, values))

    layers = look_at(fs, filename, format=fmt, cache=cache, warn=warn, secrets=secrets)
    try:
        driver, old = lookup(layers[0].format), layers[0].size
        if driver.amending is not None:  # else it is refused once the image was opened for writing
            try:
                values = parse_amend_options(driver.amending.options, driver.create_options, given)
            except UsageError:  # that the image cannot be written comes first
                refuse_pending_on(fs, layers[0].file.path)
                close_chain(await open_to_change(
                    environment, filename, fmt=fmt, cache=cache, warn=None, backing=True
                ))  # fmt: skip
                raise
        size = int(values.get("size", 0)) or old  # 0 asks for nothing, as in QEMU
        resizes, others = size != old, size == old or len(values) > 1
        # It is the present data file that grows or is cut, and the bitmaps that version 2 has no place for have a say.
        size_first = resizes and ("data_file" in values or values.get("compat") in ("0.10", "v2"))
    finally:
        close_chain(layers)

    async def change_size(check: Callable[[Image], None] | None = None) -> None:
        await resize(
            environment, filename, lambda _: size, fmt=fmt, cache=cache, shrink=True, warn=warn, check=check
        )

    if size_first or not others:
        await change_size(check)
    if others:
        settings = {"values": values, "erased": erased}
        await _amend.run(
            environment, filename, settings, fmt=fmt, cache=cache, warn=warn, check=check, backing=True
        )
    if resizes and others and not size_first:
        await change_size()


async def image_driver(
    environment: Environment, filename: str | Blockdev, fmt: str | None, cache: str, warn: Callable[[str], None] | None
) -> Driver:
    """The driver of the format of an image that could be amended now; it is repaired if it was not closed properly, as
    by qemu-img."""
    fs, secrets = environment.fs, environment.secrets
    layers = await open_sound(
        environment,
        lambda: open_chain(fs, filename, format=fmt, write=True, cache=cache, warn=warn, secrets=secrets),
    )
    try:
        return lookup(layers[0].format)
    finally:
        close_chain(layers)


def amendable(driver: Driver, filename: str | Blockdev | None = None, fmt: str | None = None) -> Amending:
    """`UsageError` if images of this format have no options that can be changed. `filename`: whose image it is, opened
    as `fmt`."""
    if driver.amending is None:
        # A file by itself has no format.
        name = driver.name if filename is None else protocol_driver(filename, fmt) or driver.name
        raise UsageError(f"Format driver '{name}' does not support option amendment")
    return driver.amending


def _actions(settings: Settings) -> Sequence[Action]:
    values = settings.get("values")
    if not isinstance(values, Mapping) or not all(isinstance(word, str) for pair in values.items() for word in pair):
        raise Conflict("the log does not say which options were to be amended")
    amending = lookup(settings["format"]).amending
    if amending is None:
        raise Conflict(f"{settings['format']} images have no options to amend")
    return amending.amendments(values)


_amend = Changing("amend", _actions)
open_layers, make_job = _amend.open_layers, _amend.make_job
