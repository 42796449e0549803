"""msgpack as the journal's files use it: packing, and the strict readers of single values.

A reader takes what msgpack made of hostile bytes and returns it typed and within its limits, or raises
`BadEvent`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import msgpack
from safeimg.journal.errors import JournalError
from safeimg.journal.events import Identity

MAX_PAYLOAD = 64 << 20  # of one event, and again what its runs of zeroes add up to
MAX_IMAGES = 4096
DIGEST = 32  # BLAKE3-256

_LIMIT = (1 << 63) - 1
_MAX_TEXT = 1 << 17
_MAX_DEPTH = 32
_MAX_ITEMS = 1 << 20
_ZERO_RUN = bytes(64)  # shorter runs are not worth a piece of their own
_ZEROES = re.compile(rb"\0+")
_OPERATION = re.compile(r"[0-9a-f]{32}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class BadEvent(JournalError):
    """These bytes or this object are not an event as the format allows it."""


class Scope:
    """What one event is judged against."""

    __slots__ = ("images", "room")

    def __init__(self, images: int) -> None:
        self.images = images
        self.room = MAX_PAYLOAD  # what runs of zeroes may still add up to


Read = Callable[[object, Scope], Any]


def pack(value: Any) -> bytes:
    """`value` in msgpack. Text may hold the surrogates that stand for a file name's undecodable bytes."""
    try:
        packed: bytes = msgpack.packb(value, use_bin_type=True, unicode_errors="surrogateescape")
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise BadEvent(f"cannot be recorded: {_line(error)}") from None
    if len(packed) > MAX_PAYLOAD:
        raise BadEvent(f"cannot be recorded: {len(packed)} bytes, more than {MAX_PAYLOAD}")
    return packed


def unpack(packed: bytes) -> object:
    """What `pack` was given, with lists for tuples. Raises `BadEvent` for anything else, in bounded
    memory."""
    try:
        return msgpack.unpackb(
            packed,
            raw=False,
            unicode_errors="surrogateescape",
            object_pairs_hook=_map,
            max_array_len=min(len(packed), _MAX_ITEMS),
            max_map_len=min(len(packed), _MAX_ITEMS),
            max_str_len=min(len(packed), _MAX_TEXT * 4),
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError, MemoryError) as error:
        raise BadEvent(f"not msgpack as safeimg uses it ({_line(error)})") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _map(pairs: list[tuple[object, object]]) -> dict[object, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a map with the same key twice")
    return found


def wire_bytes(data: bytes) -> bytes | list[bytes | int]:
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


def number(low: int, high: int) -> Read:
    def read(value: object, scope: Scope) -> int:
        if type(value) is not int or not low <= value <= high:
            raise BadEvent(f"expected an integer from {low} to {high}")
        return value

    return read


def read_text(value: object, scope: Scope) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT or "\0" in value:
        raise BadEvent(f"expected text of up to {_MAX_TEXT} characters without NUL")
    return value


def read_operation(value: object, scope: Scope) -> str:
    if not isinstance(value, str) or not _OPERATION.fullmatch(value):
        raise BadEvent("expected 32 hexadecimal digits")
    return value


def read_digest(value: object, scope: Scope) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise BadEvent("expected 64 hexadecimal digits")
    return value


def read_flag(value: object, scope: Scope) -> bool:
    if not isinstance(value, bool):
        raise BadEvent("expected true or false")
    return value


def read_time(value: object, scope: Scope) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise BadEvent("expected a time")
    return float(value)  # type: ignore[arg-type]


def read_bytes(value: object, scope: Scope) -> bytes:
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


def optional(read: Read) -> Read:
    return lambda value, scope: None if value is None else read(value, scope)


def many(read: Read, limit: int = _MAX_ITEMS) -> Read:
    def read_many(value: object, scope: Scope) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > limit:
            raise BadEvent(f"expected a list of up to {limit} items")
        return tuple([read(item, scope) for item in value])

    return read_many


def items(value: object, count: int) -> list[Any]:
    if not isinstance(value, list) or len(value) != count:
        raise BadEvent(f"expected a record of {count} fields")
    return value


read_offset = number(0, _LIMIT)
read_word = number(0, (1 << 64) - 1)
read_signed = number(-(1 << 63), _LIMIT)
read_number = number(0, _LIMIT)


def read_image(value: object, scope: Scope) -> int:
    if type(value) is not int or not 0 <= value < scope.images:
        raise BadEvent(f"expected the index of one of {scope.images} images")
    return value


def read_range(image: object, offset: object, length: object, scope: Scope) -> tuple[int, int, int]:
    index = read_image(image, scope)
    if (
        type(offset) is not int
        or type(length) is not int
        or offset < 0
        or length < 1
        or offset + length > _LIMIT
    ):
        raise BadEvent("expected a range that is not empty and ends below 2^63")
    return index, offset, length


def read_digests(value: object) -> bytes:
    if not isinstance(value, bytes) or len(value) % DIGEST:
        raise BadEvent(f"expected digests of {DIGEST} bytes each")
    return value


def read_identity(value: object, scope: Scope) -> Identity:
    device, inode, size, mtime, ctime, tag = items(value, 6)
    return Identity(
        read_word(device, scope),
        read_word(inode, scope),
        read_offset(size, scope),
        read_signed(mtime, scope),
        read_signed(ctime, scope),
        optional(read_operation)(tag, scope),
    )


def read_json(value: object, scope: Scope, depth: int = 0) -> Any:
    """None, booleans, integers, finite floats, text, lists and maps with text keys."""
    if depth > _MAX_DEPTH:
        raise BadEvent(f"nested more than {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return read_text(value, scope)
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list):
        return [read_json(item, scope, depth + 1) for item in value]
    if isinstance(value, dict):
        return {read_text(key, scope): read_json(item, scope, depth + 1) for key, item in value.items()}
    raise BadEvent(f"{type(value).__name__} is not JSON")
