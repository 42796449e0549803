"""Where safeimg's outcome differs from qemu-img's on purpose. docs/design.md, "Where the output differs, and why", has
a line for each rule; a rule says exactly which outcomes it excuses, and the soak counts how often it had to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
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


def _beyond_counting(seen: Exchange) -> bool:
    """The end of the range that is asked for is more than 63 bits hold."""
    most = {"9223372036854775807", "8e", "7e"}.intersection(word.lower() for word in seen.words)
    return seen.words[0] == "map" and bool(most) and seen.expected.code == seen.answer.code == 0


def _lost_table(seen: Exchange) -> bool:
    """A snapshot whose table is not in the file: to apply or to copy it would leave an empty disk."""
    command, told = seen.words[0], seen.answer.stderr
    refused = told.endswith("Failed to load snapshot: Input/output error\n")
    applied = command == "snapshot" and seen.has("-a") and refused
    copied = command == "convert" and "L1 table lies past the end of the file" in told
    deleted = (
        command == "snapshot" and seen.has("-d") and seen.expected.code == 1
        and "Failed to update snapshot status in disk" in seen.expected.stderr
        and re.fullmatch(r"qemu-img: Could not delete snapshot '.*': Input/output error\n", told) is not None
    )  # fmt: skip
    undone = (applied or copied) and seen.expected.code == 0
    return (undone or deleted) and seen.answer.code == 1 and seen.unchanged


def _freed_twice(seen: Exchange) -> bool:
    """What two entries refer to and only one is counted for."""
    told = "qcow2_free_clusters failed: Invalid argument\n"
    rest = seen.expected._replace(stderr=seen.expected.stderr.replace(told, ""))
    return rest == seen.answer and any("twice.qcow2" in word for word in seen.words)


def _warned_again(seen: Exchange) -> bool:
    """qemu-img reads a size more than once, and warns each time."""
    told = r"qemu-img: warning: Using a multiplier suffix on hex numbers is deprecated: .*\n"
    one, two = (outcome._replace(stderr=re.sub(told, "", outcome.stderr)) for outcome in (seen.expected, seen.answer))
    return one == two


def _another_option(seen: Exchange) -> bool:
    """qemu-img names the one of several that its hash table has first."""
    pattern = r"(qemu-img: .*Parameter 'encrypt)\.([\w-]+)(' is unexpected\n)"
    one, two = (re.fullmatch(pattern, outcome.stderr) for outcome in (seen.expected, seen.answer))
    given = " ".join(seen.words)
    return (
        one is not None and two is not None and one.group(1, 3) == two.group(1, 3) and f"encrypt.{one[2]}=" in given
        and f"encrypt.{two[2]}=" in given and seen.expected.code == seen.answer.code == 1 and seen.unchanged
    )  # fmt: skip


def _crashed(seen: Exchange) -> bool:
    nothing = seen.words[0] == "bench" and seen.answer.code == 0  # requests of no bytes are none
    return seen.expected.code < 0 and (nothing or seen.answer.code == 1) and seen.unchanged


def _onto_itself(seen: Exchange) -> bool:
    """With -U, or raw, nobody's lock is in the way of emptying what is then to be read, or of an endless chain."""
    told = seen.answer.stderr
    copied = seen.words[0] in ("convert", "dd") and seen.expected.code == 0 and 'Failed to get "write" lock' in told
    rebased = seen.words[0] == "rebase" and seen.has("-U") and 'Failed to get shared "write" lock' in told
    return (copied or rebased) and seen.answer.code == 1 and seen.unchanged


def _endless(seen: Exchange) -> bool:
    """A chain that leads back to an image that is to be written, whose lock is in the way of opening it again."""
    return (
        'Failed to get shared "write" lock' in seen.expected.stderr and seen.expected.code == seen.answer.code == 1
        and "creates an infinite loop" in seen.answer.stderr and seen.unchanged
    )  # fmt: skip


def _as_raw(seen: Exchange) -> bool:
    """The file of an image, taken for a disk."""
    raw = "-fraw" in seen.words or ("-f", "raw") in pairwise(seen.words)
    same = (seen.expected.code, seen.expected.stderr) == (seen.answer.code, seen.answer.stderr)
    return raw and same and seen.rewritten and seen.words[0] in ("info", "map", "measure")


