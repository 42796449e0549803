"""The time that goes on record."""

from __future__ import annotations

import time


def now() -> float:
    """Seconds since the epoch by the system's clock. That may jump and be wrong: nothing is decided by it, and the
    order of events is that of their sequence numbers."""
    return max(0.0, time.time())  # an event tells of no time before the epoch
