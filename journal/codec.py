"""Events to bytes and back, for the log: msgpack, strict, and safe against hostile input.

An event is a msgpack array `[kind, {field: value, …}]` with every field present and none besides; records are
arrays of their fields in order. Bytes that hold long runs of zeroes are arrays of alternating pieces: bytes,
or the length of a run. `docs/journal-format.md` has it in full. What `encode_event` writes, `decode_event`
has accepted before: an event that could not be read back is refused before it reaches the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from safeimg.journal import events as ev
from safeimg.journal.wire import (
    DIGEST,
    MAX_IMAGES,
    MAX_PAYLOAD,
    BadEvent,
    Read,
    Scope,
    items,
    many,
    pack,
    read_bytes,
    read_digest,
    read_digests,
    read_flag,
    read_identity,
    read_image,
    read_json,
    read_number,
    read_offset,
    read_operation,
    read_range,
    read_text,
    read_time,
    unpack,
    wire_bytes,
)

__all__ = ["DIGEST_CHUNK", "MAX_IMAGES", "MAX_PAYLOAD", "BadEvent", "decode_event", "encode_event"]

DIGEST_CHUNK = 64 << 10  # bytes of guest data that one digest covers


def encode_event(event: ev.Event, *, images: int = MAX_IMAGES) -> bytes:
    """The event's payload. `images`: how many the operation declared. Raises `BadEvent` if it breaks the
    format."""
    kind = type(event).__name__
    if kind not in _KINDS:
        raise BadEvent(f"not an event: {kind}")
    patches = _PATCHES.get(kind, ())
    values = {
        name: [_wire_patch(patch) for patch in value] if name in patches else _wire(value)
        for name, value in zip(event._fields, event, strict=True)
    }
    try:
        payload = pack([kind, values])
    except BadEvent as error:
        raise BadEvent(f"{kind} {error}") from None
    decode_event(payload, images=images)
    return payload


def decode_event(payload: bytes, *, images: int = MAX_IMAGES) -> ev.Event:
    """The event in `payload`. Raises `BadEvent` for anything that `encode_event` cannot have written."""
    if len(payload) > MAX_PAYLOAD:
        raise BadEvent(f"an event of {len(payload)} bytes, more than {MAX_PAYLOAD}")
    wire = unpack(payload)
    kind, values = wire if isinstance(wire, list) and len(wire) == 2 else (None, None)
    if not isinstance(kind, str) or not isinstance(values, dict):
        raise BadEvent("not a pair of kind and fields")
    if kind not in _KINDS:
        raise BadEvent(f"unknown kind of event {kind[:40]!r}")
    build, readers = _KINDS[kind]
    if values.keys() != readers.keys():
        odd = sorted(map(repr, values.keys() ^ readers.keys()))
        raise BadEvent(f"{kind}: missing or unknown field {odd[0][:40]}")
    scope = Scope(images)
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


# -- writing


def _wire(value: Any) -> Any:
    """`value` as msgpack types. Records become arrays of their fields."""
    if isinstance(value, ev.Identity | ev.Owner | ev.ImageRecord):
        return [_wire(item) for item in value]
    if isinstance(value, tuple) and value and isinstance(value[0], ev.ImageRecord | tuple):
        return [_wire(item) for item in value]
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], ev.Identity):
        return [value[0], _wire(value[1])]
    return value


def _wire_patch(patch: ev.PatchRecord | ev.FinishRecord) -> list[Any]:
    before = None if patch.before is None else wire_bytes(patch.before)
    return [patch.image, patch.offset, before, wire_bytes(patch.after)]


# -- reading


def _read_action(value: object, scope: Scope) -> str:
    if value not in ("resume", "rollback"):
        raise BadEvent("expected resume or rollback")
    return str(value)


def _read_patch(value: object, scope: Scope) -> ev.PatchRecord:
    image, offset, before, after = items(value, 4)
    new = read_bytes(after, scope)
    old = None if before is None else read_bytes(before, scope)
    if old is not None and len(old) != len(new):
        raise BadEvent(f"{len(old)} bytes before and {len(new)} after")
    image, offset, _ = read_range(image, offset, len(new), scope)
    return ev.PatchRecord(image, offset, old, new)


def _read_finish(value: object, scope: Scope) -> ev.FinishRecord:
    patch = _read_patch(value, scope)
    if patch.before is None:
        raise BadEvent("expected the bytes before")
    return ev.FinishRecord(patch.image, patch.offset, patch.before, patch.after)


def _read_move(value: object, scope: Scope) -> ev.MoveRecord:
    image, offset, length, source, guest = items(value, 5)
    image, offset, length = read_range(image, offset, length, scope)
    for start in (source, guest):
        if start is not None:
            read_range(image, start, length, scope)
    return ev.MoveRecord(image, offset, length, source, guest)


def _read_fresh(value: object, scope: Scope) -> ev.FreshRecord:
    image, offset, length, digests, live = items(value, 5)
    image, offset, length = read_range(image, offset, length, scope)
    expected = -(-length // DIGEST_CHUNK)
    if len(read_digests(digests)) != expected * DIGEST:
        raise BadEvent(f"expected {expected} digests, found {len(digests) // DIGEST}")
    return ev.FreshRecord(image, offset, length, digests, read_flag(live, scope))


def _read_before(value: object, scope: Scope) -> ev.BeforeRecord:
    image, offset, length, undo, hole, digest = items(value, 6)
    image, offset, length = read_range(image, offset, length, scope)
    if undo is not None:
        read_range(image, undo, length, scope)
    if len(read_digests(digest)) != (0 if undo is None else DIGEST):
        raise BadEvent("expected a digest for what is in the undo file, and only for that")
    if read_flag(hole, scope) and undo is not None:
        raise BadEvent("a hole that is kept in the undo file")
    return ev.BeforeRecord(image, offset, length, undo, hole, digest)


def _read_length(value: object, scope: Scope) -> ev.LengthRecord:
    image, before, after = items(value, 3)
    return ev.LengthRecord(read_image(image, scope), read_offset(before, scope), read_offset(after, scope))


def _read_unlinked(value: object, scope: Scope) -> ev.UnlinkedRecord:
    image, offset, length = items(value, 3)
    return ev.UnlinkedRecord(*read_range(image, offset, length, scope))


def _read_observed(value: object, scope: Scope) -> tuple[int, ev.Identity]:
    image, identity = items(value, 2)
    return read_image(image, scope), read_identity(identity, scope)


def _read_changed(value: object, scope: Scope) -> tuple[int, float]:
    image, since = items(value, 2)
    return read_image(image, scope), read_time(since, scope)


def _read_content(value: object, scope: Scope) -> ev.ContentRecord:
    image, format, digest = items(value, 3)
    return ev.ContentRecord(read_image(image, scope), read_text(format, scope), read_digest(digest, scope))


def _read_owner(value: object, scope: Scope) -> ev.Owner:
    machine, boot, pid, started, uid, host = items(value, 6)
    return ev.Owner(
        read_text(machine, scope),
        read_text(boot, scope),
        read_number(pid, scope),
        read_number(started, scope),
        read_number(uid, scope),
        read_text(host, scope),
    )


def _read_image_record(value: object, scope: Scope) -> ev.ImageRecord:
    role, path, form, identity, writes = items(value, 5)
    return ev.ImageRecord(
        read_text(role, scope),
        read_text(path, scope),
        read_text(form, scope),
        read_identity(identity, scope),
        read_flag(writes, scope),
    )


def _read_images(value: object, scope: Scope) -> tuple[ev.ImageRecord, ...]:
    images: tuple[ev.ImageRecord, ...] = many(_read_image_record, MAX_IMAGES)(value, scope)
    if not images:
        raise BadEvent("expected at least the home image")
    return images


def _read_digests(value: object, scope: Scope) -> bytes:
    return read_digests(value)


def _read_settings(value: object, scope: Scope) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadEvent("expected a map")
    found: dict[str, Any] = read_json(value, scope)
    return found


_read_patches = many(_read_patch)

# Each kind's fields in the order of its class, and how each is read.
_KINDS: Mapping[str, tuple[Callable[..., ev.Event], Mapping[str, Read]]] = {
    "Declared": (
        ev.Declared,
        {
            "operation": read_operation,
            "command": read_text,
            "arguments": many(read_text),
            "version": read_text,
            "owner": _read_owner,
            "images": _read_images,
            "time": read_time,
        },
    ),
    "Started": (
        ev.Started,
        {
            "settings": _read_settings,
            "lengths": many(read_offset, MAX_IMAGES),
            "undo": read_flag,
            "created": many(read_image, MAX_IMAGES),
            "total": read_offset,
            "time": read_time,
        },
    ),
    "ChangedOutside": (ev.ChangedOutside, {"images": many(_read_changed, MAX_IMAGES)}),
    "Observed": (ev.Observed, {"identities": many(_read_observed, MAX_IMAGES)}),
    "StepPrepared": (
        ev.StepPrepared,
        {
            "number": read_number,
            "name": read_text,
            "allocate": _read_patches,
            "link": _read_patches,
            "moves": many(_read_move),
            "fresh": many(_read_fresh),
            "before": many(_read_before),
            "lengths": many(_read_length),
            "unlinked": many(_read_unlinked),
            "cursor": read_json,
            "done": read_offset,
            "time": read_time,
        },
    ),
    "StepApplied": (ev.StepApplied, {"number": read_number, "digests": many(_read_digests)}),
    "PointOfNoReturn": (ev.PointOfNoReturn, {"number": read_number, "time": read_time}),
    "GivenUp": (ev.GivenUp, {"number": read_number, "before": many(_read_before)}),
    "Paused": (ev.Paused, {"reason": read_text, "time": read_time}),
    "RecoveryStarted": (
        ev.RecoveryStarted,
        {"action": _read_action, "owner": _read_owner, "time": read_time},
    ),
    "TakingBack": (ev.TakingBack, {"number": read_number}),
    "TakenBack": (ev.TakenBack, {"number": read_number}),
    "Digested": (ev.Digested, {"images": many(_read_content, MAX_IMAGES)}),
    "Completed": (ev.Completed, {"finish": many(_read_finish), "time": read_time}),
    "RolledBack": (ev.RolledBack, {"lost": many(read_text), "time": read_time}),
    "Abandoned": (ev.Abandoned, {"reason": read_text, "time": read_time, "finish": many(_read_finish)}),
    "Settled": (ev.Settled, {"identities": many(_read_observed, MAX_IMAGES), "lost": read_text, "time": read_time}),
}

_PATCHES = {"StepPrepared": ("allocate", "link"), "Completed": ("finish",), "Abandoned": ("finish",)}
