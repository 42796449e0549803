"""Values on the command line: sizes with qemu-img's suffixes, option lists; and qemu-img's
messages."""

from __future__ import annotations

import re
import sys

from safeimg.cli.errors import Answer, CommandError, usage

MAX_SIZE = (1 << 63) - 1
CACHE_MODES = ("none", "off", "directsync", "writeback", "unsafe", "writethrough")


def size(what: str, text: str, *, maximum: int = MAX_SIZE) -> int:
    """Bytes from `text`; `what` is the quantity's name in messages, such as "image size"."""
    from safeimg.ops.sizes import parse_size

    value = parse_size(text, warn)
    if value is None:
        raise CommandError(
            f"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for",
            "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.",
        )
    if value > maximum:
        raise CommandError(f"Invalid {what} specified. Must be between 0 and {maximum}.")
    return value


def complain(message: str) -> None:
    """An error that does not end the command by itself, as qemu-img prints it."""
    from safeimg.cli.main import program_name

    print(f"{program_name()}: {message}", file=sys.stderr)


def warn(message: str) -> None:
    complain(f"warning: {message}")


def trace(text: str) -> str:
    """-T: checked as far as that goes without any events to trace."""
    from safeimg.drivers.formats.options import split_options

    given = dict(split_options(text, implied="enable"))
    pattern, events = given.get("enable"), given.get("events")
    if pattern in ("help", "?"):
        raise Answer
    if pattern is not None and not set(pattern) & set("*?"):
        warn(f"trace event '{pattern}' does not exist")
    if events is not None:
        try:
            with open(events, encoding="utf-8", errors="replace"):
                pass
        except OSError as error:
            raise CommandError(f"{events}: {error.strerror}") from error
    return text


def start_offset(text: str) -> int:
    return size("start offset", text)


def max_length(text: str) -> int:
    return size("max length", text)


def rate_limit(text: str) -> int:
    return size("rate limit", text)


def sparse_size(text: str) -> int:
    """-S of convert: bytes of zeroes that become a hole."""
    value = size("buffer size for sparse output", text)
    if value % 512 or value > 16 << 20:
        raise CommandError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to "
            f"{16 << 20}. Select 0 to disable sparse detection (fully allocates output)."
        )
    return value


def window(text: str) -> int:
    """--window of convert: bytes that deflate may reach back."""
    from safeimg.drivers.formats.qcow2.compression import LARGE_WINDOW, WINDOW

    value = size("window", text)
    if value not in (WINDOW, LARGE_WINDOW):
        raise CommandError("Invalid window specified. Valid windows are 4k and 32k.")
    return value


def coroutines(text: str) -> int:
    """-m of convert."""
    if not re.fullmatch(r"\s*[+]?\d+", text) or not 1 <= int(text) <= 16:
        raise CommandError("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16")
    return int(text)


def progress_form(text: str) -> str:
    if text not in ("auto", "json"):
        raise CommandError("--progress must be used with auto or json as argument.")
    return text


POLICIES = ("resume", "rollback", "report")


def policy(text: str) -> str:
    """What is to become of an interrupted operation."""
    if text not in POLICIES:
        raise CommandError(f"'{text}' is no way to settle an operation: it may be resume, rollback or report")
    return text


def kept_size(text: str) -> int:
    return size("size of what is kept for undo", text)


def seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise CommandError(f"'{text}' is not a number of seconds")
    return float(text)


def snapshot(text: str) -> str:
    """-l of convert: an id or name, or `snapshot.id=…,snapshot.name=…`."""
    if text.startswith("snapshot."):
        from safeimg.drivers.formats.options import split_options

        for name, _ in split_options(text):
            if name not in ("snapshot.id", "snapshot.name"):
                raise CommandError(
                    f"Invalid parameter '{name}'", f"Failed in parsing snapshot param '{text}'"
                )
    return text


def repair(text: str) -> str:
    if text not in ("leaks", "all"):
        raise usage(f"Unknown option value for -r (expecting 'leaks' or 'all'): {text}")
    return text


def option_list(text: str) -> str:
    """-o: refuses lists that begin or end with a lone comma, as qemu-img does (it joins several)."""
    if not text or text.startswith(",") or (len(text) - len(text.rstrip(","))) % 2:
        raise CommandError(f"Invalid option list: {text}")
    return text


def cache_mode(text: str, message: str, *, code: int = 1) -> str:
    """A cache mode, or `message` with the text that is none."""
    if text not in CACHE_MODES:
        raise CommandError(f"{message}: {text}", code=code)
    return "none" if text == "off" else text


def output_format(text: str | None) -> str:
    """--output: "human" (the default) or "json"."""
    if text is None:
        return "human"
    if text not in ("human", "json"):
        raise CommandError("--output must be used with human or json as argument.")
    return text
