"""Values of `-o` options, parsed as qemu-img does; errors in its words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import CreateOption

_SUFFIXES = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}  # powers of two
_SIZE = re.compile(r"\s*(0[xX][0-9a-fA-F]+|[0-9]+(?:\.[0-9]*)?)([bkmgtpeBKMGTPE]?)")
_NUMBER = re.compile(r"\s*([-+]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]+)|([0-9]+))")  # as C's strtoull reads it
MAX_OFFSET = (1 << 63) - (1 << 30)
_TRUE = frozenset(("on", "yes", "true", "y"))
_FALSE = frozenset(("off", "no", "false", "n"))


def split_options(
    text: str, implied: str | None = None, warn: Callable[[str], None] | None = None
) -> Iterator[tuple[str, str]]:
    """Names and values of `a=b,c=d`; two commas are one in a value; `x` is `x=on` and `nox` is `x=off`.

    `implied`: the name of a first element that has no `=`. `warn` gets QEMU's warning for the short forms."""
    at = 0
    while at < len(text):
        match = re.compile(r"[^=,]*").match(text, at)
        assert match is not None
        name, at = match.group(), match.end()
        if text[at : at + 1] == "=" or (implied is not None and name):
            if text[at : at + 1] == "=":
                at += 1
            else:
                at -= len(name)
                name = implied or name
            match = re.compile(r"(?:[^,]|,,)*").match(text, at)
            assert match is not None
            value, at = match.group().replace(",,", ","), match.end()
            yield name, value
        else:
            own, value = (name[2:], "off") if name.startswith("no") else (name, "on")
            if warn is not None:
                warn(f"short-form boolean option '{name}' deprecated\nPlease use {own}={value} instead")
            yield own, value
        implied = None
        at += 1


def check_names(path: str, options: Mapping[str, str], known: Sequence[CreateOption]) -> None:
    """`UsageError` if an option is none of `known`."""
    names = {option.name for option in known}
    for name in options:
        if name not in names:
            raise UsageError(f"{path}: Invalid parameter '{name}'")


def parse_size(text: str) -> int | None:
    """A number of bytes with an optional suffix b, k, M, G, T, P or E, as qemu-img reads it; None if it is
    none."""
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    digits, suffix = match.groups()
    factor = 1 << _SUFFIXES[suffix.lower()]
    if digits[:2] in ("0x", "0X"):
        # A fraction or a suffix makes no sense after hexadecimal digits (and b and e are some).
        return None if suffix else int(digits, 16)
    whole, point, fraction = digits.partition(".")
    value = int(whole) * factor
    if point and fraction:
        if factor == 1 and int(fraction):
            return None
        value += int(fraction) * factor // 10 ** len(fraction)
    return value if value < 1 << 64 else None


def size_option(path: str, options: Mapping[str, str], name: str, default: int) -> int:
    if name not in options:
        return default
    value = parse_size(options[name])
    if value is None:
        raise UsageError(
            f"{path}: Parameter '{name}' expects a non-negative number below 2^64\n"
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            "and exabytes, respectively."
        )
    return value


def number_option(path: str, options: Mapping[str, str], name: str, default: int) -> int:
    if name not in options:
        return default
    match = _NUMBER.fullmatch(options[name])
    if match is None:
        raise UsageError(f"{path}: Parameter '{name}' expects a number")
    sign, hexadecimal, octal, decimal = match.groups()
    value = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    return -value if sign == "-" else value


def bool_option(path: str, options: Mapping[str, str], name: str, default: bool = False) -> bool:
    if name not in options:
        return default
    value = options[name]
    if value not in _TRUE and value not in _FALSE:
        raise UsageError(f"{path}: Parameter '{name}' expects 'on' or 'off'")
    return value in _TRUE


def check_offset(offset: int) -> None:
    """`UsageError` for an end of an image, or of its file, that is too far away for QEMU."""
    if offset > MAX_OFFSET:
        raise UsageError(f"offset({offset}) exceeds maximum({MAX_OFFSET})")


def is_on(text: str) -> bool:
    return text in _TRUE


def is_off(text: str) -> bool:
    return text in _FALSE


def choice_option(
    path: str, options: Mapping[str, str], name: str, choices: Sequence[str], shown: str | None = None
) -> str:
    """One of `choices`, of which the first is the default; `shown` is the option's name in the error
    message."""
    value = options.get(name, choices[0])
    if value not in choices:
        raise UsageError(f"{path}: Parameter '{shown or name}' does not accept value '{value}'")
    return value


def storage_preallocation(path: str, options: Mapping[str, str]) -> str:
    """How a file's space is made ready: "off", "falloc" or "full"; "metadata", too, until
    `refuse_metadata`. The messages are those of QEMU's storage of local
    files, to which formats without a preallocation of their own leave this option."""
    mode = options.get("preallocation", "off")
    if mode not in ("off", "metadata", "falloc", "full"):
        raise UsageError(f"{path}: invalid parameter value: {mode}")
    return mode


def refuse_metadata(path: str, preallocation: str) -> None:
    """A file has none: found out when it is there, and is to get its size."""
    if preallocation == "metadata":
        raise UsageError(f"{path}: Unsupported preallocation mode: metadata")
