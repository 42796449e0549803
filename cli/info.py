"""info: what an image is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safeimg.cli.common import filesystem, image_name, print_json, print_text
from safeimg.cli.errors import usage
from safeimg.cli.options import Command, Option
from safeimg.cli.parser import Arguments
from safeimg.cli.shared import FORCE_SHARE, FORMAT, HELP, IMAGE, IMAGE_OPTS, OBJECT, OUTPUT
from safeimg.cli.values import output_format

COMMANDS = (
    Command(
        "info",
        "Show what an image is.",
        (IMAGE,),
        (
            HELP,
            FORMAT,
            OUTPUT,
            Option("backing-chain", None, "backing-chain", None, "Show its backing images too."),
            OBJECT,
            IMAGE_OPTS,
            FORCE_SHARE,
        ),
        (
            ("One image", "info disk.qcow2"),
            ("A whole chain, for programs", "info --backing-chain --output=json top.qcow2"),
            ("An image that a guest is using", "info -U disk.qcow2"),
        ),
    ),
)


def run(command: Command, arguments: Arguments) -> int:
    if len(arguments.positional) != 1:
        raise usage("Expecting one image file name")
    output = output_format(arguments.last("output"))
    name, fmt = image_name(arguments, arguments.positional[0], arguments.last("format"))
    from safeimg.ops.info import info

    chain = arguments.flag("backing-chain")
    images = info(
        filesystem(), name, fmt=fmt, chain=chain, force_share=arguments.flag("force-share"),
        secrets=arguments.secrets,
    )
    if output == "json":
        print_json(images if chain else images[0])
    else:
        print_text("\n\n".join("\n".join(_describe(image)) for image in images))
    return 0


def _describe(image: Mapping[str, Any]) -> Iterator[str]:
    from safeimg.ops.sizes import human_size

    size = image["virtual-size"]
    yield f"image: {image['filename']}"
    yield f"file format: {image['format']}"
    yield f"virtual size: {human_size(size)} ({size} bytes)"
    yield f"disk size: {human_size(image['actual-size']) if 'actual-size' in image else 'unavailable'}"
    if "encrypted" in image:
        yield "encrypted: yes"
    if "cluster-size" in image:
        yield f"cluster_size: {image['cluster-size']}"
    if image.get("dirty-flag"):
        yield "cleanly shut down: no"
    if "backing-filename" in image:
        backing, full = image["backing-filename"], image.get("full-backing-filename")
        actual = "cannot determine actual path" if full is None else f"actual path: {full}"
        yield f"backing file: {backing}" + (f" ({actual})" if full != backing else "")
        if "backing-filename-format" in image:
            yield f"backing file format: {image['backing-filename-format']}"
    if "snapshots" in image:
        yield from snapshot_list(image["snapshots"])
    if "format-specific" in image:
        yield "Format specific information:"
        yield from _members(image["format-specific"]["data"], "    ")


def snapshot_list(snapshots: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines in which qemu-img lists snapshots, given as in its JSON."""
    yield "Snapshot list:"
    yield "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT"
    for snapshot in snapshots:
        yield _snapshot(snapshot)


def _snapshot(snapshot: Mapping[str, Any]) -> str:
    from safeimg.ops.sizes import human_size

    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot["date-sec"]))
    seconds = snapshot["vm-clock-sec"]
    milliseconds = snapshot["vm-clock-nsec"] // 10**6
    clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}"
    return (
        f"{_padded(snapshot['id'], 9)} {_padded(snapshot['name'], 16)} {human_size(snapshot['vm-state-size']):>8}"
        f"{date:>20}{clock:>13}{snapshot.get('icount', ''):>11}"
    )


def _padded(text: str, width: int) -> str:
    """As wide as QEMU makes it, which counts bytes."""
    return text + " " * (width - len(os.fsencode(text)))


def _members(members: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in members.items():
        yield from _value(f"{indent}{name.replace('-', ' ')}:", value, indent)


def _value(label: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield label
        yield from _members(value, indent + "    ")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield label
        for index, item in enumerate(value):
            yield from _value(f"{indent}    [{index}]:", item, indent + "    ")
    else:
        yield f"{label} {str(value).lower() if isinstance(value, bool) else value}"
