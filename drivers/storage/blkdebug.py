"""blkdebug: a file whose reads and writes fail when its rules say so. QEMU's, documented in docs/devel/blkdebug.txt.

Two kinds of rules watch for events: one changes the state (a number, 1 at first), the other makes the request fail.
safeimg has these events: `read_aio` (guest data is read), `write_aio` (anything is written), `pwritev_zero` and
`flush_to_disk`; QEMU's other ones are known and never happen. Rules for the event `none` look at every request.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from safeimg.drivers.errors import StorageError, SyncFailed, UsageError
from safeimg.drivers.storage.api import Buffer, File, FileStat
from safeimg.drivers.storage.layer import FileLayer
from safeimg.drivers.storage.virtual import UNKNOWN

SECTOR = 512
MAX_CONFIG = 1 << 20  # bytes of a configuration file

EVENTS = frozenset((
    "l1_update", "l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table", "l2_load", "l2_update",
    "l2_update_compressed", "l2_alloc_cow_read", "l2_alloc_write", "read_aio", "read_backing_aio", "read_compressed",
    "write_aio", "write_compressed", "vmstate_load", "vmstate_save", "cow_read", "cow_write", "reftable_load",
    "reftable_grow", "reftable_update", "refblock_load", "refblock_update", "refblock_update_part", "refblock_alloc",
    "refblock_alloc_hookup", "refblock_alloc_write", "refblock_alloc_write_blocks", "refblock_alloc_write_table",
    "refblock_alloc_switch_table", "cluster_alloc", "cluster_alloc_bytes", "cluster_free", "flush_to_os",
    "flush_to_disk", "pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev_rmw_tail", "pwritev_rmw_after_tail",
    "pwritev", "pwritev_zero", "pwritev_done", "empty_image_prepare", "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters", "cor_write", "cluster_alloc_space", "none",
))  # fmt: skip
REQUESTS = ("read", "write", "write-zeroes", "discard", "flush", "block-status")

_INJECT, _SET = "inject-error", "set-state"
_KNOWN = {
    _INJECT: ("event", "state", "iotype", "errno", "sector", "once", "immediately"),
    _SET: ("event", "state", "new_state"),
}
_GROUP = re.compile(r'\[([a-z-]+)(?: "[^"]*")?\]')
_SETTING = re.compile(r'(\S+)\s+=\s*"([^"]*)"')


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens on an event: the request fails with `code`, or (without one) the state changes."""

    event: str
    state: int = 0  # in which it applies; 0: in any
    code: int = 0
    requests: tuple[str, ...] = REQUESTS[:-1]  # that fail
    sector: int = -1  # that a request has to touch to fail; -1: any
    once: bool = False
    new_state: int = 0

    def touches(self, offset: int, length: int) -> bool:
        return self.sector < 0 or -length < offset - self.sector * SECTOR < SECTOR


