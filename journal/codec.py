"""Events to bytes and back, for the log: msgpack, strict, and safe against hostile input.

An event is a msgpack array `[kind, {field: value, …}]` with every field present and none besides; records are
arrays of their fields in order. Bytes that hold long runs of zeroes are arrays of alternating pieces: bytes, or
the length of a run. `docs/journal-format.md` has it in full. What `encode_event` writes, `decode_event` has
accepted before: an event that could not be read back is refused before it reaches the disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import msgpack

from safeimg.journal import events as ev
from safeimg.journal.errors import JournalError

MAX_PAYLOAD = 64 << 20  # of one event, in msgpack and again with its runs of zeroes spelled out
MAX_IMAGES = 4096
DIGEST = 32  # BLAKE3-256
DIGEST_CHUNK = 64 << 10  # bytes that one digest of guest data covers

_LIMIT = (1 << 63) - 1
_MAX_TEXT = 1 << 17
_MAX_DEPTH = 32
_MAX_ITEMS = 1 << 20
_ZERO_RUN = bytes(64)  # shorter runs are not worth a piece of their own
_ZEROES = re.compile(rb"\0+")
_OPERATION = re.compile(r"[0-9a-f]{32}")


class BadEvent(JournalError):
    """These bytes or this object are not an event as the format allows it."""


class _Scope:
    """What one event is judged against."""

    __slots__ = ("images", "room")

    def __init__(self, images: int) -> None:
        self.images = images
        self.room = MAX_PAYLOAD  # what runs of zeroes may still add up to


_Read = Callable[[object, _Scope], Any]


def encode_event(event: ev.Event, *, images: int = MAX_IMAGES) -> bytes:
    """The event's payload. `images`: how many the operation declared. Raises `BadEvent` if it breaks the format."""
    kind = type(event).__name__
    if kind not in _KINDS:
        raise BadEvent(f"not an event: {kind}")
    patches = _PATCHES.get(kind, ())
    values = {
        item.name: [_wire_patch(patch) for patch in getattr(event, item.name)]
        if item.name in patches
        else _wire(getattr(event, item.name))
        for item in fields(event)
    }
    try:
        payload: bytes = msgpack.packb([kind, values], use_bin_type=True, unicode_errors="surrogateescape")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BadEvent(f"{kind} cannot be recorded: {error}") from None
    decode_event(payload, images=images)
    return payload


def decode_event(payload: bytes, *, images: int = MAX_IMAGES) -> ev.Event:
    """The event in `payload`. Raises `BadEvent` for anything that `encode_event` cannot have written."""
    if len(payload) > MAX_PAYLOAD:
        raise BadEvent(f"an event of {len(payload)} bytes, more than {MAX_PAYLOAD}")
    try:
        wire = msgpack.unpackb(
            payload, raw=False, unicode_errors="surrogateescape", object_pairs_hook=_map,
            max_array_len=min(len(payload), _MAX_ITEMS), max_map_len=min(len(payload), _MAX_ITEMS),
            max_str_len=min(len(payload), _MAX_TEXT * 4), max_ext_len=0,
        )  # fmt: skip
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError, MemoryError) as error:
        raise BadEvent(f"not msgpack as events use it ({_line(error)})") from None
    if not isinstance(wire, list) or len(wire) != 2 or not isinstance(wire[0], str) or not isinstance(wire[1], dict):
        raise BadEvent("not a pair of kind and fields")
    kind, values = wire
    if kind not in _KINDS:
        raise BadEvent(f"unknown kind of event {kind[:40]!r}")
    build, readers = _KINDS[kind]
    if values.keys() != readers.keys():
        odd = sorted(map(repr, values.keys() ^ readers.keys()))
        raise BadEvent(f"{kind}: missing or unknown field {odd[0][:40]}")
    scope = _Scope(images)
    found = {}
    for name, read in readers.items():
        try:
            found[name] = read(values[name], scope)
        except BadEvent as error:
            raise BadEvent(f"{kind}.{name}: {error}") from None
    event: ev.Event = build(**found)
    if isinstance(event, ev.Started) and len(event.lengths) != images != MAX_IMAGES:
        raise BadEvent(f"Started.lengths: {len(event.lengths)} lengths for {images} images")
    return event


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _map(pairs: list[tuple[object, object]]) -> dict[object, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a map with the same key twice")
    return found


# -- writing ---------------------------------------------------------------------------------------------------------


def _wire(value: Any) -> Any:
    """`value` as msgpack types. Records are tuples already; dataclasses become arrays of their fields."""
    if isinstance(value, ev.Identity | ev.Owner | ev.ImageRecord):
        return [_wire(getattr(value, item.name)) for item in fields(value)]
    if isinstance(value, tuple) and value and isinstance(value[0], ev.ImageRecord | tuple):
        return [_wire(item) for item in value]
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], ev.Identity):
        return [value[0], _wire(value[1])]
    return value


