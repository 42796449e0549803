"""A violation made small: as few crashes, as few lost and torn writes, and as early as it still shows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from powercut.explore import follow, judge_again
from powercut.judge import CLEAN, Judge, Leg
from powercut.look import Violation
from safeimg.drivers.storage.powercut import spell_out, spelled_description

ATTEMPTS = 400  # states judged at most


def shrunk(judge: Judge, legs: Sequence[Leg]) -> Violation | None:
    """The violation at the end of the shortest way there that was found; None if there is none at its end."""
    found = _violation(judge, legs)
    if found is None:
        return None
    best, left, smaller = list(legs), ATTEMPTS, True
    while smaller:
        smaller = False
        for shorter in _shorter(judge, best):
            left -= 1
            if left < 0:
                return found
            violation = _violation(judge, shorter)
            if violation is not None:
                best, found, smaller = shorter, violation, True
                break
    return found


def _violation(judge: Judge, legs: Sequence[Leg]) -> Violation | None:
    try:
        judge_again(judge, legs)
    except Violation as violation:
        return violation
    except (ValueError, *CLEAN):  # there is no such state, or no way to it
        return None
    return None


def _shorter(judge: Judge, legs: list[Leg]) -> Iterator[list[Leg]]:
    """What is a little simpler, the simplest first."""
    for end in range(1, len(legs)):
        yield legs[:end]
    for number in range(1, len(legs) - 1):
        yield [*legs[:number], *legs[number + 1 :]]
    for number in reversed(range(len(legs))):
        initial, trace, _ = follow(judge, legs)[number]
        lost = spell_out(initial, trace, legs[number].crash)
        if lost is None:
            prefix = int(legs[number].crash.partition("prefix=")[2].split()[0])
            crashes = [f"prefix={early} seed=0 kind=kill member=whole" for early in range(prefix)]
        else:
            prefix, items = lost
            crashes = [spelled_description(prefix, [each for each in items if each != one]) for one in items]
            crashes += [spelled_description(early, items) for early in range(prefix)] if items else []
        for crash in crashes:
            yield [*legs[:number], legs[number]._replace(crash=crash), *legs[number + 1 :]]
