"""The handshake: what a server exports, and what of the protocol both sides use. Messages are QEMU's."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from safeimg.drivers.errors import RemoteError
from safeimg.drivers.records import NamedTuple
from safeimg.drivers.storage.nbd import wire
from safeimg.drivers.storage.nbd.wire import Channel

DEFAULT_MAXIMUM = 32 << 20  # bytes of a request, where a server says nothing else (proto.md, "Block size constraints")
MAX_REPLY = 2 * wire.MAX_STRING  # bytes of a reply to an option: a name and what comes with it
MAX_LIST = 1 << 16  # replies to one option
_TOTAL_LIMIT = (1 << 63) - (1 << 30)  # bytes; QEMU has no larger disks

_OPTIONS = {
    wire.OPT_EXPORT_NAME: "export name", wire.OPT_LIST: "list", 2: "abort", 5: "starttls", 6: "info",
    wire.OPT_GO: "go", wire.OPT_STRUCTURED_REPLY: "structured reply", 9: "list meta context",
    wire.OPT_SET_META_CONTEXT: "set meta context",
}  # fmt: skip
_REPLIES = {
    wire.REP_ACK: "ack", wire.REP_SERVER: "server", wire.REP_INFO: "info", wire.REP_META_CONTEXT: "meta context",
    wire.ERR_UNSUP: "unsupported", wire.ERR_POLICY: "denied by policy", wire.ERR_INVALID: "invalid",
    wire.ERR_PLATFORM: "platform lacks support", wire.ERR_TLS_REQD: "TLS required",
    wire.ERR_UNKNOWN: "export unknown", wire.ERR_SHUTDOWN: "server shutting down",
    wire.ERR_BLOCK_SIZE_REQD: "block size required",
}  # fmt: skip
_REFUSALS = {
    wire.ERR_POLICY: "Denied by server for {}",
    wire.ERR_INVALID: "Invalid parameters for {}",
    wire.ERR_PLATFORM: "Server lacks support for {}",
    wire.ERR_TLS_REQD: "TLS negotiation required before {}\nDid you forget a valid tls-creds?",
    wire.ERR_UNKNOWN: "Requested export not available",
    wire.ERR_SHUTDOWN: "Server shutting down before {}",
    wire.ERR_BLOCK_SIZE_REQD: "Server requires INFO_BLOCK_SIZE for {}",
}


@dataclass(frozen=True, slots=True)
class Export:
    """What was negotiated. Sizes are bytes."""

    size: int
    flags: int  # `wire.READ_ONLY` and the others
    minimum: int = 1  # offsets and lengths of requests are multiples of it
    maximum: int = DEFAULT_MAXIMUM  # of a request that carries data
    structured: bool = False
    context: int | None = None  # the id of the metadata context that block status tells of, if there is one


class _Reply(NamedTuple):
    kind: int
    length: int  # of what follows


def negotiate(channel: Channel, name: str, context: str) -> Export:
    """Selects the export `name`, with block status by the metadata `context` if the server has it.

    Raises `RemoteError`."""
    magic = int.from_bytes(channel.expect(8, "initial magic"), "big")
    if magic != wire.INITIAL_MAGIC:
        raise RemoteError(f"Bad initial magic received: 0x{magic:x}")
    magic = int.from_bytes(channel.expect(8, "server magic"), "big")
    if magic == wire.OLDSTYLE_MAGIC:
        return _oldstyle(channel, name)
    if magic != wire.OPTION_MAGIC:
        raise RemoteError(f"Bad server magic received: 0x{magic:x}")
    theirs = int.from_bytes(channel.expect(2, "server flags"), "big")
    fixed, zeroes = bool(theirs & wire.FIXED_NEWSTYLE), not theirs & wire.NO_ZEROES
    channel.tell("clientflags field", struct.pack(">I", theirs & (wire.FIXED_NEWSTYLE | wire.NO_ZEROES)))
    return _checked(_Options(channel, name).negotiate(context, fixed, zeroes))


def _oldstyle(channel: Channel, name: str) -> Export:
    """A server without options: it has one export, without a name."""
    if name:
        raise RemoteError("Server does not support non-empty export names")
    size, _, flags = struct.unpack(">QHH", channel.expect(12, "export length and flags"))
    channel.expect(124, "reserved block")
    return _checked(Export(size, flags))


def _checked(export: Export) -> Export:
    if export.size > _TOTAL_LIMIT:
        raise RemoteError("Could not refresh total sector count: File too large")
    return export


class _Options:
    """Asks for one option after the other."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self._name = name.encode("utf-8", "surrogateescape")

    def negotiate(self, context: str, fixed: bool, zeroes: bool) -> Export:
        structured = fixed and self._structured()
        number = self._context(context) if structured else None
        export = self._go(structured, number) if fixed else None
        if export is None:
            if fixed:
                self._find_in_list()
            export = self._export_name(structured, number, zeroes)
        return export

    def _ask(self, option: int, data: bytes = b"") -> None:
        header = struct.pack(">QII", wire.OPTION_MAGIC, option, len(data))
        self._channel.tell("option request header", header, data)

    def _reply(self, option: int, *, strict: bool = True) -> _Reply | None:
        """The next reply's header; None if the server does not have the option, or (not `strict`) refuses it."""
        header = self._channel.expect(20, "option reply")
        magic, theirs, kind, length = struct.unpack(">QIII", header)
        if magic != wire.OPTION_REPLY_MAGIC:
            raise RemoteError("Unexpected option reply magic")
        if theirs != option:
            raise RemoteError(f"Unexpected option type {_option(theirs)}, expected {_option(option)}")
        if not kind & wire.REP_ERROR:
            return _Reply(kind, length)
        if length > MAX_REPLY:
            raise RemoteError(f"server error {_kind(kind)} message is too long")
        words = _readable(self._channel.expect(length, f"option error {_kind(kind)} message"))
        if kind == wire.ERR_UNSUP or not strict:
            return None
        refusal = _REFUSALS.get(kind, "Unknown error code when asking for {}").format(f"option {_option(option)}")
        raise RemoteError(refusal + (f"\nserver reported: {words}" if words else ""))

    def _structured(self) -> bool:
        """Whether replies come in chunks from now on."""
        option = wire.OPT_STRUCTURED_REPLY
        self._ask(option)
        reply = self._reply(option, strict=False)
        if reply is None:
            return False
        if reply.length:
            raise RemoteError(
                f"Option {option} ('{_OPTIONS[option]}') response length is {reply.length} (it should be zero)"
            )
        if reply.kind != wire.REP_ACK:
            raise RemoteError(
                f"Server answered option {_option(option)} with unexpected reply {_kind(reply.kind)}"
            )
        return True

    def _context(self, context: str) -> int | None:
        """The id of a metadata context; None if the server does not have it."""
        option, wanted = wire.OPT_SET_META_CONTEXT, context.encode("utf-8", "surrogateescape")
        self._ask(option, struct.pack(
            f">I{len(self._name)}sII{len(wanted)}s", len(self._name), self._name, 1, len(wanted), wanted
        ))  # fmt: skip
        found: int | None = None
        while True:
            reply = self._reply(option, strict=False)
            if reply is None:
                return None
            if reply.kind == wire.REP_ACK:
                if reply.length:
                    raise RemoteError("Unexpected length to ACK response")
                return found
            if reply.kind != wire.REP_META_CONTEXT:
                raise RemoteError(f"Unexpected reply type {_kind(reply.kind)}, expected {_kind(wire.REP_META_CONTEXT)}")
            if not 4 < reply.length <= MAX_REPLY:
                raise RemoteError(
                    f"Failed to negotiate meta context, server answered with unexpected length {reply.length}"
                )
            answer = self._channel.expect(reply.length, "context id")
            if answer[4:] != wanted:
                raise RemoteError(
                    f"Failed to negotiate meta context '{context}', server answered with different context "
                    f"'{_readable(answer[4:])}'"
                )
            if found is not None:
                raise RemoteError("Server answered with more than one context")
            found = int.from_bytes(answer[:4], "big")

    def _go(self, structured: bool, context: int | None) -> Export | None:
        """The export selected by its name; None if the server does not know this option."""
        self._ask(wire.OPT_GO, struct.pack(
            f">I{len(self._name)}sHH", len(self._name), self._name, 1, wire.INFO_BLOCK_SIZE
        ))  # fmt: skip
        size, flags, limits = 0, 0, (1, DEFAULT_MAXIMUM)
        for _ in range(MAX_LIST):
            reply = self._reply(wire.OPT_GO)
            if reply is None:
                return None
            if reply.kind == wire.REP_ACK:
                if reply.length:
                    raise RemoteError("server sent invalid NBD_REP_ACK")
                if not flags:
                    raise RemoteError("broken server omitted NBD_INFO_EXPORT")
                return Export(size, flags, *limits, structured, context)
            if reply.kind != wire.REP_INFO:
                raise RemoteError(f"unexpected reply type {_kind(reply.kind)}, expected {_kind(wire.REP_INFO)}")
            if reply.length < 2:
                raise RemoteError(f"NBD_REP_INFO length {reply.length} is too short")
            about = int.from_bytes(self._channel.expect(2, "info type"), "big")
            length = reply.length - 2
            known = {wire.INFO_EXPORT: 10, wire.INFO_BLOCK_SIZE: 12}.get(about)
            if length != known and (known is not None or length > MAX_REPLY):
                raise RemoteError(f"remaining export info len {length} is unexpected size")
            told = self._channel.expect(length, "export info")
            if about == wire.INFO_EXPORT:
                size, flags = struct.unpack(">QH", told)
            elif about == wire.INFO_BLOCK_SIZE:
                limits = _limits(*struct.unpack(">III", told))
        raise RemoteError("server sent too many replies")

    def _find_in_list(self) -> None:
        """Raises `RemoteError` if the server lists its exports, and this one is not among them."""
        self._ask(wire.OPT_LIST)
        there = False
        for _ in range(MAX_LIST):
            reply = self._reply(wire.OPT_LIST)
            if reply is None:
                return
            if reply.kind == wire.REP_ACK:
                if not there:
                    raise RemoteError(f"No export with name '{_readable(self._name)}' available")
                return
            if reply.kind != wire.REP_SERVER:
                raise RemoteError(f"Unexpected reply type {_kind(reply.kind)}, expected {_kind(wire.REP_SERVER)}")
            if not 4 <= reply.length <= MAX_REPLY:
                raise RemoteError(f"incorrect option length {reply.length}")
            listed = self._channel.expect(reply.length, "option name")
            length = int.from_bytes(listed[:4], "big")
            if length > len(listed) - 4:
                raise RemoteError("incorrect option name length")
            there = there or listed[4 : 4 + length] == self._name
        raise RemoteError("server sent too many replies")

    def _export_name(self, structured: bool, context: int | None, zeroes: bool) -> Export:
        """The oldest way to select an export, which a server cannot refuse but by hanging up."""
        self._ask(wire.OPT_EXPORT_NAME, self._name)
        size = int.from_bytes(self._channel.expect(8, "export length"), "big")
        flags = int.from_bytes(self._channel.expect(2, "export flags"), "big")
        if zeroes:
            self._channel.expect(124, "reserved block")
        return Export(size, flags, structured=structured, context=context)


def _limits(minimum: int, preferred: int, maximum: int) -> tuple[int, int]:
    """The smallest and largest requests of a server that told its block sizes."""
    if minimum.bit_count() != 1:
        raise RemoteError(f"server minimum block size {minimum} is not a power of two")
    if preferred.bit_count() != 1 or preferred < minimum:
        raise RemoteError(f"server preferred block size {preferred} is not valid")
    if maximum < minimum:
        raise RemoteError(f"server maximum block size {maximum} is not valid")
    maximum = min(maximum, max(DEFAULT_MAXIMUM, minimum))
    if minimum > DEFAULT_MAXIMUM:
        raise RemoteError(f"server minimum block size {minimum} is too large")
    return minimum, maximum - maximum % minimum


def _option(number: int) -> str:
    return f"{number} ({_OPTIONS.get(number, '<unknown>')})"


def _kind(number: int) -> str:
    return f"{number} ({_REPLIES.get(number, '<unknown>')})"


def _readable(words: bytes) -> str:
    """What a server says, without what would do things to a terminal."""
    text = words.partition(b"\0")[0].decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
