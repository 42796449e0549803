"""New structures on their way to space that nobody references, a step's worth at a time: see `api.Changes.fresh`."""

from __future__ import annotations

STEP_BYTES = 8 << 20  # of new structures in one step


class Pieces:
    """Collects (offset, content); neighbours become one."""

    def __init__(self) -> None:
        self._held: list[tuple[int, bytearray]] = []
        self._collected = 0

    def add(self, offset: int, content: bytes) -> bool:
        """Whether enough has come together for a step."""
        if self._held and self._held[-1][0] + len(self._held[-1][1]) == offset:
            self._held[-1][1].extend(content)
        else:
            self._held.append((offset, bytearray(content)))
        self._collected += len(content)
        return self._collected >= STEP_BYTES

    def take(self) -> tuple[tuple[int, bytes], ...]:
        """What has come together since the last time."""
        taken = tuple((offset, bytes(content)) for offset, content in self._held)
        self._held, self._collected = [], 0
        return taken