def _wire_patch(patch: ev.PatchRecord | ev.FinishRecord) -> list[Any]:
    before = None if patch.before is None else _wire_bytes(patch.before)
    return [patch.image, patch.offset, before, _wire_bytes(patch.after)]


def _wire_bytes(data: bytes) -> bytes | list[bytes | int]:
    """`data`, or its pieces if it holds runs of zeroes long enough."""
    at = data.find(_ZERO_RUN)
    if at < 0:
        return bytes(data)
    pieces: list[bytes | int] = []
    done = 0
    while at >= 0:
        run = _ZEROES.match(data, at)
        assert run is not None
        if at > done:
            pieces.append(data[done:at])
        pieces.append(run.end() - at)
        done = run.end()
        at = data.find(_ZERO_RUN, done)
    if done < len(data):
        pieces.append(data[done:])
    return pieces


# -- reading ---------------------------------------------------------------------------------------------------------


def _number(low: int, high: int) -> _Read:
    def read(value: object, scope: _Scope) -> int:
        if type(value) is not int or not low <= value <= high:
            raise BadEvent(f"expected an integer from {low} to {high}")
        return value

    return read


def _read_text(value: object, scope: _Scope) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or "\0" in value:
        raise BadEvent(f"expected text of up to {_MAX_TEXT} characters without NUL")
    return value


def _read_operation(value: object, scope: _Scope) -> str:
    if not isinstance(value, str) or not _OPERATION.fullmatch(value):
        raise BadEvent("expected 32 hexadecimal digits")
    return value


def _read_action(value: object, scope: _Scope) -> str:
    if value not in ("resume", "rollback"):
        raise BadEvent("expected resume or rollback")
    return str(value)


def _read_flag(value: object, scope: _Scope) -> bool:
    if not isinstance(value, bool):
        raise BadEvent("expected true or false")
    return value


def _read_time(value: object, scope: _Scope) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise BadEvent("expected a time")
    return float(value)  # type: ignore[arg-type]


def _read_bytes(value: object, scope: _Scope) -> bytes:
    """Bytes, or pieces of them: never empty, never more than `MAX_PAYLOAD` in one event."""
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, list) or not value:
        raise BadEvent("expected bytes")
    parts: list[bytes] = []
    last: type | None = None
    for piece in value:
        if type(piece) is last:
            raise BadEvent("expected runs of zeroes and other bytes in turn")
        last = type(piece)
        if isinstance(piece, bytes) and piece:
            parts.append(piece)
        elif type(piece) is int and 0 < piece <= scope.room:
            scope.room -= piece
            parts.append(bytes(piece))
        else:
            raise BadEvent(f"expected bytes or a run of up to {scope.room} zeroes")
    return b"".join(parts)


def _optional(read: _Read) -> _Read:
    return lambda value, scope: None if value is None else read(value, scope)


def _many(read: _Read, limit: int = _MAX_ITEMS) -> _Read:
    def read_many(value: object, scope: _Scope) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > limit:
            raise BadEvent(f"expected a list of up to {limit} items")
        return tuple([read(item, scope) for item in value])

    return read_many


