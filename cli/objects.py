"""`--object`: QEMU's user-creatable objects. Secrets are kept (`drivers.secrets`); what else QEMU could make is
checked and left alone, since nothing here refers to it.

Messages name ids and parameters, never a value that may be a secret."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from safeimg.cli.errors import Answer, CommandError
from safeimg.drivers.errors import UsageError
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.secrets import Secrets, decode_base64, decrypt

MAX_SECRET = 16 << 20  # bytes that a secret's file may hold

_SECRET = ("data", "file", "format", "iv", "keyid", "loaded")
# What `--object help` lists, and whether qemu-img was built with it
_KINDS = (
    "authz-list", "authz-list-file", "authz-simple", "main-loop", "pr-manager-helper", "secret", "secret_keyring",
    "thread-context", "throttle-group", "tls-cipher-suites", "tls-creds-anon", "tls-creds-psk", "tls-creds-x509",
)  # fmt: skip
_UNNAMED = ("authz-list-file",)  # its listed name is not the one that it is made by
_ABSENT = (
    "authz-listfile", "authz-pam", "can-bus", "can-host-socketcan", "colo-compare", "cryptodev-backend",
    "cryptodev-backend-builtin", "cryptodev-vhost-user", "dbus-vmstate", "filter-buffer", "filter-dump",
    "filter-mirror", "filter-redirector", "filter-replay", "filter-rewriter", "input-barrier", "input-linux",
    "iothread", "memory-backend-epc", "memory-backend-file", "memory-backend-memfd", "memory-backend-ram",
    "pef-guest", "qtest", "rng-builtin", "rng-egd", "rng-random", "s390-pv-guest", "sev-guest", "x-remote-object",
    "x-vfio-user-server",
)  # fmt: skip
_ID = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_\-]*(\.[A-Za-z0-9][A-Za-z0-9_\-]*)*")


class UserObject(NamedTuple):
    """One `--object`, checked for itself."""

    kind: str
    name: str
    members: dict[str, str]

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}>"


def user_object(text: str) -> UserObject:
    """Reads `kind,id=…,name=value…`, or the same as JSON. Raises `CommandError` in QEMU's words, and `Answer`."""
    members = _from_json(text) if text.startswith("{") else dict(_keyval(text))
    if "help" in members and not text.startswith("{"):
        raise Answer(*_help(members.get("qom-type")))
    kind = members.pop("qom-type", None)
    if kind is None:
        raise CommandError("Parameter 'qom-type' is missing")
    if kind in _UNNAMED or kind not in _KINDS + _ABSENT:
        raise CommandError(f"Parameter 'qom-type' does not accept value '{kind}'")
    name = members.pop("id", None)
    if name is None:
        raise CommandError("Parameter 'id' is missing")
    if kind == "secret":
        _check_secret(members)
    if not _ID.fullmatch(name):
        raise CommandError(
            "Parameter 'id' expects an identifier\n"
            "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
        )
    if kind in _ABSENT:
        raise CommandError(f"invalid object type: {kind}")
    return UserObject(kind, name, members)


def store(each: UserObject, others: Iterable[UserObject], secrets: Secrets) -> None:
    """Adds the object, if it is one, to the `secrets`, which those before it may have been added to: `others`. Raises
    `CommandError`."""
    is_known = any(each.name == other.name for other in others)
    if each.kind == "secret":
        try:
            content = _load(each.members, secrets)
        except UsageError as error:
            raise CommandError(str(error)) from None
        if not is_known:
            secrets.add(each.name, content)
    if is_known:
        raise CommandError(f"attempt to add duplicate property '{each.name}' to object (type 'container')")


