"""Pointer files: beside a participant, under the name that its own log would have, saying whose log it is in.

    magic 16 │ version u32 │ payload length u32 │ payload (msgpack) │ BLAKE3-256 of all before

A pointer appears under its name whole or not at all: an empty file reserves the name (and is locked
meanwhile), a second file, synced, is renamed over it. So an empty file means nothing, and a bad one was
damaged.
"""

from __future__ import annotations

import os
import struct

from blake3 import blake3
from safeimg.drivers.records import NamedTuple
from safeimg.journal.errors import LogBusy, LogDamaged, LogForeign
from safeimg.journal.events import Identity
from safeimg.journal.files import File, FileStat, FileSystem, Lockable, system_error
from safeimg.journal.trust import check_trusted, sidecar_stat
from safeimg.journal.wire import (
    BadEvent,
    Scope,
    items,
    optional,
    pack,
    read_identity,
    read_operation,
    read_text,
    unpack,
)

POINTER_MAGIC = b"safeimg ptr\r\n\x1a\n\0"
VERSION = 1
MAX_POINTER = 1 << 20
NEW_SUFFIX = "-new"

_HEADER = struct.Struct("<16sII")  # magic, version, payload length
_HASH = 32


class Pointer(NamedTuple):
    """What a participant's pointer file says."""

    operation: str
    home: Identity
    home_path: str  # relative to the pointer's folder where possible
    participant: Identity  # a renamed participant is recognised by it
    machine: str  # where the operation was declared
    log: str | None = (
        None  # the log's path if it is not beside the home image; relative to the pointer's folder
    )


def write_pointer(files: FileSystem, path: str, pointer: Pointer, like: FileStat) -> None:
    """Creates the pointer file, durable, mode 0600, of the owner and group of `like` (the participant).

    A log or pointer that is there already is the storage layer's EEXIST. Raises `LogBusy` if somebody takes
    the name meanwhile."""
    payload = pack(
        [
            pointer.operation,
            _wire(pointer.home),
            pointer.home_path,
            _wire(pointer.participant),
            pointer.machine,
            pointer.log,
        ]
    )
    start = _HEADER.pack(POINTER_MAGIC, VERSION, len(payload)) + payload
    reserved = files.create(path, mode=0o600, exclusive=True)
    try:
        if isinstance(reserved, Lockable) and not reserved.try_lock():
            raise LogBusy(path)
        there = files.stat(path)
        if there is None or there.inode != reserved.stat().inode:
            raise LogBusy(path)
        try:
            _write_new(files, path + NEW_SUFFIX, start + blake3(start).digest(), like)
            files.rename(path + NEW_SUFFIX, path)
        except BaseException:
            remove_quietly(files, path + NEW_SUFFIX)
            remove_quietly(files, path)
            raise
        files.sync_directory(os.path.dirname(path) or ".")
    finally:
        reserved.close()


def read_pointer(files: FileSystem, path: str, *, image_owner: int | None = None) -> Pointer | None:
    """The pointer at `path`; None if nothing is there, or a log. Raises `LogForeign`, `LogDamaged`."""
    if sidecar_stat(files, path, image_owner) is None:
        return None
    file = files.open(path)
    try:
        check_trusted(file.stat(), path, image_owner)
        return _parse(file) if file.pread(0, len(POINTER_MAGIC)) == POINTER_MAGIC else None
    finally:
        file.close()


def remove_quietly(files: FileSystem, path: str) -> None:
    """Removes `path` if that works."""
    try:
        files.unlink(path)
    except Exception as error:
        if system_error(error) is None:
            raise


def _write_new(files: FileSystem, path: str, data: bytes, like: FileStat) -> None:
    remove_quietly(files, path)  # left by a crash; or a link, which must not be followed
    file = files.create(path, mode=0o600, exclusive=True)
    try:
        files.give_to(path, like.uid, like.gid)
        file.pwrite(0, data)
        file.sync_all()
    finally:
        file.close()


def _wire(identity: Identity) -> list[int | str | None]:
    return [
        identity.device,
        identity.inode,
        identity.size,
        identity.mtime_ns,
        identity.ctime_ns,
        identity.tag,
    ]


def _parse(file: File) -> Pointer:
    path = file.path
    head = file.pread(0, _HEADER.size)
    if len(head) < _HEADER.size:
        raise LogDamaged(path, "the pointer file ends within its header", len(head))
    _, version, size = _HEADER.unpack(head)
    if version != VERSION:
        raise LogForeign(
            f"{path}: a pointer of format version {version}; this safeimg knows version {VERSION}"
        )
    if size > MAX_POINTER or _HEADER.size + size + _HASH != file.length():
        raise LogDamaged(path, f"the pointer file says {size} bytes and has {file.length()}", 20)
    data = file.pread(0, _HEADER.size + size + _HASH)
    if blake3(data[:-_HASH]).digest() != data[-_HASH:]:
        raise LogDamaged(path, "the pointer file does not match its checksum", 0)
    scope = Scope(0)
    try:
        operation, home, home_path, participant, machine, log = items(unpack(data[_HEADER.size : -_HASH]), 6)
        return Pointer(
            read_operation(operation, scope),
            read_identity(home, scope),
            read_text(home_path, scope),
            read_identity(participant, scope),
            read_text(machine, scope),
            optional(read_text)(log, scope),
        )
    except BadEvent as error:
        raise LogDamaged(path, f"the pointer file: {error}", _HEADER.size) from None
