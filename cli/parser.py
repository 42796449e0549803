"""GNU getopt_long's syntax, with the messages of qemu-img's options.

Written out, because qemu-img's messages name the element of the command line that getopt's index stands
behind, which is not always the one with the mistake (`info a -Zq` complains about `a`): programs that compare
stderr see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safeimg.cli.errors import usage
from safeimg.cli.objects import UserObject, store
from safeimg.cli.options import Command, Option
from safeimg.drivers.secrets import Secrets


class Arguments:
    """What the command line says: the values of its options in the order given, and the other arguments."""

    __slots__ = ("_values", "positional", "secrets")

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}
        self.positional: list[str] = []
        self.secrets = Secrets()  # those that `--object` gives

    def add(self, name: str, value: Any) -> None:
        if isinstance(value, UserObject):
            store(value, self.all(name), self.secrets)
        self._values.setdefault(name, []).append(value)

    def flag(self, name: str) -> bool:
        return name in self._values

    def last(self, name: str, default: Any = None) -> Any:
        """The value of an option: the last one wins, as in qemu-img."""
        return self._values[name][-1] if name in self._values else default

    def all(self, name: str) -> list[Any]:
        return self._values.get(name, [])


class _Scanner:
    """A command line under getopt's eyes: options are moved in front of the arguments as they are found."""

    def __init__(self, words: Sequence[str], permute: bool) -> None:
        self.words = list(words)
        self.next = 1  # the index of the next word; the word before it is what messages name
        self._permute = permute
        self._skipped = (1, 1)  # arguments passed over so far, to be moved behind the options that follow
        self._cluster = ""  # what is left of a word of short options

    def _gather(self) -> None:
        """Moves the arguments passed over behind the options that were found after them."""
        first, last = self._skipped
        if first == last:
            self._skipped = (self.next, self.next)
        elif last != self.next:
            self.words[first : self.next] = self.words[last : self.next] + self.words[first:last]
            self._skipped = (first + self.next - last, self.next)

    def option(self) -> str | None:
        """The next long option's word, or "-x" for the next short one; None behind the last."""
        if self._cluster:
            return "-" + self._cluster[0]
        words = self.words
        if self._permute:
            self._gather()
            while self.next < len(words) and not _is_option(words[self.next]):
                self.next += 1
            self._skipped = (self._skipped[0], self.next)
        if self.next < len(words) and words[self.next] == "--":
            self.next += 1
            self._gather()
            self._skipped = (self._skipped[0], len(words))
            self.next = self._skipped[0] if self._permute else self.next
            return None
        if self.next >= len(words) or not _is_option(words[self.next]):
            self.next = self._skipped[0] if self._permute else self.next
            return None
        if words[self.next].startswith("--"):
            self.next += 1
            return words[self.next - 1]
        self._cluster = words[self.next][1:]
        return "-" + self._cluster[0]

    def take_letter(self) -> None:
        self._cluster = self._cluster[1:]
        if not self._cluster:
            self.next += 1

    def argument(self) -> str | None:
        """What follows an option that takes an argument."""
        if self._cluster:
            value, self._cluster = self._cluster, ""
            self.next += 1
            return value
        if self.next < len(self.words):
            self.next += 1
            return self.words[self.next - 1]
        return None

    @property
    def current(self) -> str:
        """The word that messages name."""
        return self.words[self.next - 1]


def _is_option(word: str) -> bool:
    return len(word) > 1 and word[0] == "-"


def parse(
    command: Command, words: Sequence[str], *, permute: bool = True
) -> tuple[Arguments, str | None]:
    """Parses `words`, of which the first is the command's (or program's) name; also the name of the
    option, if any, behind which nothing counts (`Option.ends`).

    Values are checked as they are met, so that of several mistakes the one reported is the one that qemu-img
    reports. With `permute` False it stops at the first argument that is no option. Raises `CommandError`."""
    arguments = Arguments()
    last: list[str] = []
    if command.takes_last:
        if len(words) < 3:
            if any(word in ("-h", "--help") for word in words[1:]):
                return arguments, "help"
            raise usage("Not enough arguments")
        words, last = words[:-1], [words[-1]]
    scanner, chosen = _Scanner(words, permute), False
    while (word := scanner.option()) is not None:
        value: str | None = None
        if word.startswith("--"):
            name, given, text = word[2:].partition("=")
            option = _long(command.options, name)
            if option is None or (given and option.argument is None):
                raise usage(f"unrecognized option '{scanner.current}'")
            if given:
                value = text
            elif option.argument is not None:
                value = scanner.argument()
        else:
            scanner.take_letter()
            option = _short(command.options, word[1])
            if option is None:
                raise usage(f"unrecognized option '{scanner.current}'")
            if option.argument is not None:
                value = scanner.argument()
        if option.ends:
            return arguments, option.name
        if option.argument is not None and value is None:
            raise usage(f"missing argument for option '{scanner.current}'")
        if option.short is not None and option.short in command.alone:
            if chosen:
                raise usage("Cannot mix " + ", ".join(f"'-{letter}'" for letter in command.alone))
            chosen = True
        found = option.constant if value is None else value
        arguments.add(option.name, found if option.check is None else option.check(found))
    arguments.positional = scanner.words[scanner.next :] + last
    return arguments, None


def _short(options: Sequence[Option], letter: str) -> Option | None:
    for option in options:
        if option.short == letter:
            return option
    return None


def _long(options: Sequence[Option], name: str) -> Option | None:
    """An option by its long name or an abbreviation that fits only one."""
    found = []
    for option in options:
        if option.long is not None:
            if option.long == name:
                return option
            if option.long.startswith(name) and not option.own:
                found.append(option)
    return found[0] if len(found) == 1 else None
