"""Who runs an operation, and whether that process is still alive."""

from __future__ import annotations

import os
from typing import Literal

from safeimg.drivers.records import NamedTuple
from safeimg.journal.events import Owner

Liveness = Literal["alive", "dead", "unknown"]

_MACHINE_IDS = ("/etc/machine-id", "/var/lib/dbus/machine-id")
_NO_ID = "host:"  # what the id of a machine without one begins with


class _Process(NamedTuple):
    state: str
    started: int  # clock ticks after boot


def current_owner() -> Owner:
    """This process."""
    process = _process(os.getpid())
    started = 0 if process is None else process.started
    return Owner(_machine(), _boot(), os.getpid(), started, os.geteuid(), _host())


def liveness(owner: Owner) -> Liveness:
    """Whether the process that `owner` describes still runs.

    "unknown" when it cannot be seen from here: on another machine (or one that was cloned from this: then the
    host name tells), or in another container of this one.
    """
    if owner.machine != _machine() or owner.host != _host():
        return "unknown"
    boot, _, pids = owner.boot.partition(" ")
    here, _, our_pids = _boot().partition(" ")
    if not boot or not here:
        return "unknown"
    if boot != here:
        return "unknown" if owner.machine.startswith(_NO_ID) else "dead"
    if pids != our_pids:
        return "unknown"
    process = _process(owner.pid)
    if process is None:
        return "unknown" if _exists(owner.pid) else "dead"
    return "dead" if process.state in "ZX" or process.started != owner.started else "alive"


def _machine() -> str:
    for path in _MACHINE_IDS:
        found = _first_line(path)
        if found and found != "uninitialized":
            return found
    return _NO_ID + _host()


def _boot() -> str:
    """The boot's id and the pid namespace, in which alone a pid means something. Empty if unknown."""
    boot = _first_line("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot} {os.readlink('/proc/self/ns/pid')}" if boot else ""
    except OSError:
        return boot


def _process(pid: int) -> _Process | None:
    """Fields 3 and 22 of /proc/PID/stat (proc_pid_stat(5)); None if it cannot be read.

    Field 2, the program's name, stands in parentheses and may hold anything, parentheses too."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return _Process(fields[0].decode("ascii"), int(fields[19]))
    except (OSError, ValueError, IndexError):
        return None


def _exists(pid: int) -> bool:
    """A process of that number is there (/proc may hide those of others)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return pid > 0


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip().partition("\n")[0]
    except OSError:
        return ""


def _host() -> str:
    return os.uname().nodename
