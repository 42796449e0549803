"""How far an operation is: counters that workers add to and anybody may read, from any thread."""

from __future__ import annotations

import threading
import time


class Progress:
    """Bytes processed of a total. How it is shown is the reader's business."""

    __slots__ = ("_done", "_lock", "_moved", "_started", "_total")

    def __init__(self, total: int = 0) -> None:
        self._lock = threading.Lock()
        self._total = total
        self._done = 0
        self._moved = 0
        self._started = time.monotonic()

    @property
    def total(self) -> int:
        """Bytes to process, holes and zeroes included."""
        return self._total

    @property
    def done(self) -> int:
        """Bytes processed, holes and zeroes included."""
        return self._done

    @property
    def moved(self) -> int:
        """Bytes of data really read and written: what a rate is made from."""
        return self._moved

    @property
    def seconds(self) -> float:
        """Since this object was made."""
        return time.monotonic() - self._started

    @property
    def fraction(self) -> float:
        """0.0 to 1.0; 1.0 when there is nothing to do."""
        return 1.0 if self._total <= 0 else min(1.0, self._done / self._total)

    def set_total(self, total: int) -> None:
        self._total = total

    def set_done(self, done: int) -> None:
        """Where a resumed operation goes on, or where a step ended."""
        with self._lock:
            self._done = done

    def add(self, done: int, moved: int = 0) -> None:
        with self._lock:
            self._done += done
            self._moved += moved