def _load(members: dict[str, str], secrets: Secrets) -> bytes:
    data, file = members.get("data"), members.get("file")
    if data is not None and file is not None:
        raise CommandError("'file' and 'data' are mutually exclusive")
    if file is not None:
        content = _read(file)
    elif data is not None:
        content = data.encode("utf-8", "surrogateescape")
    else:
        raise CommandError("Either 'file' or 'data' must be provided")
    is_base64 = members.get("format") == "base64"
    if "keyid" in members:
        key = secrets.lookup(members["keyid"])
        if "iv" not in members:
            raise CommandError("IV is required to decrypt secret")
        iv = decode_base64(members["iv"].encode("utf-8", "surrogateescape"))
        return decrypt(decode_base64(content) if is_base64 else content, key, iv)
    return decode_base64(content) if is_base64 else content


def _read(path: str) -> bytes:
    """A secret's file, from wherever it comes: a pipe will do."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SECRET + 1)
    except IsADirectoryError as error:
        raise CommandError(f"Unable to read {path}: Error reading file “{path}”: {error.strerror}") from None
    except OSError as error:
        raise CommandError(f"Unable to read {path}: Failed to open file “{path}”: {error.strerror}") from None
    if len(content) > MAX_SECRET:
        raise CommandError(f"Unable to read {path}: it is larger than {MAX_SECRET} bytes")
    return content


def _check_secret(members: dict[str, str]) -> None:
    for name in members:
        first, nested, _ = name.partition(".")
        if nested:
            known = first in (*_SECRET, "id")
            what = f"Parameters '{first}.*' are" if known else f"Parameter '{first}' is"
            raise CommandError(f"{what} unexpected")
        if name not in _SECRET:
            raise CommandError(f"Parameter '{name}' is unexpected")
    if members.get("format", "raw") not in ("raw", "base64"):
        raise CommandError(f"Parameter 'format' does not accept value '{members['format']}'")
    if "loaded" in members:
        if members["loaded"] not in ("on", "off", "yes", "no", "true", "false", "y", "n"):
            raise CommandError("Parameter 'loaded' expects 'on' or 'off'")
        raise CommandError("Property 'secret.loaded' is not writable")


def _keyval(text: str) -> Iterator[tuple[str, str]]:
    """QEMU's stricter syntax: every name but the first has a value; two commas are one in a value."""
    at, first = 0, True
    while at < len(text):
        end = next((i for i in range(at, len(text)) if text[i] in "=,"), len(text))
        name = text[at:end]
        if text[end : end + 1] == "=":
            if not _NAME.fullmatch(name):
                raise CommandError(f"Invalid parameter '{name}'")
            match = re.compile(r"(?:[^,]|,,)*").match(text, end + 1)
            assert match is not None
            yield name, match.group().replace(",,", ",")
            at = match.end() + 1
        else:
            if name in ("help", "?"):
                yield "help", "on"
            elif first and name:
                yield "qom-type", name
            else:
                raise CommandError(
                    f"Expected '=' after parameter '{name}'" if name else "Invalid parameter ''"
                )
            at = end + 1
        first = False


def _from_json(text: str) -> dict[str, str]:
    """The members of an object given as JSON."""
    from safeimg.drivers.formats.jsontext import JsonError, parse_json

    try:
        found: Any = parse_json(text)
    except JsonError as error:
        raise CommandError(str(error)) from None
    members: dict[str, str] = {}
    for name, value in found.items():
        if isinstance(value, bool) and name == "loaded":
            value = "on" if value else "off"
        if not isinstance(value, str) and name in (*_SECRET, "id", "qom-type"):
            raise CommandError(f"Invalid parameter type for '{name}', expected: string")
        members[name] = value if isinstance(value, str) else str(value)
    return members


def _help(kind: str | None) -> Iterator[str]:
    if kind == "secret":
        yield "secret options:"
        for name, what in (("data", "string"), ("file", "string"), ("format", "QCryptoSecretFormat"),
                           ("iv", "string"), ("keyid", "string")):  # fmt: skip
            yield f"  {name}=<{what}>"
        return
    yield "List of user creatable objects:"
    for name in _KINDS:
        yield f"  {name}"