def _holes(seen: Exchange) -> bool:
    """Zeroes in clusters that a command made: written, left as holes of the file, or marked as zeroes."""
    one, two = seen.expected, seen.answer
    if not seen.rewritten or (one.code, one.stderr) != (two.code, two.stderr):
        return False
    if seen.words[0] == "measure":
        return _measured(one.stdout, two.stdout)
    if seen.words[0] == "check":
        return _counted(one.stdout) == _counted(two.stdout)
    if seen.words[0] != "map":
        return False
    try:
        sides = [json.loads(one.stdout), json.loads(two.stdout)]
    except ValueError:
        shown = [_mapped(text) for text in (one.stdout, two.stdout)]
        return shown[0].keys() == shown[1].keys() and all(
            one <= two or two <= one for one, two in ((shown[0][name], shown[1][name]) for name in shown[0])
        )
    raw = any("outraw" in word for word in seen.words)  # whose data file is zero where its tables need not say so
    return all(_alike(one, two, raw) for one, two in _cut_alike(*sides))


def _counted(text: str) -> str:
    """What `check` says, but for how many clusters hold data."""
    text = re.sub(r"\d+/(\d+) = [\d.]+% allocated, \S+ fragmented", r"\1", text)
    return re.sub(r',\s*"(allocated|fragmented)-clusters": \d+', "", text)


def _measured(expected: str, answer: str) -> bool:
    """Whether safeimg needs as much for a copy, or less."""
    pattern = r'(required size: |"required": )(\d+)'
    one, two = re.search(pattern, expected), re.search(pattern, answer)
    return (
        one is not None and two is not None and int(two[2]) <= int(one[2])
        and re.sub(pattern, r"\1", expected) == re.sub(pattern, r"\1", answer)
    )  # fmt: skip


def _cut_alike(
    one: list[dict[str, Any]], two: list[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The entries of both that say something of the same range."""
    for left in one:
        for right in two:
            if max(left["start"], right["start"]) < min(
                left["start"] + left["length"], right["start"] + right["length"]
            ):
                yield left, right


def _alike(one: dict[str, Any], two: dict[str, Any], raw: bool) -> bool:
    """Whether they may be two ways to store the same; what is there is compared besides."""
    if one["depth"] != two["depth"] or (not raw and one["present"] != two["present"]):
        return False
    return one["data"] == two["data"] or bool(one["zero"] or two["zero"])


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


def other_content(words: Sequence[str], name: str) -> str:
    """The rule by which what the image of this name shows after this line may be something else."""
    if name not in re.split(r"[,=\s]", " ".join(words)):
        return ""
    if words[0] == "convert" and any(re.match(r"-[a-zA-Z]*B|--backing|.*backing_file=", word) for word in words):
        return "what convert -B takes the rest of a cluster from, where the backing image is another one"
    encrypted = any("encrypt." in word or "key-secret" in word for word in words)
    if words[0] == "resize" and encrypted and any(word.startswith("--prealloc") for word in words):
        return "noise in what an encrypted image has been preallocated"
    return ""


RULES = (
    Rule("what is refused changes nothing", _refused),
    Rule("compressed data over allocated clusters", _compressed_over_data),
    Rule("measure with an unknown option is an error", _measure_help),
    Rule("the largest size is shown as a negative one", _overflown),
    Rule("what ends beyond 63 bits is mapped to the end", _beyond_counting),
    Rule("a snapshot whose table is not in the file is not applied", _lost_table),
    Rule("clusters referred to twice are freed twice", _freed_twice),
    Rule("sizes like 0x1k are warned of once", _warned_again, goes_on=True),
    Rule("another one of several unexpected options is named", _another_option),
    Rule("qemu-img dies of a signal", _crashed),
    Rule("an image is not emptied to be copied onto itself", _onto_itself),
    Rule("a chain that leads back to itself is called that", _endless),
    Rule("what lies where in a file is each program's own affair", _as_raw, goes_on=True),
    Rule("zeroes are written, holes, or marked as such", _holes, goes_on=True),
)


def excuse(seen: Exchange) -> Rule | None:
    """The rule that excuses what differs between the two."""
    return next((rule for rule in RULES if rule.excuses(seen)), None)
