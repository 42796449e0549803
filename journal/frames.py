"""Frames: how a log's file is laid out, and how its end is told from damage.

    header (512 bytes, written and synced before anything else, never changed)
    frame 1 │ frame 2 │ … │ frame n │ zeroes up to the end of the file (the reserve)

    frame: magic 4 │ payload length u32 │ sequence u64 │ durable u64 │ previous hash 32 │ payload │ hash 32

Integers are little-endian. `hash` is BLAKE3-256 of all that stands before it in the frame, keyed with the
header's checksum: a frame of another log, or one that a guest wrote into its disk, is never taken for one of
this log. It covers the hash of the frame before, and so all frames. `durable` is the highest sequence known
to be on stable storage when the frame was appended.

A frame that does not verify is the torn tail of a write that no sync followed, and so are those behind it,
unless one of these, intact, says that the bad one had been durable. Then the log was changed afterwards: it
is damaged.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from blake3 import blake3
from safeimg.drivers.records import NamedTuple
from safeimg.journal.codec import MAX_PAYLOAD
from safeimg.journal.errors import LogDamaged, LogForeign, LogVoid
from safeimg.journal.files import File

LOG_MAGIC = b"safeimg log\r\n\x1a\n\0"
VERSION = 1
HEADER = 512  # one sector: written whole or not at all
FRAME_MAGIC = b"\xf5SiF"
GENESIS = bytes(32)  # what the first frame names as the hash before it
HASH = 32
MAX_TAIL = 256 << 20  # more than this behind the last good frame is nothing that safeimg leaves

_HEADER = struct.Struct(
    "<16sII16sQ"
)  # magic, version, header's length, operation, the file's length at creation
_HEAD = struct.Struct("<4sIQQ32s")  # magic, payload length, sequence, durable, previous hash
OVERHEAD = _HEAD.size + HASH
_WINDOW = 1 << 20
_ZEROES = bytes(64 << 10)
_PREFIX = len(b"safeimg ")  # a pointer file that was cut off begins like that too


class Header(NamedTuple):
    operation: str
    initial: int  # the file is never shorter than this once there is a frame
    key: bytes  # of the frames' hashes


class Frame(NamedTuple):
    """A frame that verified by itself. `offset` and `end` are where it lies in the file."""

    offset: int
    sequence: int
    durable: int
    previous: bytes
    payload: bytes
    hash: bytes

    @property
    def end(self) -> int:
        return self.offset + OVERHEAD + len(self.payload)


class Tail(NamedTuple):
    """What lies behind the last good frame."""

    used: int  # end of the last byte that is not zero, or where the tail begins
    torn: bool  # there is such a byte


def pack_header(operation: str, initial: int) -> bytes:
    """The header of a log whose file is `initial` bytes long before the first frame is written."""
    start = _HEADER.pack(LOG_MAGIC, VERSION, HEADER, bytes.fromhex(operation), initial).ljust(
        HEADER - HASH, b"\0"
    )
    return start + blake3(start).digest()


def read_header(file: File) -> Header:
    """The header. Raises `LogVoid` if nothing can ever have been durable behind it, `LogForeign`,
    `LogDamaged`."""
    path, length = file.path, file.length()
    data = file.pread(0, HEADER)
    start, checksum = data[: HEADER - HASH], data[HEADER - HASH :]
    begun = _PREFIX < len(data) < HEADER and LOG_MAGIC.startswith(data[: len(LOG_MAGIC)])
    if not data.strip(b"\0") or begun:
        # Created, and cut off before its header was synced; no frame is written before that.
        if _tail_used(file, HEADER, length) > HEADER:
            raise LogDamaged(path, "the header of the log is gone", 0)
        raise LogVoid(path)
    if data[: len(LOG_MAGIC)] != LOG_MAGIC:
        raise LogForeign(f"{path}: not a log of safeimg's; move it away")
    if blake3(start).digest() != checksum:
        if _tail_used(file, HEADER, length) > HEADER:
            raise LogDamaged(path, "the header of the log does not match its checksum", 0)
        raise LogVoid(path)
    _, version, size, operation, initial = _HEADER.unpack_from(data)
    if version != VERSION or size != HEADER:
        raise LogForeign(f"{path}: a log of format version {version}; this safeimg knows version {VERSION}")
    return Header(operation.hex(), initial, checksum)


def pack_frame(key: bytes, sequence: int, durable: int, previous: bytes, payload: bytes) -> bytes:
    head = _HEAD.pack(FRAME_MAGIC, len(payload), sequence, durable, previous)
    return b"".join((head, payload, blake3(head, key=key).update(payload).digest()))


def read_frame(file: File, key: bytes, offset: int, end: int) -> Frame | None:
    """The frame at `offset` of a file that ends at `end`; None if there is none that verifies."""
    head = file.pread(offset, _HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, size, sequence, durable, previous = _HEAD.unpack(head)
    if magic != FRAME_MAGIC or size > MAX_PAYLOAD or offset + OVERHEAD + size > end:
        return None
    rest = file.pread(offset + _HEAD.size, size + HASH)
    payload, digest = rest[:size], rest[size:]
    if len(rest) != size + HASH or blake3(head, key=key).update(payload).digest() != digest:
        return None
    return Frame(offset, sequence, durable, previous, payload, digest)


def judge_tail(file: File, key: bytes, start: int, end: int, sequence: int) -> Tail:
    """Judges what follows the last good frame: `start` is where frame `sequence` would begin, `end` the
    file's length.

    Raises `LogDamaged` if an intact frame behind says that frame `sequence` had been durable.
    """
    used = _tail_used(file, start, end)
    if used == start:
        return Tail(start, False)
    # A torn tail holds each intact frame once. Whoever plants magics to make us hash the same bytes again and
    # again gets as far as the tail's length, and some.
    work = used - start + MAX_PAYLOAD
    for offset in _magics(file, start + 1, used):
        frame = read_frame(file, key, offset, end)
        if frame is not None and frame.durable >= sequence:
            problem = f"event {sequence} was changed after it was durable (event {frame.sequence} says so)"
            raise LogDamaged(file.path, problem, start)
        work -= _cost(file, offset, end) if frame is None else len(frame.payload)
        if work < 0:
            raise LogDamaged(file.path, f"what follows event {sequence - 1} is no torn write", start)
    return Tail(used, True)


def _cost(file: File, offset: int, end: int) -> int:
    """What it took to find that there is no frame at `offset`."""
    size = int.from_bytes(file.pread(offset + 4, 4), "little")
    return OVERHEAD + (0 if size > MAX_PAYLOAD or offset + OVERHEAD + size > end else size)


def _magics(file: File, start: int, end: int) -> Iterator[int]:
    for window in range(start, end, _WINDOW):
        data = file.pread(window, min(_WINDOW, end - window) + len(FRAME_MAGIC) - 1)
        at = data.find(FRAME_MAGIC)
        while at >= 0:
            yield window + at
            at = data.find(FRAME_MAGIC, at + 1)


def _tail_used(file: File, start: int, end: int) -> int:
    """The end of the last byte from `start` on that is not zero; `start` if there is none. Raises
    `LogDamaged`."""
    if end - start > MAX_TAIL:
        raise LogDamaged(
            file.path, f"{end - start} bytes follow the last event, more than safeimg reserves", start
        )
    used = start
    for at in range(start, end, _WINDOW):
        data = file.pread(at, min(_WINDOW, end - at))
        for part in range(0, len(data), len(_ZEROES)):  # comparing is much faster than stripping
            piece = data[part : part + len(_ZEROES)]
            if piece != _ZEROES[: len(piece)]:
                used = at + part + len(piece.rstrip(b"\0"))
    return used
