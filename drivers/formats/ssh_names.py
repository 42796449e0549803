"""How files on other machines are named that are read over ssh: `ssh://[user@]host[:port]/path[?host_key_check=…]`, and
by options. Messages are QEMU's."""

from __future__ import annotations

import getpass
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from safeimg.drivers.errors import UsageError
from safeimg.drivers.formats.addresses import refuse_left, required, take_inet
from safeimg.drivers.formats.naming import Options, Value
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.address import Inet
from safeimg.drivers.storage.ssh import HASHES, HostKeyCheck

DEFAULT_PORT = "22"

_LETTERS = r"A-Za-z0-9\-._~!$&'()*+,;="
_URI = re.compile(
    rf"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*):|(?![^/?#]*:))(?://(?:(?P<user>[{_LETTERS}:%]*)@)?"
    rf"(?P<host>\[[0-9A-Fa-f:.]+\]|[{_LETTERS}%]*)(?::(?P<port>[0-9]+))?(?P<path>/[{_LETTERS}:@/%]*)?"
    rf"|(?!//)[{_LETTERS}:@/%]*)(?:\?(?P<query>[{_LETTERS}:@/?%]*))?(?:#.*)?"
)


class Named(NamedTuple):
    """A file, as options name it."""

    address: Inet
    user: str
    path: str
    check: HostKeyCheck


def parse_name(name: str) -> dict[str, Value]:
    """The options that a URI stands for; none if it is none. `UsageError`."""
    found = _URI.fullmatch(name)
    if found is None or int(found["port"] or 0) > 65535:
        return {}
    if found["scheme"] != "ssh":
        raise UsageError("URI scheme must be 'ssh'")
    if not found["host"]:
        raise UsageError("missing hostname in URI")
    if not found["path"]:
        raise UsageError("missing remote path in URI")
    options: dict[str, Value] = {} if not found["user"] else {"user": unquote(found["user"])}
    port = int(found["port"] or 0)
    options |= {"host": unquote(found["host"]), "port": str(port) if port else DEFAULT_PORT}
    options["path"] = unquote(found["path"])
    for item in re.split("[&;]", found["query"] or ""):
        parameter, _, value = unquote(item).partition("=")
        if parameter == "host_key_check":
            options[parameter] = value
    return options


def take_named(options: Options) -> Named:
    """Takes all options. `UsageError`."""
    host, port = options.text("host"), options.text("port")
    if port is not None and not re.fullmatch(r"-?[0-9]{1,19}", port):
        raise UsageError("Parameter 'port' expects a number")
    if port is not None and host is None:
        raise UsageError("port may not be used without host")
    check, legacy = options.child("host-key-check"), options.text("host_key_check")
    if legacy is not None:
        check = _legacy(legacy)
    server = options.child("server")
    if host is not None:
        server |= {"host": host, "port": port or DEFAULT_PORT}
    if not server:
        raise UsageError("Parameter 'server' is missing")
    address = take_inet(Options(server), "server.")
    path = required(options, "path")
    user = options.text("user")
    how = _take_check(Options(check)) if check else HostKeyCheck("known_hosts")
    refuse_left(options)
    if not re.fullmatch("-?[0-9]+", address.port):
        raise UsageError("Use only numeric port value")
    return Named(address, _login() if user is None else user, path, how)


def _legacy(text: str) -> dict[str, Value]:
    kind, colon, value = text.partition(":")
    if text == "no":
        return {"mode": "none"}
    if text == "yes":
        return {"mode": "known_hosts"}
    if colon and kind in HASHES:
        return {"mode": "hash", "type": kind, "hash": value}
    raise UsageError(f"unknown host_key_check setting ({text})")


def _take_check(given: Options) -> HostKeyCheck:
    prefix = "host-key-check."
    mode = required(given, "mode", prefix)
    kind = value = ""
    if mode == "hash":
        kind = required(given, "type", prefix)
        if kind not in HASHES:
            raise UsageError(f"Parameter 'type' does not accept value '{kind}'")
        value = required(given, "hash", prefix)
    elif mode not in ("none", "known_hosts"):
        raise UsageError(f"Parameter 'mode' does not accept value '{mode}'")
    refuse_left(given, prefix)
    return HostKeyCheck(mode, kind, value)


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise UsageError("Can't get user name") from None


def plain_name(members: Mapping[str, Any]) -> str | None:
    """The URI that QEMU calls an open file by; None where it says less than the options."""
    if any(f"server.{name}" in members for name in ("to", "ipv4", "ipv6")):
        return None
    host = members.get("host", members.get("server.host"))
    port = members.get("port", members.get("server.port", DEFAULT_PORT))
    check = f"?host_key_check={members['host_key_check']}" if "host_key_check" in members else ""
    if host is None or "path" not in members:
        return None
    return f"ssh://{members.get('user', _login())}@{host}:{port}{members['path']}{check}"
