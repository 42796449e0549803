"""JSON as QEMU reads and writes it: strings in either quotes, no duplicate keys, its messages; ASCII output."""

from __future__ import annotations

import re
from typing import Any

from safeimg.drivers.records import NamedTuple

MAX_DEPTH = 400  # QEMU takes 1024: more than any name needs

_ESCAPES = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "/": "/", "\\": "\\", '"': '"', "'": "'"}
_KEYWORDS = {"true": True, "false": False, "null": None}
# Compiled where they are needed: that takes 3 ms, and most images have plain names.
_SPACE = r"[ \t\r\n]*"
# A whole token, or as much of one as there is before what does not fit
_TOKEN = r"""
    (?P<mark>[{}\[\],:])
    |(?P<string>"(?:[^\x00-\x1f\udc80-\udcff"\\]|\\.)*"|'(?:[^\x00-\x1f\udc80-\udcff'\\]|\\.)*')
    |(?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)(?![0-9.eE])
    |(?P<word>[a-z]+)
    |(?P<stray>(?:"(?:[^\x00-\x1f\udc80-\udcff"\\]|\\.)*|'(?:[^\x00-\x1f\udc80-\udcff'\\]|\\.)*
        |-?(?:0|[1-9][0-9]*)?(?:\.[0-9]*)?(?:[eE][-+]?)?)(?s:.?))
"""
_UNICODE = r"\\u([0-9a-fA-F]{4})(?:(?<=\\u[dD][89abAB]..)\\u([dD][c-fC-F][0-9a-fA-F]{2}))?"


class JsonError(Exception):
    """The text is not what it should be; `str()` is QEMU's message."""


class _Token(NamedTuple):
    kind: str
    text: str


def parse_json(text: str) -> Any:
    """The value that `text` is. Raises `JsonError`."""
    tokens, rest = _tokens(text)
    if not tokens:
        raise JsonError("Expecting a JSON value")
    value, at = _value(tokens, 0)
    if at < len(tokens) or rest:
        raise JsonError("Expecting at most one JSON value")
    return value


def _wrong(what: str) -> JsonError:
    return JsonError(f"JSON parse error, {what}")


def _tokens(text: str) -> tuple[list[_Token], bool]:
    """The tokens of the first value, as far as brackets tell where it ends, and whether anything follows."""
    spaces, a_token = re.compile(_SPACE), re.compile(_TOKEN, re.VERBOSE)
    tokens: list[_Token] = []
    at = braces = brackets = 0
    while True:
        space = spaces.match(text, at)
        at = space.end() if space else at
        if at == len(text):
            return tokens, False
        if tokens and (min(braces, brackets) < 0 or braces == brackets == 0):
            return tokens, True
        match = a_token.match(text, at)
        if match is None or match.lastgroup == "stray":
            raise _wrong(f"stray '{match.group() if match else text[at]}'")
        token = _Token(str(match.lastgroup), match.group())
        braces += {"{": 1, "}": -1}.get(token.text, 0)
        brackets += {"[": 1, "]": -1}.get(token.text, 0)
        if braces + brackets > MAX_DEPTH:
            raise JsonError("JSON nesting depth limit exceeded")
        tokens.append(token)
        at = match.end()


def _value(tokens: list[_Token], at: int) -> tuple[Any, int]:
    """The value that begins with token `at`, and the token behind it."""
    if at == len(tokens):
        raise _wrong("premature EOI")
    kind, text = tokens[at]
    if kind == "string":
        return _string(text), at + 1
    if kind == "number":
        is_whole = re.fullmatch(r"-?[0-9]{1,20}", text) is not None and -(1 << 63) <= int(text) < 1 << 64
        return int(text) if is_whole else float(text), at + 1
    if kind == "word":
        if text not in _KEYWORDS:
            raise _wrong(f"invalid keyword '{text}'")
        return _KEYWORDS[text], at + 1
    if text == "{":
        return _object(tokens, at + 1)
    if text == "[":
        return _array(tokens, at + 1)
    raise _wrong("expecting value")


def _object(tokens: list[_Token], at: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    if _is(tokens, at, "}"):
        return found, at + 1
    while True:
        key, at = _value(tokens, at)
        if not isinstance(key, str):
            raise _wrong("key is not a string in object")
        if not _is(tokens, at, ":"):
            raise _wrong("missing : in object pair")
        value, at = _value(tokens, at + 1)
        if key in found:
            raise _wrong("duplicate key")
        found[key] = value
        if _is(tokens, at, "}"):
            return found, at + 1
        if not _is(tokens, at, ","):
            raise _wrong("expected separator in dict")
        at += 1


def _array(tokens: list[_Token], at: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    if _is(tokens, at, "]"):
        return found, at + 1
    while True:
        value, at = _value(tokens, at)
        found.append(value)
        if _is(tokens, at, "]"):
            return found, at + 1
        if not _is(tokens, at, ","):
            raise _wrong("expected separator in list")
        at += 1


def _is(tokens: list[_Token], at: int, mark: str) -> bool:
    if at == len(tokens):
        raise _wrong("premature EOI")
    return tokens[at] == _Token("mark", mark)


def _string(token: str) -> str:
    parts: list[str] = []
    at, end = 1, len(token) - 1
    while at < end:
        if token[at] != "\\":
            parts.append(token[at])
            at += 1
            continue
        escape = token[at + 1]
        if escape == "u":
            match = re.compile(_UNICODE).match(token, at)
            code = _code_point(match) if match is not None else None
            if match is None or code is None:
                raise _wrong(f"{token[at : at + 6]} is not a valid Unicode character")
            parts.append(chr(code))
            at = match.end()
        elif escape in _ESCAPES:
            parts.append(_ESCAPES[escape])
            at += 2
        else:
            raise _wrong("invalid escape sequence in string")
    return "".join(parts)


def _code_point(match: re.Match[str]) -> int | None:
    """Of one \\u escape, or of two that are a surrogate pair; None if it is no character."""
    high, low = int(match.group(1), 16), match.group(2)
    if low is not None:
        return 0x10000 + ((high & 0x3FF) << 10) + (int(low, 16) & 0x3FF)
    return None if 0xD800 <= high < 0xE000 else high


def json_text(value: Any) -> str:
    """A value on one line, in ASCII."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(name)}: {json_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(json_text, value)) + "]"
    return _scalar(value)


def json_lines(value: Any, indent: str = "") -> str:
    """A value on lines of its own, in ASCII: four spaces a level, empty lists and objects on two lines."""
    inner = indent + "    "
    if isinstance(value, dict):
        items = [f"{inner}{_quoted(name)}: {json_lines(item, inner)}" for name, item in value.items()]
        return "".join(("{\n", ",\n".join(items), "\n" if items else "", indent, "}"))
    if isinstance(value, list | tuple):
        items = [inner + json_lines(item, inner) for item in value]
        return "".join(("[\n", ",\n".join(items), "\n" if items else "", indent, "]"))
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return _quoted(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


_QUOTED = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _quoted(text: str) -> str:
    """A JSON string in ASCII. Bytes of file names that are no UTF-8 become U+FFFD."""
    parts = []
    for character in text:
        code = ord(character)
        if character in _QUOTED:
            parts.append(_QUOTED[character])
        elif 0x20 <= code < 0x7F:
            parts.append(character)
        elif 0xD800 <= code < 0xE000:
            parts.append("\\uFFFD")
        elif code < 0x10000:
            parts.append(f"\\u{code:04X}")
        else:
            code -= 0x10000
            parts.append(f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}")
    return '"' + "".join(parts) + '"'
