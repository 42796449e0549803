"""The rate limit: a token bucket.

        tokens drip in: `rate` bytes a second
              |
        +-----v-----+  depth: what may be taken at once after a pause,
        |  . . . .  |  a tenth of a second's worth. More is not saved up, so a slow
        |  . . . .  |  start or a long sync is not made good by a burst later.
        +-----+-----+
              |
        workers take the bytes of a chunk before they move it. The level may go below
        zero: a chunk larger than the bucket waits until its own bytes have dripped in,
        and whoever comes next waits behind it. So the average holds whatever the size
        of the chunks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class TokenBucket:
    """Lets `rate` bytes a second through, on average; shared by all workers of a transfer."""

    def __init__(self, rate: int, clock: Callable[[], float] = time.monotonic) -> None:
        if rate <= 0:
            raise ValueError("the rate must be positive")
        self._rate = rate
        self._depth = rate / 10
        self._clock = clock
        self._lock = threading.Lock()
        self._level = 0.0
        self._filled = clock()

    def take(self, amount: int) -> float:
        """Takes `amount` bytes; the seconds to wait before moving them."""
        with self._lock:
            now = self._clock()
            self._level = min(self._depth, self._level + (now - self._filled) * self._rate)
            self._filled = now
            self._level -= amount
            return max(0.0, -self._level / self._rate)
