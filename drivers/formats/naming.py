"""How users name images: plain file names, `json:{…}`, and the `driver=…,file.filename=…` of `--image-opts`.

All three become one description, QEMU's options for a block device in dotted form: `driver`, the options of that
driver, `file.…` for what lies below it, `backing.…` where it replaces what the image says. `chain.open_chain` opens
descriptions, `protocols.py` what is at their lower end; a format declares its options (`Driver.runtime_options`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.jsontext import JsonError, json_text, parse_json
from safeimg.drivers.formats.options import is_off, is_on, parse_size, split_options
from safeimg.drivers.records import NamedTuple

Value = str | int | float | bool | None

FILE_DRIVERS = ("file", "host_device", "host_cdrom")  # of local files and block devices

# Protocols that QEMU knows; `protocols.py` opens some of them
PROTOCOLS = frozenset((
    "blkdebug", "blklogwrites", "blkreplay", "blkverify", "cloop", "compress", "copy-before-write", "copy-on-read",
    "dmg", "fat", "ftp", "ftps", "gluster", "gluster+rdma", "gluster+tcp", "gluster+unix", "http", "https", "io_uring",
    "iscsi", "iser", "nbd", "nbd+tcp", "nbd+unix", "nfs", "null-aio", "null-co", "nvme", "preallocate",
    "quorum", "rbd", "replication", "ssh", "throttle", "vvfat",
))  # fmt: skip
NBD = ("nbd", "nbd+tcp", "nbd+unix")
REMOTE = ("nbd", "ssh")  # drivers that have a module for their names
# The order of members in file names that QEMU writes (that of its hash table)
_ORDER = (
    "offset", "encrypt.key-secret", "read-zeroes", "server.mptcp", "server.to", "server.abstract", "server.path",
    "server.tight", "server.host", "server.port", "server.ipv6", "server.numeric", "children", "config", "image",
    "port", "host", "host_key_check", "driver", "path", "size", "vote-threshold", "file", "key-secret", "export",
    "server.type", "server.ipv4", "user", "tls-hostname", "server.keep-alive",
)  # fmt: skip
_LASTING = re.compile(r"backing\..*filename|(.*\.)?server\.path")
_SIZE_ERROR = (
    "Parameter '{}' expects a non-negative number below 2^64\n"
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)


def text_of(filename: str | Blockdev) -> str:
    """What messages call an image: its name as given."""
    return filename if isinstance(filename, str) else filename.text


class Blockdev(NamedTuple):
    """An image as its user names it."""

    text: str  # as given: what messages call it
    options: Mapping[str, Value]
    short_forms: tuple[str, ...] = ()  # QEMU's warnings about those that were used

    @property
    def path(self) -> str | None:
        """The name of the local file at its lower end, if the description has one."""
        value = self.options.get(self._path_key())
        return value if isinstance(value, str) else None

    def at(self, path: str) -> Blockdev:
        """The same, with another local file at its lower end, if there is one."""
        if self.options and self.path is None:
            return self
        return self._replace(options={**self.options, self._path_key(): path})

    def _path_key(self) -> str:
        found = [key for key in self.options if re.fullmatch(r"((file|image)\.)*filename", key)]
        return max(found, key=len, default="file.filename")

def local_name(name: str | Blockdev) -> str:
    """The path of the local file that an image lies in; the text given where there is none."""
    try:
        named = from_filename(name) if isinstance(name, str) else name
    except UsageError:
        return str(name)
    return named.path or named.text


def lasting(name: str | Blockdev, resolve: Callable[[str], str]) -> dict[str, Value]:
    """The options of a name, to be kept in a log: what replaces backing images, and sockets, have absolute paths.
    Errors that were asked for (blkdebug) are not what recovery is to meet again."""
    named = from_filename(name) if isinstance(name, str) else name
    return {
        key: resolve(value) if isinstance(value, str) and _LASTING.fullmatch(key) else value
        for key, value in _without_errors(named.options).items()
    }


def _without_errors(options: Mapping[str, Value]) -> Mapping[str, Value]:
    """The file that lies below blkdebug, in its place."""
    name = options.get("file.filename")
    if options.get("file.driver") != "blkdebug":
        return options
    if isinstance(name, str):
        image = below(from_filename(name.split(":", 2)[-1]).options, "file")
    else:
        image = below(options, "file.image")
    return {key: value for key, value in options.items() if not key.startswith("file.")} | {
        f"file.{key}": value for key, value in image.items()
    }


def without_backing(name: str | Blockdev) -> str | Blockdev:
    """The same image opened by itself: without what its name says of the backing image."""
    if isinstance(name, str):
        if not name.startswith("json:"):
            return name
        name = from_filename(name)
    return name._replace(options={key: item for key, item in name.options.items() if not key.startswith("backing.")})


def recalled(options: Mapping[str, Value], path: str) -> Blockdev:
    """The name that `lasting` kept, of an image that lies at `path` now."""
    return Blockdev(path, options).at(path)


def are_options(value: object) -> bool:
    """Whether this is what `lasting` makes: a log may hold anything."""
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and (item is None or isinstance(item, str | int | float | bool))
        for key, item in value.items()
    )


def below(options: Mapping[str, Value], name: str) -> dict[str, Value]:
    """Those of the options that begin with `name` and a dot, without it."""
    return {key[len(name) + 1 :]: value for key, value in options.items() if key.startswith(f"{name}.")}


def protocol(filename: str) -> str | None:
    """The protocol a name begins with: what stands before a colon that comes before any slash."""
    colon = filename.find(":")
    if colon < 0 or "/" in filename[:colon]:
        return None
    return filename[:colon]


def from_filename(name: str) -> Blockdev:
    """What a file name on the command line or in an image means. `UsageError` for JSON that is none."""
    prefix = protocol(name)
    if prefix == "json":
        return Blockdev(name, _from_json(name[len("json:") :]))
    if prefix in FILE_DRIVERS:
        return Blockdev(name, {"file.driver": prefix, "file.filename": name[len(prefix) + 1 :]})
    if prefix is not None and prefix not in PROTOCOLS:
        raise UsageError(f"Unknown protocol '{prefix}'")
    remote = "nbd" if prefix in NBD else prefix
    if remote in REMOTE:
        options = {f"file.{key}": value for key, value in _names_of(remote).parse_name(name).items()}
        return Blockdev(name, {"file.driver": remote, **options})
    if prefix is not None:
        return Blockdev(name, {"file.driver": prefix, "file.filename": name})
    return Blockdev(name, {"file.filename": name})


def _names_of(driver: str) -> ModuleType:
    """How a driver of `REMOTE` is named, imported when asked for: `parse_name(name)` gives its options, `plain_name` of
    options the name, where one says it all."""
    return import_module(f"safeimg.drivers.formats.{driver}_names")


def from_argument(name: str, format: str | None) -> Blockdev:
    """What a file name means together with `-f FORMAT`, which may be a protocol instead of a format. `UsageError`."""
    if format is None or not is_protocol(format) or name.startswith("json:"):
        return from_filename(name)
    if format in FILE_DRIVERS:
        return Blockdev(name, {"driver": format, "filename": name.removeprefix(f"{format}:")})
    if format in REMOTE:
        return Blockdev(name, {"driver": format, **_names_of(format).parse_name(name)})
    return Blockdev(name, {"driver": format, "filename": name})


def from_options(text: str) -> Blockdev:
    """What an argument means with `--image-opts`."""
    short_forms: list[str] = []
    options = dict(split_options(text, implied="file", warn=short_forms.append))
    return Blockdev(text, options, tuple(short_forms))


def notices(name: str | Blockdev) -> Sequence[str]:
    """QEMU's warnings about how an image is named, for when it is opened."""
    try:
        named = from_filename(name) if isinstance(name, str) else name
    except UsageError:  # which opening it will raise, too
        return ()
    if named.options.get("backing") == "":
        return (*named.short_forms, 'Use of "backing": "" is deprecated; use "backing": null instead')
    return named.short_forms


