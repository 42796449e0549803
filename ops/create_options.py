"""`-o` of create and convert: parsing, checking, help, and the line that create prints, all in QEMU's
words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.api import CreateOption
from safeimg.drivers.formats.options import split_options
from safeimg.ops.sizes import parse_size

# What the storage of a local file adds to a format's options
FILE_OPTIONS = (
    CreateOption("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
    CreateOption("preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)"),
    CreateOption("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
)

_TRUE, _FALSE = ("on", "yes", "true", "y"), ("off", "no", "false", "n")
_NUMBER = re.compile(r"\s*([+-]?)(0[xX][0-9a-fA-F]+|[0-9]+)", re.ASCII)


def asks_for_help(text: str) -> bool:
    """Whether one element of the list is `help` or `?`."""
    return any(element in ("help", "?") for element in re.split(r",(?!,)", text.replace(",,", "\0")))


def available(driver_options: Sequence[CreateOption], *, with_file: bool) -> list[CreateOption]:
    """What `-o help` lists, sorted by name."""
    file_names = {option.name for option in FILE_OPTIONS}
    found = {
        option.name: option
        for option in driver_options
        if with_file
        or option.name not in file_names
        or ("cluster_size" in {o.name for o in driver_options} and option.name == "preallocation")
    }
    if with_file:
        for option in FILE_OPTIONS:
            found.setdefault(option.name, option)
    return [found[name] for name in sorted(found)]


def help_lines(format_name: str, driver_options: Sequence[CreateOption], *, with_file: bool) -> Iterator[str]:
    """`-o help`: with a target's name, the options of its storage are listed too."""
    yield "Supported options:" if with_file else f"Supported {format_name} options:"
    yield from _listed(available(driver_options, with_file=with_file))
    if not with_file:
        yield ""
        yield "The protocol level may support further options."
        yield "Specify the target filename to include those options."


def amend_help_lines(format_name: str, options: Sequence[CreateOption]) -> Iterator[str]:
    """`amend -o help`."""
    yield f"Amend options for '{format_name}':"
    yield from _listed(options)


def _listed(options: Sequence[CreateOption]) -> Iterator[str]:
    for option in options:
        kind = "bool (on/off)" if option.kind == "bool" else option.kind
        label = f"{option.name}=<{kind}>"
        yield f"  {label:<22} - {option.help}"


def parse_options(
    driver_options: Sequence[CreateOption], given: Sequence[str], warn: Callable[[str], None] | None = None
) -> dict[str, str]:
    """The values asked for, by name; sizes and numbers in decimal, everything else as given.

    `UsageError` for the first option that does not exist or has no value of its kind."""
    known = {option.name: option for option in available(driver_options, with_file=True)}
    return _parse(known, given, warn)


def parse_amend_options(
    options: Sequence[CreateOption], create_options: Sequence[CreateOption], given: Sequence[str],
    warn: Callable[[str], None] | None = None,
) -> dict[str, str]:
    """Like `parse_options`, of the `options` that images which exist can be given, not all `create_options`."""
    try:
        return _parse({option.name: option for option in options}, given, warn)
    except UsageError as error:
        created = {option.name: option for option in (*options, *available(create_options, with_file=False))}
        try:
            _parse(created, given, None)
        except UsageError:
            raise error from None
        raise UsageError(f"{error}\nThis option is only supported for image creation") from None


def _parse(
    known: Mapping[str, CreateOption], given: Sequence[str], warn: Callable[[str], None] | None
) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in split_options(",".join(given)):
        if name not in known:
            raise UsageError(f"Invalid parameter '{name}'")
        values[name] = _checked(known[name], value, warn)
    return values


def _checked(option: CreateOption, value: str, warn: Callable[[str], None] | None) -> str:
    name = option.name
    if option.kind == "size":
        size = parse_size(value, warn)
        if size is None:
            raise UsageError(
                f"Parameter '{name}' expects a non-negative number below 2^64\n"
                "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
                "and exabytes, respectively."
            )
        if size >= 1 << 64:
            raise UsageError(f"Value '{value}' is out of range for parameter '{name}'")
        return str(size)
    if option.kind == "num":
        return str(_number(name, value))
    if option.kind == "bool" and value not in _TRUE + _FALSE:
        raise UsageError(f"Parameter '{name}' expects 'on' or 'off'")
    return value


def _number(name: str, value: str) -> int:
    match = _NUMBER.fullmatch(value)
    if match is None or (match.group(2)[0] == "0" and re.fullmatch("0[0-9]*[89][0-9]*", match.group(2))):
        raise UsageError(f"Parameter '{name}' expects a number")
    sign, digits = match.groups()
    if digits[:2] in ("0x", "0X"):
        number = int(digits, 16)
    else:
        number = int(digits[:40], 8 if digits[0] == "0" and len(digits) > 1 else 10)
    if number >= 1 << 64:
        raise UsageError(f"Value '{value}' is too large for parameter '{name}'")
    return -number % (1 << 64) if sign == "-" else number


def is_on(value: str | None) -> bool:
    return value in _TRUE


def for_driver(driver_options: Sequence[CreateOption], values: Mapping[str, str]) -> dict[str, str]:
    """The options as a driver takes them: its own that have a value, booleans as on and off, no size."""
    options: dict[str, str] = {}
    for option in driver_options:
        value = values.get(option.name, option.default)
        if value is not None and option.name != "size":
            options[option.name] = ("on" if is_on(value) else "off") if option.kind == "bool" else value
    return options


def formatting(
    filename: str, format_name: str, driver_options: Sequence[CreateOption], values: Mapping[str, str]
) -> str:
    """The line that create prints."""
    known = {option.name: option for option in available(driver_options, with_file=True)}
    shown = {name: option.default for name, option in known.items() if option.default is not None} | dict(
        values
    )
    words = [f"Formatting '{filename}', fmt={format_name}"]
    for name in dict.fromkeys(option.name for option in (*driver_options, *FILE_OPTIONS)):
        value = shown.get(name)
        if value is not None:
            if known[name].kind in ("size", "num"):  # printed as signed
                number = int(value)
                value = str(number - (1 << 64) if number >> 63 else number)
            words.append(f"{name}={value.replace(',', ',,')}")
    return " ".join(words)
