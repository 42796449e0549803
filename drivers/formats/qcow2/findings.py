"""What a check finds and repairs: counters and messages of `qemu-img check`, as they come."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_MESSAGES = 100_000


@dataclass(slots=True)
class Findings:
    """`leaks` and `corruptions` are those that stay; a repair moves them to the `…_fixed` ones."""

    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    messages: list[str] = field(default_factory=list)

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
