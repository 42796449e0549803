"""What a check finds and repairs: counters and messages of `qemu-img check`, as they come."""

from __future__ import annotations

MAX_MESSAGES = 100_000


class Findings:
    """`leaks` and `corruptions` are those that stay; a repair moves them to the `…_fixed` ones."""

    def __init__(self) -> None:
        self.corruptions = self.leaks = self.check_errors = 0
        self.corruptions_fixed = self.leaks_fixed = 0
        self.allocated_clusters = self.fragmented_clusters = self.compressed_clusters = 0
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(message)

    def corrupt(self, message: str) -> None:
        self.corruptions += 1
        self.say(message)

    def corrected(self, message: str) -> None:
        """Something that was wrong no longer is."""
        self.corruptions_fixed += 1
        self.say(message)
