"""getopt_long's syntax."""

from __future__ import annotations

import getopt

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safeimg.cli.commands import find, names
from safeimg.cli.errors import CommandError
from safeimg.cli.options import Command, Option
from safeimg.cli.parser import parse

TOY = Command(
    "toy", "", (),
    (
        Option("flag", "a", "alpha", None, ""), Option("beta", "b", "beta", "x", ""),
        Option("bell", None, "bell", None, ""), Option("gamma", "g", None, "x", ""),
    ),
    (),
)  # fmt: skip

WORDS = st.lists(
    st.sampled_from(
        ["-a", "-b", "-bx", "-ab", "-abx", "-ba", "-g", "-gz", "-z", "--alpha", "--al", "--be", "--bet", "--bet=y",
         "--bell", "--beta=", "--alpha=x", "--zeta", "--", "-", "x", "y", "--beta"]
    ),
    max_size=6,
)  # fmt: skip


@given(WORDS)
def test_as_the_standard_library_parses(words: list[str]) -> None:
    """Same values and arguments as Python's own gnu_getopt, or an error in both."""
    try:
        pairs, rest = getopt.gnu_getopt(words, "ab:g:", ["alpha", "beta=", "bell"])
    except getopt.GetoptError:
        with pytest.raises(CommandError):
            parse(TOY, ["toy", *words])
        return
    arguments, _ = parse(TOY, ["toy", *words])
    names = {"-a": "flag", "--alpha": "flag", "-b": "beta", "--beta": "beta", "--bell": "bell", "-g": "gamma"}
    for name in set(names.values()):
        expected = [value for option, value in pairs if names[option] == name]
        assert len(arguments.all(name)) == len(expected)
        if name in ("beta", "gamma"):
            assert arguments.all(name) == expected
    assert arguments.positional == rest


@pytest.mark.parametrize("command", [found for name in names() if (found := find(name))], ids=lambda c: c.name)
def test_the_table_is_unambiguous(command: Command) -> None:
    shorts = [option.short for option in command.options if option.short]
    longs = [option.long for option in command.options if option.long]
    assert len(shorts) == len(set(shorts))
    assert len(longs) == len(set(longs))
    assert command.examples
    for _, line in command.examples:
        words = [word.strip("'") for word in line.split()]
        parsed, helped = parse(command, words)
        free = command.name in ("status", "recover", "abandon", "amend", "measure", "gc")
        assert (parsed.positional and not helped) or free


def test_find() -> None:
    assert find("info") is not None
    assert find("inf") is None
