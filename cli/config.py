"""What the configuration file and the environment say, for callers whose command line cannot be changed.

An option on the command line beats the environment, which beats the file: `/etc/safeimg.conf`, TOML, of which every
line may be left out::

    journal = "auto"             # or "require", "off"
    on-crash = "report"          # or "resume", "rollback"
    keep-undo = "64M"            # of each operation, for undo; 0 keeps nothing
    keep-undo-total = "1G"       # of all of them
    state-dir = "/var/lib/safeimg"
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from safeimg.cli.errors import CommandError
from safeimg.cli.values import POLICIES
from safeimg.drivers.records import NamedTuple

FILE = "/etc/safeimg.conf"
CHOSEN = "SAFEIMG_CONFIG"  # the variable that names another file; empty: none
MAX_SIZE = 64 << 10  # bytes of the file

JOURNALS = ("auto", "require", "off")
# What is kept of an operation by default holds the metadata of any, and the data of small ones: copying it takes no
# time that anybody notices, nor does it fill the disk that the state directory is on.
KEEP_UNDO = "64M"
KEEP_UNDO_TOTAL = "1G"


class _Key(NamedTuple):
    """A setting: the variable that says the same, and what its value may be, as a message tells."""

    variable: str
    allowed: str
    check: Callable[[str], bool]


def _is_size(text: str) -> bool:
    from safeimg.ops.sizes import parse_size

    size = parse_size(text)
    return size is not None and size < 1 << 63


KEYS: Mapping[str, _Key] = {
    "journal": _Key("SAFEIMG_JOURNAL", "auto, require or off", JOURNALS.__contains__),
    "on-crash": _Key("SAFEIMG_ON_CRASH", "resume, rollback or report", POLICIES.__contains__),
    "keep-undo": _Key("SAFEIMG_KEEP_UNDO", "a size such as 64M", _is_size),
    "keep-undo-total": _Key("SAFEIMG_KEEP_UNDO_TOTAL", "a size such as 1G", _is_size),
    "state-dir": _Key("SAFEIMG_STATE_DIR", "an absolute path", os.path.isabs),
}


def configure() -> None:
    """Makes what the file says the environment's, where that says nothing. Raises `CommandError`, in one line, for a
    file that cannot be read or does not make sense."""
    path = os.environ.get(CHOSEN, FILE)
    content = _read(path) if path else None
    if content is None:
        return
    for name, value in _parsed(path, content).items():
        os.environ.setdefault(KEYS[name].variable, value)


def setting(name: str, otherwise: str) -> str:
    """What the environment says of a setting, or `otherwise`. `CommandError` if it may not be that."""
    variable, allowed, check = KEYS[name]
    chosen = os.environ.get(variable, otherwise)
    if not check(chosen):
        raise CommandError(f"{variable} is '{chosen}'; it may be {allowed}")
    return chosen


def _read(path: str) -> bytes | None:
    """The file's content; None if the usual file is not there."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_SIZE + 1)
    except FileNotFoundError:
        if CHOSEN not in os.environ:
            return None
        raise CommandError(f"{path}: No such file or directory") from None
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from None
    if len(content) > MAX_SIZE:
        raise CommandError(f"{path}: a configuration file of more than {MAX_SIZE} bytes")
    return content


def _parsed(path: str, content: bytes) -> dict[str, str]:
    import tomllib

    try:
        members = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path}: {' '.join(str(error).split())}") from None
    found = {}
    for name, value in members.items():
        if name not in KEYS:
            raise CommandError(f"{path}: there is no setting {name!r}; there are {', '.join(KEYS)}")
        text = str(value) if type(value) is int else value
        if not isinstance(text, str) or "\0" in text or not KEYS[name].check(text):
            raise CommandError(f"{path}: {name} is {str(value)!r}; it may be {KEYS[name].allowed}")
        found[name] = text
    return found