def _from_json(text: str) -> dict[str, Value]:
    try:
        found = parse_json(text)
    except JsonError as error:
        raise UsageError(f"Could not parse the JSON options: {error}") from None
    if not isinstance(found, dict):
        raise UsageError("Invalid JSON object given")
    return dict(_flattened(found, ""))


def _flattened(value: dict[str, Any] | list[Any], prefix: str) -> Iterator[tuple[str, Value]]:
    members = value.items() if isinstance(value, dict) else ((str(at), item) for at, item in enumerate(value))
    for name, item in members:
        if isinstance(item, dict | list):
            yield from _flattened(item, f"{prefix}{name}.")
        else:
            yield prefix + name, item


def protocol_driver(name: str | Blockdev, format: str | None) -> str | None:
    """What an image lies in that was opened by that alone, without a format."""
    named = from_argument(name, format) if isinstance(name, str) else name
    driver = named.options.get("driver")
    return driver if isinstance(driver, str) and is_protocol(driver) else None


def shown(options: Mapping[str, Value], driver: str, strong: Sequence[str]) -> str:
    """The file name that QEMU calls an open image by: a plain one if that is enough to open it again, else JSON.

    `strong`: which of the driver's options change what the guest sees."""
    return name_of(members(options, driver, strong))


def name_of(found: Mapping[str, Any]) -> str:
    """The file name for `members`."""
    name = _plain_name(found)
    return "json:" + json_text(found) if name is None else name


def is_protocol(driver: str) -> bool:
    """Whether this is no image format, but where images lie."""
    return driver in FILE_DRIVERS or driver in PROTOCOLS


def plain(path: str) -> str:
    """A path as a file name that is not taken for a protocol's."""
    return path if protocol(path) is None else f"./{path}"


