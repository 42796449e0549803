"""check: what is wrong with an image's metadata."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from safeimg.cli import values
from safeimg.cli.common import filesystem, image_name, print_json
from safeimg.cli.errors import CommandError, usage
from safeimg.cli.options import Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.shared import (
    FORCE_SHARE,
    FORMAT,
    HELP,
    IMAGE,
    IMAGE_OPTS,
    OBJECT,
    OUTPUT,
    QUIET,
    SOURCE_CACHE,
)
from safeimg.cli.values import cache_mode, output_format

if TYPE_CHECKING:
    from safeimg.drivers.formats.api import CheckResult

CORRUPT, LEAKS, UNSUPPORTED = 2, 3, 63

COMMANDS = (
    Command(
        "check",
        "Check an image's metadata.",
        (IMAGE,),
        (
            HELP,
            FORMAT,
            Option("repair", "r", "repair", "leaks|all", "Not supported yet.", values.repair),
            OUTPUT,
            OBJECT,
            IMAGE_OPTS,
            QUIET,
            SOURCE_CACHE,
            FORCE_SHARE,
        ),
        (("Is the image in order?", "check disk.qcow2"), ("For programs", "check --output=json disk.qcow2")),
        "Exit code 0: no errors; 1: not checked; 2: corruptions; 3: leaked clusters only; 63: the format "
        "has no checks.",
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    if len(arguments.positional) != 1:
        raise usage("Expecting one image file name")
    output = output_format(arguments.last("output"))
    name, fmt = image_name(arguments, arguments.positional[0], arguments.last("format"))
    cache = cache_mode(arguments.last("source-cache", "writeback"), "Invalid source cache option")
    if arguments.flag("repair"):
        raise CommandError("check -r is not supported yet: without -r it reports what is wrong")
    from safeimg.ops.check import check

    done = check(
        filesystem(), name, fmt=fmt, cache=cache, force_share=arguments.flag("force-share"),
        secrets=arguments.secrets,
    )
    result = done.result
    if result is None:
        raise CommandError("This image format does not support checks", code=UNSUPPORTED)
    for message in result.messages:
        print(message, file=sys.stderr)
    sys.stderr.flush()
    if not arguments.flag("quiet"):
        if output == "json":
            print_json(_members(result, arguments.positional[0], done.format))
        else:
            print("\n".join(_lines(result)))
    if result.corruptions:
        return CORRUPT
    if result.leaks:
        return LEAKS
    return 1 if result.check_errors else 0


def _members(result: CheckResult, path: str, fmt: str) -> dict[str, Any]:
    """In the order of QEMU's JSON; counters that are zero are left out, except for `check-errors`."""
    members: dict[str, Any] = {
        "image-end-offset": result.image_end_offset,
        "compressed-clusters": result.compressed_clusters,
        "total-clusters": result.total_clusters,
        "corruptions": result.corruptions,
        "check-errors": result.check_errors,
        "leaks": result.leaks,
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