def read_rules(path: str) -> list[Rule]:
    """The rules of a configuration file. `UsageError` in QEMU's words."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(MAX_CONFIG).splitlines()
    except OSError as error:
        raise UsageError(f"Could not read blkdebug config file: {error.strerror}") from error
    groups: list[tuple[str, dict[str, str]]] = []
    for line in map(str.strip, lines):
        if not line or line.startswith("#"):
            continue
        if found := _GROUP.fullmatch(line):
            if found[1] not in _KNOWN:
                raise UsageError(f"There is no option group '{found[1]}'")
            groups.append((found[1], {}))
        elif not groups:
            raise UsageError("no group defined")
        elif (setting := _SETTING.fullmatch(line)) and setting[1] in _KNOWN[groups[-1][0]]:
            groups[-1][1][setting[1]] = setting[2]
        else:
            raise UsageError(f"Invalid parameter '{setting[1] if setting else line}'")
    return [_rule(kind, settings) for kind, settings in groups]


def rules_of(kind: str, options: Mapping[str, object]) -> list[Rule]:
    """The rules in options named `N.SETTING`; `kind` is "inject-error" or "set-state"."""
    groups: dict[str, dict[str, object]] = {}
    for name, value in options.items():
        number, _, setting = name.partition(".")
        if not number.isdigit() or setting not in _KNOWN[kind]:
            raise UsageError(f"Invalid parameter '{setting or name}'")
        groups.setdefault(number, {})[setting] = value
    return [_rule(kind, groups[number]) for number in sorted(groups, key=int)]


def _rule(kind: str, settings: Mapping[str, object]) -> Rule:
    if "event" not in settings:
        raise UsageError("Missing event name for rule")
    event = _choice(settings, "event", tuple(EVENTS))
    state = _number(settings, "state", 0)
    if kind == _SET:
        return Rule(event, state, new_state=_number(settings, "new_state", 0))
    _flag(settings, "immediately")
    requests = (_choice(settings, "iotype", REQUESTS),) if "iotype" in settings else REQUESTS[:-1]
    return Rule(
        event, state, _number(settings, "errno", errno.EIO), requests, _number(settings, "sector", -1),
        _flag(settings, "once"),
    )  # fmt: skip


def _choice(settings: Mapping[str, object], name: str, known: tuple[str, ...]) -> str:
    value = str(settings[name])
    if value not in known:
        raise UsageError(f"invalid parameter value: {value}")
    return value


def _number(settings: Mapping[str, object], name: str, default: int) -> int:
    value = settings.get(name, default)
    if isinstance(value, bool) or not re.fullmatch(r"-?[0-9]{1,10}", str(value)):
        raise UsageError(f"Parameter '{name}' expects a number")
    return int(str(value))


def _flag(settings: Mapping[str, object], name: str) -> bool:
    value = settings.get(name, False)
    if value not in (True, False, "on", "off"):
        raise UsageError(f"Parameter '{name}' expects 'on' or 'off'")
    return value in (True, "on")


class Blkdebug(FileLayer):
    """Implements `api.File`: another file, with requests that fail."""

    def __init__(self, file: File, rules: list[Rule]) -> None:
        super().__init__(file)
        self._rules = rules
        self._state = 1
        self._lock = threading.Lock()

    def _request(self, event: str, request: str, offset: int = 0, length: int = 0) -> None:
        """An event, and the request that comes with it; `StorageError` if that is to fail."""
        with self._lock:
            state, failed = self._state, None
            for rule in self._rules:
                if rule.event not in (event, "none") or rule.state not in (0, state):
                    continue
                if not rule.code:
                    self._state = rule.new_state
                elif failed is None and request in rule.requests and rule.touches(offset, length):
                    failed = rule
            if failed is None:
                return
            if failed.once:
                self._rules.remove(failed)
        error = OSError(failed.code, os.strerror(failed.code))
        raise (SyncFailed if request == "flush" else StorageError)(self.path, request, error)

    def pread(self, offset: int, length: int) -> bytes:
        """Metadata is read so."""
        self._request("", "read", offset, length)
        return self._file.pread(offset, length)

    def pread_into(self, offset: int, buffer: memoryview) -> int:
        """Guest data is read so."""
        self._request("read_aio", "read", offset, len(buffer))
        return self._file.pread_into(offset, buffer)

    def pwrite(self, offset: int, data: Buffer) -> None:
        self._request("write_aio", "write", offset, len(data))
        self._file.pwrite(offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._request("pwritev_zero", "write-zeroes", offset, length)
        self._file.write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        try:
            self._request("", "discard", offset, length)
        except StorageError:
            return  # a hint that is not taken
        self._file.discard(offset, length)

    def sync(self) -> None:
        self._request("flush_to_disk", "flush")
        self._file.sync()

    def sync_all(self) -> None:
        self._request("flush_to_disk", "flush")
        self._file.sync_all()

    def stat(self) -> FileStat:
        """Of the file below, without the space it takes, as in QEMU."""
        return self._file.stat()._replace(allocated=UNKNOWN)
