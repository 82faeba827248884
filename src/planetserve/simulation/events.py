"""Callbacks in simulated time. A simpy process per token would cost several times as much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import simpy

T = TypeVar("T")


def later(env: simpy.Environment, delay_s: float, callback: Callable[[T], None], value: T) -> None:
    """Call `callback(value)` after `delay_s`; events of the same moment keep the order of the
    calls."""

    def fire(_event: Any) -> None:
        callback(value)

    env.timeout(delay_s).callbacks.append(fire)


class SimClock:
    """Simulated time as the `Clock` that real components take."""

    def __init__(self, env: simpy.Environment):
        self._env = env

    def monotonic(self) -> float:
        return float(self._env.now)

    def unix(self) -> float:
        return float(self._env.now)