def _plain_name(found: Mapping[str, Any]) -> str | None:
    """The file name that says all that the members say; None if there is none."""
    match found:
        case {"driver": str(driver), "filename": str(path)} if driver in FILE_DRIVERS:
            return plain(path)
        case {"driver": "null-co" | "null-aio" as driver} if len(found) == 1:
            return f"{driver}://"
        case {"driver": str(driver)} if driver in REMOTE:
            name: str | None = _names_of(driver).plain_name(found)
            return name
        case {"driver": "blkdebug", "image": dict(image)} if found.keys() <= {"driver", "config", "image"}:
            name = _plain_name(image)
            return None if name is None else f"blkdebug:{found.get('config', '')}:{name}"
        case {"driver": str(), "file": {"driver": str(driver), **_file}} if len(found) == 2 and is_protocol(driver):
            return _plain_name(found["file"])
    return None


# Options of protocols that change what a guest sees, and the names of what lies below them
STRONG = {
    "raw": ("offset", "size"),
    "null-co": ("read-zeroes", "size"),
    "null-aio": ("read-zeroes", "size"),
    "blkdebug": ("config",),
    "nbd": (
        "path", "host", "port", "export", "tls-creds", "tls-hostname", "server.type", "server.path", "server.abstract",
        "server.tight", "server.host", "server.port", "server.numeric", "server.to", "server.ipv4", "server.ipv6",
        "server.keep-alive", "server.mptcp", "server.cid", "server.str",
    ),
    "ssh": (
        "host", "port", "path", "user", "host_key_check", "server.host", "server.port", "server.numeric", "server.to",
        "server.ipv4", "server.ipv6", "server.keep-alive", "server.mptcp",
    ),
    "quorum": ("vote-threshold", "blkverify", "rewrite-corrupted", "read-pattern"),
}  # fmt: skip


def members(options: Mapping[str, Value], driver: str, strong: Sequence[str]) -> dict[str, Any]:
    """What `options` say of a driver and all below it, without what only says how it is opened."""
    found: dict[str, Any] = {}
    if driver in FILE_DRIVERS:
        return {"driver": driver, "filename": str(options.get("filename"))}
    if driver == "blkdebug":
        name = str(options.get("filename", ""))
        if name:
            _, config, name = name.split(":", 2)
            options = {"config": config} if config else {}
            options |= {f"image.{key}": value for key, value in below(from_filename(name).options, "file").items()}
        found |= {key: value for key, value in options.items() if key.startswith(("inject-error.", "set-state."))}
    found |= {name: value for name, value in options.items() if name in strong}
    found["driver"] = driver
    if driver == "quorum":
        children = below(options, "children")
        count = len({key.partition(".")[0] for key in children})
        found["children"] = [_child(children, str(number)) for number in range(count)]
    elif driver not in ("null-co", "null-aio", "nbd", "ssh"):
        place = "image" if driver == "blkdebug" else "file"
        found[place] = _child(options, place)
    return {name: found[name] for name in sorted(found, key=_position)}


def _child(options: Mapping[str, Value], place: str) -> dict[str, Any]:
    child = below(options, place)
    driver = str(child.get("driver", "file"))
    return members(child, driver, STRONG.get(driver, ()))


def _position(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else _ORDER.index("driver")


class Options:
    """Options that are taken one after the other; what is left in the end nobody knows."""

    __slots__ = ("_left",)

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._left = dict(values)

    def copy(self) -> Options:
        return Options(self._left)

    def take(self, name: str) -> Value:
        """The value, or None if it was not given."""
        return self._left.pop(name, None)

    def has(self, name: str) -> bool:
        return name in self._left

    def child(self, name: str) -> dict[str, Value]:
        """Takes all options that begin with `name` and a dot."""
        found = below(self._left, name)
        for key in found:
            del self._left[f"{name}.{key}"]
        return found

    def peek(self, name: str) -> Value:
        """The value, which stays."""
        return self._left.get(name)

    def rest(self) -> dict[str, Value]:
        """Takes all."""
        found, self._left = self._left, {}
        return found

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if isinstance(value, bool):
            return "on" if value else "off"
        return None if value is None else str(value)

    def boolean(self, name: str) -> bool | None:
        value = self.take(name)
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str) and (is_on(value) or is_off(value)):
            return is_on(value)
        raise UsageError(f"Parameter '{name}' expects 'on' or 'off'")

    def size(self, name: str) -> int | None:
        """Bytes."""
        value = self.take(name)
        if value is None:
            return None
        number = value if type(value) is int else parse_size(value) if isinstance(value, str) else None
        if number is None or not 0 <= number < 1 << 64:
            raise UsageError(_SIZE_ERROR.format(name))
        return number

    def number(self, name: str) -> int | None:
        return self._number(name, r"[0-9]{1,19}", "a number")

    def integer(self, name: str) -> int | None:
        """Like `number`, of those that may be negative."""
        return self._number(name, r"-?[0-9]{1,19}", "integer")

    def _number(self, name: str, pattern: str, what: str) -> int | None:
        value = self.take(name)
        if value is None or type(value) is int:
            return value
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise UsageError(f"Parameter '{name}' expects {what}")
        return int(value)

    def choice(self, name: str, allowed: Sequence[str], message: str = "invalid parameter value: {}") -> str | None:
        value = self.text(name)
        if value is not None and value not in allowed:
            raise UsageError(message.format(value))
        return value

    @property
    def left(self) -> str | None:
        """The first one that nobody took."""
        return next(iter(self._left), None)
