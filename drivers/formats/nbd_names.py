"""How exports of NBD servers are named: as URIs, in the form that came before, and by options. Messages are QEMU's.

`nbd[+tcp]://host[:port][/export]` and `nbd+unix:///[export]?socket=path` (https://github.com/NetworkBlockDevice/nbd,
doc/uri.md); `nbd:host:port[:exportname=export]` and `nbd:unix:path[:exportname=export]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.addresses import take_socket
from safeimg.drivers.formats.naming import Options, Value
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.address import Address, Inet, Unix
from safeimg.drivers.storage.nbd.wire import MAX_STRING

DEFAULT_PORT = "10809"

_PART = r"(?:[A-Za-z0-9\-._~!$&'()*+,;=:@{more}]|%[0-9A-Fa-f]{{2}})*"
_URI = re.compile(
    rf"nbd(?P<transport>|\+tcp|\+unix)://(?:{_PART.format(more='')}@)?"
    rf"(?P<host>\[[0-9A-Fa-f:.]+\]|{_PART.format(more='').replace(':@', '')})(?::(?P<port>[0-9]+))?"
    rf"(?:/(?P<export>{_PART.format(more='/')}))?(?:\?(?P<query>{_PART.format(more='/?')}))?"
    rf"(?:#{_PART.format(more='/?')})?"
)
_OLD_PORT = re.compile(r":([^,]{1,32})(?=,|$)")
_OLD_IPV6 = re.compile(r"\[([^\]]{1,64})\]:([^,]{1,32})(?=,|$)")
_OLD_HOST = re.compile(r"([^:]{1,64}):([^,]{1,32})(?=,|$)")


class Named(NamedTuple):
    """An export, as options name it."""

    address: Address
    export: str
    bitmap: str | None  # the metadata context that shows what a dirty bitmap has
    patience: float  # seconds to go on trying to connect


def parse_name(name: str) -> dict[str, Value]:
    """The options that a file name stands for; none if it names no server. `UsageError` if it makes no sense."""
    if "://" in name:
        return _parse_uri(name)
    rest, _, export = name.partition(":exportname=")
    options: dict[str, Value] = {}
    if ":exportname=" in name:
        if not export:
            return {}
        options["export"] = export
    if not rest.startswith("nbd:"):
        raise UsageError("File name string for NBD must start with 'nbd:'")
    address = rest[len("nbd:"):]
    if not address:
        return {}
    if address.startswith("unix:"):
        return {"server.type": "unix", "server.path": address[len("unix:"):], **options}
    host, port = _parse_address(address)
    return {"server.type": "inet", "server.host": host, "server.port": port, **options}


def _parse_uri(name: str) -> dict[str, Value]:
    found = _URI.fullmatch(name)
    wrong = UsageError("No valid URL specified")
    if found is None or int(found["port"] or 0) > 65535:
        raise wrong
    parameters = [unquote(item).partition("=") for item in re.split("[&;]", found["query"] or "") if item]
    export = unquote(found["export"] or "").partition("\0")[0]
    options: dict[str, Value] = {"export": export} if export else {}
    if found["transport"] == "+unix":
        if found["host"] or found["port"] or len(parameters) != 1 or parameters[0][0] != "socket":
            raise wrong
        return {"server.type": "unix", "server.path": parameters[0][2], **options}
    if not found["host"] or parameters:
        raise wrong
    port = int(found["port"] or 0)
    return {
        "server.type": "inet", "server.host": unquote(found["host"]).strip("[]"),
        "server.port": str(port) if port else DEFAULT_PORT, **options,
    }  # fmt: skip


def _parse_address(text: str) -> tuple[str, str]:
    """Host and port of the form without `//`. What may follow them, QEMU parses and leaves unused."""
    if text.startswith(":"):
        found, what = _OLD_PORT.match(text), "port in address"
    elif text.startswith("["):
        found, what = _OLD_IPV6.match(text), "IPv6 address"
    else:
        found, what = _OLD_HOST.match(text), "address"
    if found is None:
        raise UsageError(f"error parsing {what} '{text}'")
    if re.search(r",to=(?![0-9]+(?:,|$))", text[found.end() :]):
        raise UsageError("error parsing to= argument")
    return (found[1], found[2]) if found.re.groups == 2 else ("", found[1])


def take_named(options: Options) -> Named:
    """Takes the options that name an export. `UsageError`."""
    options.number("reconnect-delay")
    patience = options.number("open-timeout") or 0
    export = options.text("export") or ""
    credentials = options.text("tls-creds")
    options.text("tls-hostname")
    bitmap = options.text("x-dirty-bitmap")
    address = _take_address(options)
    if len(export.encode("utf-8", "surrogateescape")) > MAX_STRING:
        raise UsageError("export name too long to send to server")
    if bitmap is not None and len(bitmap.encode("utf-8", "surrogateescape")) > MAX_STRING:
        raise UsageError("x-dirty-bitmap query too long to send to server")
    if credentials is not None:  # there are no objects of this kind here
        raise UsageError(f"No TLS credentials with id '{credentials}'")
    return Named(address, export, bitmap, patience)


def _take_address(options: Options) -> Address:
    path, host = options.text("path"), options.text("host")
    port = options.text("port") if path is not None or host is not None else None
    server = options.child("server")
    if path is not None and host is not None:
        raise UsageError("path and host may not be used at the same time")
    if path is not None and port is not None:
        raise UsageError("port may not be used without host")
    if (path is not None or host is not None) and server:
        raise UsageError("Cannot use 'server' and path/host/port at the same time")
    if path is not None:
        return Unix(path)
    if host is not None:
        return Inet(host, DEFAULT_PORT if port is None else port)
    if not server:
        raise UsageError("NBD server address missing")
    return take_socket(Options(server))


def plain_name(members: Mapping[str, Any]) -> str | None:
    """The URI that QEMU calls an open export by; None where it says less than the options."""
    export = f"/{members['export']}" if members.get("export") else ""
    path = members.get("path", members.get("server.path"))
    if path is not None:
        return f"nbd+unix:/{export and '/'}{export or '/'}?socket={path}"
    if any(f"server.{name}" in members for name in ("to", "ipv4", "ipv6")):
        return None
    host = members.get("host", members.get("server.host"))
    if host is None or members.get("server.type", "inet") != "inet":
        return None
    port = members.get("port", members.get("server.port", DEFAULT_PORT))
    return f"nbd://{host}:{port}{export}"