def _items(value: object, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        raise BadEvent(f"expected a record of {count} fields")
    return value


_read_offset = _number(0, _LIMIT)
_read_word = _number(0, (1 << 64) - 1)
_read_signed = _number(-(1 << 63), _LIMIT)
_read_number = _number(0, _LIMIT)


def _read_image(value: object, scope: _Scope) -> int:
    if type(value) is not int or not 0 <= value < scope.images:
        raise BadEvent(f"expected the index of one of {scope.images} images")
    return value


def _range(image: object, offset: object, length: object, scope: _Scope) -> tuple[int, int, int]:
    index = _read_image(image, scope)
    if type(offset) is not int or type(length) is not int or offset < 0 or length < 1 or offset + length > _LIMIT:
        raise BadEvent("expected a range that is not empty and ends below 2^63")
    return index, offset, length


def _read_patch(value: object, scope: _Scope) -> ev.PatchRecord:
    image, offset, before, after = _items(value, 4)
    new = _read_bytes(after, scope)
    old = None if before is None else _read_bytes(before, scope)
    if old is not None and len(old) != len(new):
        raise BadEvent(f"{len(old)} bytes before and {len(new)} after")
    image, offset, _ = _range(image, offset, len(new), scope)
    return ev.PatchRecord(image, offset, old, new)


def _read_finish(value: object, scope: _Scope) -> ev.FinishRecord:
    patch = _read_patch(value, scope)
    if patch.before is None:
        raise BadEvent("expected the bytes before")
    return ev.FinishRecord(patch.image, patch.offset, patch.before, patch.after)


def _read_move(value: object, scope: _Scope) -> ev.MoveRecord:
    image, offset, length, source = _items(value, 4)
    image, offset, length = _range(image, offset, length, scope)
    if source is not None:
        _range(image, source, length, scope)
    return ev.MoveRecord(image, offset, length, source)


def _digests(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) % DIGEST:
        raise BadEvent(f"expected digests of {DIGEST} bytes each")
    return value


def _read_fresh(value: object, scope: _Scope) -> ev.FreshRecord:
    image, offset, length, digests = _items(value, 4)
    image, offset, length = _range(image, offset, length, scope)
    expected = -(-length // DIGEST_CHUNK)
    if len(_digests(digests)) != expected * DIGEST:
        raise BadEvent(f"expected {expected} digests, found {len(digests) // DIGEST}")
    return ev.FreshRecord(image, offset, length, digests)


def _read_before(value: object, scope: _Scope) -> ev.BeforeRecord:
    image, offset, length, undo, hole, digest = _items(value, 6)
    image, offset, length = _range(image, offset, length, scope)
    if undo is not None:
        _range(image, undo, length, scope)
    if len(_digests(digest)) != (0 if undo is None else DIGEST):
        raise BadEvent("expected a digest for what is in the undo file, and only for that")
    if _read_flag(hole, scope) and undo is not None:
        raise BadEvent("a hole that is kept in the undo file")
    return ev.BeforeRecord(image, offset, length, undo, hole, digest)


def _read_length(value: object, scope: _Scope) -> ev.LengthRecord:
    image, before, after = _items(value, 3)
    return ev.LengthRecord(_read_image(image, scope), _read_offset(before, scope), _read_offset(after, scope))


def _read_unlinked(value: object, scope: _Scope) -> ev.UnlinkedRecord:
    image, offset, length = _items(value, 3)
    return ev.UnlinkedRecord(*_range(image, offset, length, scope))


def _read_identity(value: object, scope: _Scope) -> ev.Identity:
    device, inode, size, mtime, ctime, tag = _items(value, 6)
    return ev.Identity(
        _read_word(device, scope), _read_word(inode, scope), _read_offset(size, scope),
        _read_signed(mtime, scope), _read_signed(ctime, scope), _optional(_read_operation)(tag, scope),
    )  # fmt: skip


def _read_observed(value: object, scope: _Scope) -> tuple[int, ev.Identity]:
    image, identity = _items(value, 2)
    return _read_image(image, scope), _read_identity(identity, scope)


def _read_owner(value: object, scope: _Scope) -> ev.Owner:
    machine, boot, pid, started, uid, host = _items(value, 6)
    return ev.Owner(
        _read_text(machine, scope), _read_text(boot, scope), _read_number(pid, scope),
        _read_number(started, scope), _read_number(uid, scope), _read_text(host, scope),
    )  # fmt: skip


def _read_image_record(value: object, scope: _Scope) -> ev.ImageRecord:
    role, path, form, identity, writes = _items(value, 5)
    return ev.ImageRecord(
        _read_text(role, scope), _read_text(path, scope), _read_text(form, scope),
        _read_identity(identity, scope), _read_flag(writes, scope),
    )  # fmt: skip


def _read_images(value: object, scope: _Scope) -> tuple[ev.ImageRecord, ...]:
    images: tuple[ev.ImageRecord, ...] = _many(_read_image_record, MAX_IMAGES)(value, scope)
    if not images:
        raise BadEvent("expected at least the home image")
    return images


def _read_digests(value: object, scope: _Scope) -> bytes:
    return _digests(value)


def _read_json(value: object, scope: _Scope, depth: int = 0) -> Any:
    """None, booleans, integers, finite floats, text, lists and maps with text keys."""
    if depth > _MAX_DEPTH:
        raise BadEvent(f"nested more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _read_text(value, scope)
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list):
        return [_read_json(item, scope, depth + 1) for item in value]
    if isinstance(value, dict):
        return {_read_text(key, scope): _read_json(item, scope, depth + 1) for key, item in value.items()}
    raise BadEvent(f"{type(value).__name__} is not JSON")


def _read_settings(value: object, scope: _Scope) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadEvent("expected a map")
    found: dict[str, Any] = _read_json(value, scope)
    return found


_read_patches = _many(_read_patch)

# Each kind's fields in the order of its class, and how each is read.
_KINDS: Mapping[str, tuple[Callable[..., ev.Event], Mapping[str, _Read]]] = {
    "Declared": (ev.Declared, {
        "operation": _read_operation, "command": _read_text, "arguments": _many(_read_text),
        "version": _read_text, "owner": _read_owner, "images": _read_images, "time": _read_time,
    }),
    "Started": (ev.Started, {
        "settings": _read_settings, "lengths": _many(_read_offset, MAX_IMAGES), "undo": _read_flag,
        "created": _many(_read_image, MAX_IMAGES), "total": _read_offset, "time": _read_time,
    }),
    "Observed": (ev.Observed, {"identities": _many(_read_observed, MAX_IMAGES)}),
    "StepPrepared": (ev.StepPrepared, {
        "number": _read_number, "name": _read_text, "allocate": _read_patches, "link": _read_patches,
        "moves": _many(_read_move), "fresh": _many(_read_fresh), "before": _many(_read_before),
        "lengths": _many(_read_length), "unlinked": _many(_read_unlinked), "cursor": _read_json,
        "done": _read_offset, "time": _read_time,
    }),
    "StepApplied": (ev.StepApplied, {"number": _read_number, "digests": _many(_read_digests)}),
    "PointOfNoReturn": (ev.PointOfNoReturn, {"number": _read_number, "time": _read_time}),
    "Paused": (ev.Paused, {"reason": _read_text, "time": _read_time}),
    "RecoveryStarted": (ev.RecoveryStarted, {"action": _read_action, "owner": _read_owner, "time": _read_time}),
    "TakingBack": (ev.TakingBack, {"number": _read_number}),
    "TakenBack": (ev.TakenBack, {"number": _read_number}),
    "Completed": (ev.Completed, {"finish": _many(_read_finish), "time": _read_time}),
    "RolledBack": (ev.RolledBack, {"lost": _many(_read_text), "time": _read_time}),
    "Abandoned": (ev.Abandoned, {"reason": _read_text, "time": _read_time, "finish": _many(_read_finish)}),
}  # fmt: skip

_PATCHES = {"StepPrepared": ("allocate", "link"), "Completed": ("finish",), "Abandoned": ("finish",)}
