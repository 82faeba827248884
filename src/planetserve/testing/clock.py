"""A clock for tests of code that takes one."""

from __future__ import annotations


class ManualClock:
    """Time passes when the test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def unix(self) -> float:
        return self.now_s
