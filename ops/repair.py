"""check -r: an image whose metadata is broken is put right. And what a command does first of all to an image that was
not closed properly: the same.

Steps: fence | what the format plans, change after change. Whatever of that is on disk, planning the repair anew yields
the rest of it; so a resumed repair just begins again behind its fence. Rolled back, the image is as broken as it was.

The image tells nothing that could be relied on, so recovery checks what the repair wrote, and nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from safeimg.drivers.errors import DriverError, NotClosed, UnsupportedError
from safeimg.drivers.formats.api import CheckResult, Image, Patch
from safeimg.drivers.formats.chain import OpenError, close_chain, look_at, only_top, open_chain, refuse_locked
from safeimg.drivers.formats.features import Repair, Repairing
from safeimg.drivers.formats.naming import Blockdev, are_options, lasting, text_of, without_backing
from safeimg.drivers.formats.registry import lookup
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.secrets import Secrets
from safeimg.drivers.storage.api import FileSystem
from safeimg.drivers.transfer.loop import blocking
from safeimg.journal.state import OperationState
from safeimg.ops.errors import Conflict
from safeimg.ops.launch import Environment, Job, launch
from safeimg.ops.reopening import reopen_home, started_settings
from safeimg.ops.session import refuse_pending_on, touched
from safeimg.ops.steps import Step

Opened = TypeVar("Opened")

CHECK = "check"  # check -r
REPAIR = "repair"  # what another command begins with


class Repaired(NamedTuple):
    """What `check -r` reports."""

    format: str
    first: CheckResult | None  # None: the format has no repairs
    second: CheckResult | None  # how the image is afterwards, if anything was repaired


class Repairs:
    """The operation. `marked`: the image was marked as corrupt before."""

    def __init__(self, command: str, image: Image, errors: bool, marked: bool, plan: Repair | None = None) -> None:
        self._command = command
        self._image = image
        self._errors = errors
        self._marked = marked
        self._plan = plan
        self.result: CheckResult | None = None  # how the image is in the end, as far as that can be told

    async def steps(self, cursor: Any | None) -> AsyncIterator[Step]:
        if cursor is None:
            fence = lookup(self._image.format).fence(self._image)
            yield Step("fence", {}, 0, changes=[(0, fence)] if fence else [])
        plan = self._plan
        if plan is None:
            image = lookup(self._image.format).reopen(self._image)
            plan = await blocking(lambda: _repairing(image).plan(image, errors=self._errors))
        for changes in plan.changes:
            yield Step(self._command, {}, 0, changes=[(0, changes)])

    def finish(self) -> Sequence[tuple[int, Patch]]:
        """The marks: none if nothing is wrong any more."""
        driver = lookup(self._image.format)
        image = driver.reopen(self._image)
        try:
            self.result = driver.check(image)
        except DriverError:  # too broken to tell
            self.result = None
        sound = self.result is not None and not (self.result.corruptions or self.result.check_errors)
        patches = _repairing(image).conclude(image, sound=sound, marked=self._marked)
        return tuple((0, patch) for patch in patches)

    def discards(self) -> Sequence[tuple[int, int, int]]:
        """None: what is free now may still be of use to whoever has to find out what happened."""
        return ()


async def repair(
    environment: Environment,
    filename: str | Blockdev,
    *,
    errors: bool,
    fmt: str | None = None,
    cache: str = "writeback",
    warn: Callable[[str], None] | None = None,
    command: str = CHECK,
) -> Repaired:
    """Repairs leaks, and with `errors` all that can be. Nothing is begun where nothing is to be done.

    Raises what opening raises, `CheckFailed`, `SomethingPending`, `OperationPaused`."""
    fs, secrets = environment.fs, environment.secrets
    layers = look_at(fs, filename, format=fmt, cache=cache, repair=only_top, secrets=secrets)
    try:
        refuse_locked(layers[0], filename, secrets)
        refuse_pending_on(fs, layers[0].file.path)
    finally:
        close_chain(layers)
    alone = without_backing(filename)
    layers = open_chain(
        fs, alone, format=fmt, write=True, cache=cache, backing=False, repair=True, warn=warn, secrets=secrets
    )
    try:
        image = layers[0]
        repairing = lookup(image.format).repairing
        if repairing is None:
            return Repaired(image.format, None, None)
        try:
            plan = await blocking(lambda: repairing.plan(image, errors=errors))
        except UnsupportedError as error:
            raise OpenError(f"Could not open '{text_of(filename)}': {error}") from error
        if not plan.changes and not repairing.is_suspect(image):
            return Repaired(image.format, plan.report, None)
        opened = {"cache": cache, "format": image.format, "options": lasting(alone, fs.resolve)}
        marked = repairing.is_marked(image)
        settings = {"errors": errors, "marked": marked, **opened}
        operation = Repairs(command, image, errors, marked, plan)
        await launch(_job(layers, operation, command, settings), environment)
        fixed = plan.report.corruptions_fixed or plan.report.leaks_fixed
        return Repaired(image.format, plan.report, operation.result if fixed else None)
    finally:
        close_chain(layers)


async def open_sound(environment: Environment, open_it: Callable[[], Opened]) -> Opened:
    """What `open_it` opens, for writing; any image that was not closed properly is repaired first, and what was wrong
    is shown.

    Raises `OpenError` in QEMU's words if that does not help."""
    repaired: set[str] = set()
    while True:
        try:
            return await blocking(open_it)
        except OpenError as error:
            cause = error.__cause__
            if not isinstance(cause, NotClosed):
                raise
            if cause.path in repaired:
                raise OpenError(str(error).replace(str(cause), "Could not repair dirty image")) from error
            repaired.add(cause.path)
            done = await repair(environment, cause.path, errors=True, command=REPAIR)
            for line in () if done.first is None else done.first.messages:
                environment.notice(line)


