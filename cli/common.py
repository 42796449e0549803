"""What several commands need: the file system, how images are named, how JSON is printed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from safeimg.cli.errors import CommandError
from safeimg.cli.parser import Arguments
from safeimg.cli.values import warn
from safeimg.drivers.formats.jsontext import json_lines
from safeimg.drivers.formats.naming import Blockdev, from_options, notices

if TYPE_CHECKING:
    from safeimg.drivers.storage.api import FileSystem


def filesystem() -> FileSystem:
    """The files of this machine. The one place where commands get it from."""
    from safeimg.drivers.storage.file import LocalFileSystem

    return LocalFileSystem()


def image_name(
    arguments: Arguments, text: str, fmt: str | None, *, code: int = 1
) -> tuple[str | Blockdev, str | None]:
    """What an image argument names, which `--image-opts` makes a list of options, and its format. Warns of old ways to
    name it."""
    name, fmt = unwarned_name(arguments, text, fmt, code=code)
    for each in notices(name):
        warn(each)
    return name, fmt


def unwarned_name(
    arguments: Arguments, text: str, fmt: str | None, *, code: int = 1
) -> tuple[str | Blockdev, str | None]:
    """The same, for whoever warns when the image is opened."""
    if not arguments.flag("image-opts"):
        return text, fmt
    if fmt is not None:
        raise CommandError("--image-opts and --format are mutually exclusive", code=code)
    return from_options(text), None


def warn_image(message: str) -> None:
    """A warning about an image, as QEMU prints it."""
    print(f"WARNING: {message}", file=sys.stderr)


def print_text(text: str) -> None:
    """Prints text that may hold file names: bytes that are no UTF-8 come out as they went in."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")


def print_json(value: Any) -> None:
    """Prints JSON as QEMU does: four spaces, ASCII, empty lists and objects on two lines."""
    print(json_lines(value))
