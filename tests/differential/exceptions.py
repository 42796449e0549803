"""Where safeimg's outcome differs from qemu-img's on purpose. docs/design.md, "Where the output differs, and why", has
a line for each rule; a rule says exactly which outcomes it excuses, and the soak counts how often it had to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


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

    def has(self, *options: str) -> bool:
        """Whether one of the short options is there, with a value in the same word or among others."""
        return any(
            re.match(r"-[A-Za-z]", word) and option[1] in word[1:] for word in self.words for option in options
        )


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    excuses: Callable[[Exchange], bool]


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
        and re.match(r"qemu-img: unrecognized option '-", seen.answer.stderr) is not None
    )  # fmt: skip


RULES = (
    Rule("what is refused changes nothing", _refused),
    Rule("compressed data over allocated clusters", _compressed_over_data),
    Rule("measure with an unknown option is an error", _measure_help),
)


def excuse(seen: Exchange) -> str:
    """The rule that excuses what differs between the two; empty if none does."""
    return next((rule.name for rule in RULES if rule.excuses(seen)), "")
