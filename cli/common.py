"""What several commands need: the file system, how images are named, how JSON is printed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from safeimg.cli.errors import CommandError
from safeimg.cli.parser import Arguments

if TYPE_CHECKING:
    from safeimg.drivers.storage.api import FileSystem


def filesystem() -> FileSystem:
    """The files of this machine. The one place where commands get it from."""
    from safeimg.drivers.storage.file import LocalFileSystem

    return LocalFileSystem()


def image_name(arguments: Arguments, text: str, fmt: str | None, *, code: int = 1) -> tuple[str, str | None]:
    """File name and format of an image argument, which `--image-opts` makes a list of options."""
    if not arguments.flag("image-opts"):
        return text, fmt
    if fmt is not None:
        raise CommandError("--image-opts and --format are mutually exclusive", code=code)
    return image_options(text, code=code)


def image_options(text: str, *, code: int = 1) -> tuple[str, str | None]:
    """File name and format from `driver=…,file.filename=…`: the options of a plain local image."""
    from safeimg.ops.create_options import split_options

    given = dict(split_options(text, implied="driver"))
    fmt = given.pop("driver", None)
    name = given.pop("file.filename", None) or given.pop("filename", None)
    protocol = given.pop("file.driver", "file")
    if given or protocol != "file":
        what = next(iter(given), f"file.driver={protocol}")
        raise CommandError(
            f"Could not open '{text}': --image-opts with '{what}' is not supported yet", code=code
        )
    if name is None:
        raise CommandError(f"Could not open '{text}': --image-opts needs file.filename", code=code)
    return name, None if fmt == "file" else fmt


def warn_image(message: str) -> None:
    """A warning about an image, as QEMU prints it."""
    print(f"WARNING: {message}", file=sys.stderr)


def print_text(text: str) -> None:
    """Prints text that may hold file names: bytes that are no UTF-8 come out as they went in."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape") + b"\n")


def print_json(value: Any) -> None:
    """Prints JSON as QEMU does: four spaces, ASCII, empty lists and objects on two lines."""
    print("".join(_json(value, "")))


def _json(value: Any, indent: str) -> Iterator[str]:
    inner = indent + "    "
    if isinstance(value, dict):
        items = [f"{inner}{_string(key)}: {''.join(_json(item, inner))}" for key, item in value.items()]
        yield "".join(("{\n", ",\n".join(items), "\n" if items else "", indent, "}"))
    elif isinstance(value, (list, tuple)):
        items = [inner + "".join(_json(item, inner)) for item in value]
        yield "".join(("[\n", ",\n".join(items), "\n" if items else "", indent, "]"))
    elif isinstance(value, str):
        yield _string(value)
    elif value is None or isinstance(value, bool):
        yield {None: "null", True: "true", False: "false"}[value]
    else:
        yield repr(value)


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _string(text: str) -> str:
    """A JSON string in ASCII. Bytes of file names that are no UTF-8 become U+FFFD."""
    parts = []
    for character in text:
        code = ord(character)
        if character in _ESCAPES:
            parts.append(_ESCAPES[character])
        elif 0x20 <= code < 0x7F:
            parts.append(character)
        elif 0xD800 <= code < 0xE000:
            parts.append("\\uFFFD")
        elif code < 0x10000:
            parts.append(f"\\u{code:04X}")
        else:
            code -= 0x10000
            parts.append(f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}")
    return '"' + "".join(parts) + '"'
