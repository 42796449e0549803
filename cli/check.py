"""check: what is wrong with an image's metadata."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from safeimg.cli import values
from safeimg.cli.common import filesystem, image_name, print_json, warn_image
from safeimg.cli.errors import CommandError, usage
from safeimg.cli.options import Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.progress import display
from safeimg.cli.running import run_stoppable
from safeimg.cli.shared import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE,
    IMAGE_OPTS,
    JOURNALING,
    OBJECT,
    OUTPUT,
    QUIET,
    SOURCE_CACHE,
)
from safeimg.cli.values import cache_mode, output_format

if TYPE_CHECKING:
    from safeimg.drivers.formats.api import CheckResult
    from safeimg.drivers.formats.naming import Blockdev
    from safeimg.ops.repair import Repaired

CORRUPT, LEAKS, UNSUPPORTED = 2, 3, 63

COMMANDS = (
    Command(
        "check",
        "Check an image's metadata.",
        (IMAGE,),
        (
            HELP,
            FORMAT,
            Option("repair", "r", "repair", "leaks|all", "Repair leaked clusters, or everything.", values.repair),
            OUTPUT,
            OBJECT,
            IMAGE_OPTS,
            QUIET,
            SOURCE_CACHE,
            FORCE_SHARE,
            *JOURNALING,
        ),
        (
            ("Is the image in order?", "check disk.qcow2"),
            ("For programs", "check --output=json disk.qcow2"),
            ("Repair it", "check -r all disk.qcow2"),
        ),
        "A repair that was killed is finished by `safeimg resume IMAGE`, or by the same command; `safeimg rollback "
        "IMAGE` makes the image as broken as it was. Exit code 0: no errors; 1: not checked; 2: corruptions; 3: leaked "
        "clusters only; 63: the format has no checks.",
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    if len(arguments.positional) != 1:
        raise usage("Expecting one image file name")
    output = output_format(arguments.last("output"))
    cache = cache_mode(arguments.last("source-cache", "writeback"), "Invalid source cache option")
    name, fmt = image_name(arguments, arguments.positional[0], arguments.last("format"))
    from safeimg.drivers.errors import CheckFailed

    try:
        done = _repaired(arguments, name, fmt, cache) if arguments.flag("repair") else None
        if done is None or done.first is None:
            return _report(arguments, output, *_checked(arguments, name, fmt, cache))
    except CheckFailed as failed:
        _tell(failed.messages)
        problem = () if failed.problem is None else (failed.problem,)
        raise CommandError(*problem, f"Check failed: {failed.reason}") from failed
    first = done.first
    _tell(first.messages)
    if not (first.corruptions_fixed or first.leaks_fixed):
        return _report(arguments, output, done.format, first)
    if output == "human" and not arguments.flag("quiet"):
        print("\n".join(_repairs(first)))
        sys.stdout.flush()
    second = done.second
    if second is None:
        raise CommandError("Check failed: Input/output error")
    _tell(second.messages)
    fixed = {"corruptions_fixed": first.corruptions_fixed, "leaks_fixed": first.leaks_fixed}
    return _report(arguments, output, done.format, second._replace(**fixed, messages=()))


def _checked(
    arguments: Arguments, name: str | Blockdev, fmt: str | None, cache: str
) -> tuple[str, CheckResult]:
    """The image's format, and how it is."""
    from safeimg.ops.check import check

    done = check(
        filesystem(), name, fmt=fmt, cache=cache, force_share=arguments.flag("force-share"),
        secrets=arguments.secrets,
    )
    if done.result is None:
        raise CommandError("This image format does not support checks", code=UNSUPPORTED)
    _tell(done.result.messages)
    return done.format, done.result._replace(messages=())


def _repaired(arguments: Arguments, name: str | Blockdev, fmt: str | None, cache: str) -> Repaired | None:
    """What was repaired; None if a repair that had been interrupted was finished."""
    from safeimg.drivers.formats.chain import try_open
    from safeimg.ops.launch import Environment
    from safeimg.ops.repair import repair
    from safeimg.recovery.gate import begin_or_resume

    if arguments.flag("force-share"):
        try_open(filesystem(), name, format=fmt, force_share=True)

    async def work(environment: Environment) -> Repaired | None:
        found: list[Repaired] = []

        async def begin() -> None:
            errors = arguments.last("repair") == "all"
            found.append(await repair(environment, name, errors=errors, fmt=fmt, cache=cache, warn=warn_image))

        await begin_or_resume(name, environment, "check", begin)
        return found[0] if found else None

    with display(arguments) as shown:
        path = name if isinstance(name, str) else name.text
        done = run_stoppable(arguments, shown, work, image=path)
    if done is not None and done.first is None:
        raise CommandError("This image format does not support checks", code=UNSUPPORTED)
    return done


def _tell(messages: Iterable[str]) -> None:
    """The report itself, line by line."""
    sys.stdout.flush()
    for message in messages:
        print(message, file=sys.stderr)
    sys.stderr.flush()


def _report(arguments: Arguments, output: str, fmt: str, result: CheckResult) -> int:
    """The counters, and the exit code."""
    if not arguments.flag("quiet"):
        if output == "json":
            print_json(_members(result, arguments.positional[0], fmt))
        else:
            print("\n".join(_lines(result)))
    if result.check_errors:
        raise CommandError("Check failed")
    if result.corruptions:
        return CORRUPT
    return LEAKS if result.leaks else 0


def _repairs(result: CheckResult) -> Iterator[str]:
    yield "The following inconsistencies were found and repaired:\n"
    yield f"    {result.leaks_fixed} leaked clusters"
    yield f"    {result.corruptions_fixed} corruptions\n"
    yield "Double checking the fixed image now..."


def _members(result: CheckResult, path: str, fmt: str) -> dict[str, Any]:
    """In the order of QEMU's JSON; counters that are zero are left out, except for `check-errors`."""
    members: dict[str, Any] = {
        "image-end-offset": result.image_end_offset,
        "compressed-clusters": result.compressed_clusters,
        "total-clusters": result.total_clusters,
        "corruptions": result.corruptions,
        "corruptions-fixed": result.corruptions_fixed,
        "check-errors": result.check_errors,
        "leaks": result.leaks,
        "leaks-fixed": result.leaks_fixed,
        "allocated-clusters": result.allocated_clusters,
        "filename": path,
        "format": fmt,
        "fragmented-clusters": result.fragmented_clusters,
    }
    return {name: value for name, value in members.items() if value or name == "check-errors"}


def _lines(result: CheckResult) -> Iterator[str]:
    if not (result.corruptions or result.leaks or result.check_errors):
        yield "No errors were found on the image."
    if result.corruptions:
        yield f"\n{result.corruptions} errors were found on the image."
        yield "Data may be corrupted, or further writes to the image may corrupt it."
    if result.leaks:
        yield f"\n{result.leaks} leaked clusters were found on the image."
        yield "This means waste of disk space, but no harm to data."
    if result.check_errors:
        yield f"\n{result.check_errors} internal errors have occurred during the check."
    if result.total_clusters and result.allocated_clusters:
        allocated = result.allocated_clusters
        total = result.total_clusters
        yield (
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        yield f"Image end offset: {result.image_end_offset}"