async def open_to_change(
    environment: Environment,
    filename: str | Blockdev,
    *,
    fmt: str | None,
    cache: str,
    warn: Callable[[str], None] | None,
    backing: bool,
    present: bool = False,
) -> list[Image]:
    """The image for writing, sound, with its backing images if `backing`; they have to be there if `present`.

    It is opened twice: what is pending on it is refused before its fence would, in less helpful words. Raises what
    opening raises, `SomethingPending`."""
    fs, secrets = environment.fs, environment.secrets
    found = look_at(
        fs, filename, format=fmt, cache=cache, backing=backing or present, warn=warn, secrets=secrets
    )
    try:
        refuse_pending_on(fs, found[0].file.path)
    finally:
        close_chain(found)
    name = filename if backing or not present else without_backing(filename)
    return await open_sound(
        environment,
        lambda: open_chain(
            fs, name, format=fmt, write=True, cache=cache, backing=backing, warn=warn, secrets=secrets
        ),
    )


def open_layers(fs: FileSystem, home: str, state: OperationState, secrets: Secrets) -> list[Image]:
    """See `registry.Reopener`."""
    return reopen_home(fs, home, _settings(home, state), secrets)


def make_job(layers: list[Image], state: OperationState, environment: Environment) -> Job:
    """See `registry.Reopener`."""
    settings = _settings(layers[0].file.path, state)
    command = state.declared.command
    operation = Repairs(command, layers[0], settings["errors"], settings["marked"])
    return _job(layers, operation, command, settings)


def _job(layers: list[Image], operation: Repairs, command: str, settings: dict[str, Any]) -> Job:
    return Job(command, operation, touched([("image", layers[0], True)]), layers, None, settings, damaged=True)


def _repairing(image: Image) -> Repairing:
    repairing = lookup(image.format).repairing
    if repairing is None:
        raise Conflict(f"{image.file.path}: {image.format} images cannot be repaired")
    return repairing


def _settings(home: str, state: OperationState) -> dict[str, Any]:
    """What the operation was started with, checked: it comes from a file."""
    kinds = {"cache": str, "format": str, "errors": bool, "marked": bool}
    settings = started_settings(home, state, kinds)
    if len(state.declared.images) > 2 or not are_options(settings.get("options")):
        raise Conflict(f"{home}: the log's images do not fit a {state.declared.command}")
    return settings
