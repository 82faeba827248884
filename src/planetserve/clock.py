"""Time as a dependency: pure code takes a `Clock`, so that tests decide what time it is."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Source of time."""

    def monotonic(self) -> float:
        """Seconds that never go back: for timeouts, leases and measurements."""
        ...

    def unix(self) -> float:
        """Seconds since the epoch: for records that other machines read."""
        ...


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def unix(self) -> float:
        return time.time()
