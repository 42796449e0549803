"""Where safeimg's outcome differs from qemu-img's on purpose. docs/design.md, "Where the output differs, and why", has
a line for each rule; a rule says exactly which outcomes it excuses, and the soak counts how often it had to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """Of a program, masked."""

    code: int
    stdout: str
    stderr: str



@dataclass(frozen=True, slots=True)
class Exchange:
    """One line, and what the two programs answered."""

    words: Sequence[str]
    expected: Outcome  # qemu-img's
    answer: Outcome  # safeimg's
    unchanged: bool  # by safeimg: every file in its folder is as it was before
    rewritten: bool  # by an earlier line: what the files hold where is each program's own affair

    def has(self, *options: str) -> bool:
        """Whether one of the short options is there, with a value in the same word or among others."""
        return any(
            re.match(r"-[A-Za-z]", word) and option[1] in word[1:] for word in self.words for option in options
        )


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    excuses: Callable[[Exchange], bool]
    goes_on: bool = False  # the case: what lies on disk may not differ


def _refused(seen: Exchange) -> bool:
    return seen.expected == seen.answer and seen.expected.code != 0 and seen.unchanged


def _compressed_over_data(seen: Exchange) -> bool:
    failed = r"qemu-img: error while writing at byte \d+: Input/output error\n"
    return (
        seen.words[0] == "convert" and seen.has("-c") and seen.has("-n") and seen.answer.code == 0
        and seen.expected.code == 1 and re.fullmatch(failed, seen.expected.stderr) is not None
    )  # fmt: skip


def _measure_help(seen: Exchange) -> bool:
    return (
        seen.words[0] == "measure" and seen.expected.code == 0 and seen.answer.code == 1
        and seen.expected.stdout.startswith("qemu-img version ")
        and re.match(r"qemu-img: (unrecognized option|missing argument for option) '-", seen.answer.stderr) is not None
    )  # fmt: skip


def _overflown(seen: Exchange) -> bool:
    """Rounded up to a sector, the largest size is no size any more."""
    one, two = seen.expected, seen.answer
    shown = one.stdout.replace("-9223372036854775808", "9223372036854775808")
    return seen.words[0] == "measure" and one.stdout != two.stdout and one._replace(stdout=shown) == two


def _freed_twice(seen: Exchange) -> bool:
    """What two entries refer to and only one is counted for."""
    told = "qcow2_free_clusters failed: Invalid argument\n"
    rest = seen.expected._replace(stderr=seen.expected.stderr.replace(told, ""))
    return rest == seen.answer and any("twice.qcow2" in word for word in seen.words)


def _crashed(seen: Exchange) -> bool:
    return seen.expected.code < 0 and seen.answer.code == 1 and seen.unchanged


def _holes(seen: Exchange) -> bool:
    """Data clusters whose zeroes are holes of the file, or are written."""
    one, two = seen.expected, seen.answer
    if seen.words[0] != "map" or not seen.rewritten or (one.code, one.stderr) != (two.code, two.stderr):
        return False
    try:
        raw = any("outraw" in word for word in seen.words)  # whose data file is zero where its tables need not say so
        return _merged(json.loads(one.stdout), raw) == _merged(json.loads(two.stdout), raw)
    except ValueError:
        pass
    shown = [_mapped(text) for text in (one.stdout, two.stdout)]
    return shown[0].keys() == shown[1].keys() and all(
        one <= two or two <= one for one, two in ((shown[0][name], shown[1][name]) for name in shown[0])
    )


def _merged(entries: Sequence[dict[str, Any]], raw: bool) -> list[list[Any]]:
    """What is allocated where, whatever it reads as and wherever it lies: [end, depth, present, data or zeroes]; with
    `raw` what it reads as, allocated or not."""
    found: list[list[Any]] = []
    for entry in entries:
        kind = "data" if entry["data"] else entry["zero"]
        piece = [entry["start"] + entry["length"], entry["depth"], entry["present"], kind]
        if raw:
            piece[2:] = [entry["zero"]]
        if found and found[-1][1:] == piece[1:]:
            found[-1] = piece
        else:
            found.append(piece)
    return found


def _mapped(text: str) -> dict[str, set[int]]:
    """The sectors that lie in each file, from the table that people get."""
    found: dict[str, set[int]] = {}
    for line in text.splitlines()[1:]:
        match = re.fullmatch(r"(\w+) +(\w+) +(?:\w+ +)?(\S+)", line)
        if match is None:
            return {"": set()}
        start, length = (int(number, 16) for number in match.groups()[:2])
        found.setdefault(match[3], set()).update(range(start // 512, (start + length + 511) // 512))
    return found


RULES = (
    Rule("what is refused changes nothing", _refused),
    Rule("compressed data over allocated clusters", _compressed_over_data),
    Rule("measure with an unknown option is an error", _measure_help),
    Rule("the largest size is shown as a negative one", _overflown),
    Rule("clusters referred to twice are freed twice", _freed_twice, goes_on=True),
    Rule("qemu-img dies of a signal", _crashed),
    Rule("zeroes in data clusters are holes or written", _holes, goes_on=True),
)


def excuse(seen: Exchange) -> Rule | None:
    """The rule that excuses what differs between the two."""
    return next((rule for rule in RULES if rule.excuses(seen)), None)
