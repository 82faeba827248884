"""Recent speed of a span, in the units that servers announce.

A step through `n` blocks takes `overhead_ms + n * decode_ms_per_block`: the first part is what a
step costs whatever its blocks, the second grows with them. Both are timed once at load
(`Engine.measure`). Afterwards every decode step is timed from its arrival to its result, so that
waiting for other sessions' steps counts: that is the time per block *under the current load*.

Pure: times come in as arguments. `StepLatency` belongs to the event loop's thread, `PassSpeed` to
the engine thread, which replaces its reading as a whole so that anybody may read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_PASS_WEIGHT = 0.1
_MIN_LARGE_PASS = 16
"""Minimum tokens of a pass that counts for the throughput."""

_AVERAGE_S = 5.0
"""Time constant in seconds of the average over steps."""
_MAX_WEIGHT = 0.2
_LEAST_ALONE_WEIGHT = 0.05
_HANDLING_MS = 0.5
"""Handling time in milliseconds that is assumed before any step was measured."""
_HANDLING_WEIGHT = 0.05
_FORGET_S = 30.0
"""Time constant in seconds with which the measured load decays once a server has been idle for
`_AVERAGE_S`."""
_LEAST_MS = 1e-6


@dataclass(frozen=True, slots=True)
class StepCost:
    """Time of one decode step through `n` blocks: `overhead_ms + n * ms_per_block`."""

    overhead_ms: float
    ms_per_block: float

    @classmethod
    def fit(cls, all_ms: float, one_ms: float | None, num_blocks: int) -> StepCost:
        """From a step through all of `num_blocks` blocks and, if it was timed, one through one."""
        if one_ms is None or num_blocks == 1:
            return cls(0.0, max(all_ms / num_blocks, _LEAST_MS))
        slope = (all_ms - one_ms) / (num_blocks - 1)
        # Noise can make few blocks look as dear as many, or an overhead negative.
        slope = min(max(slope, _LEAST_MS), all_ms / num_blocks)
        return cls(all_ms - num_blocks * slope, slope)


class StepLatency:
    """Decode time per block under the current load, from finished steps.

    Args:
        cost: as timed without load.
        now_s: monotonic time.
    """

    def __init__(self, cost: StepCost, now_s: float):
        self.cost = cost
        self._alone_ms = cost.ms_per_block
        self._num_alone = 1  # the timing at load, which may have met a busy machine
        self._recent_ms = cost.ms_per_block
        self._handling_ms = _HANDLING_MS
        self._latest_s = now_s

    def add(self, elapsed_ms: float, num_blocks: int, *, alone: bool, now_s: float) -> None:
        """Record one decode step.

        Args:
            elapsed_ms: from its arrival to its result.
            num_blocks: blocks it went through.
            alone: nothing else was in the engine meanwhile, so this is what a step takes unloaded.
            now_s: monotonic time.
        """
        sample = max(elapsed_ms - self.cost.overhead_ms, _LEAST_MS) / num_blocks
        if alone:
            self._num_alone += 1
            alone_weight = max(_LEAST_ALONE_WEIGHT, 1 / self._num_alone)
            self._alone_ms += alone_weight * (sample - self._alone_ms)
        weight = min(_MAX_WEIGHT, -math.expm1((self._latest_s - now_s) / _AVERAGE_S))
        known = self.ms_per_block(now_s)
        self._recent_ms = known + weight * (sample - known)
        self._latest_s = now_s

    def add_handling(self, elapsed_ms: float) -> None:
        """Record the time of a step outside the engine: receiving, opening, sealing, sending."""
        self._handling_ms += _HANDLING_WEIGHT * (elapsed_ms - self._handling_ms)

    @property
    def overhead_ms(self) -> float:
        """What a step costs whatever its blocks."""
        return self.cost.overhead_ms + self._handling_ms

    @property
    def alone_ms_per_block(self) -> float:
        """Time per block of a step that runs alone."""
        return self._alone_ms

    def ms_per_block(self, now_s: float) -> float:
        """The recent average; without recent steps it returns to that of an unloaded server."""
        idle_s = max(0.0, now_s - self._latest_s - _AVERAGE_S)
        return self._alone_ms + math.exp(-idle_s / _FORGET_S) * (self._recent_ms - self._alone_ms)


class PassSpeed:
    """Tokens per second through one block, from large passes."""

    def __init__(self) -> None:
        self.tokens_per_s_per_block = 0.0
        """0 until a large pass has run."""

    def record(self, num_tokens: float, num_blocks: int, elapsed_s: float) -> None:
        """Record a pass that ran for `elapsed_s`.

        Args:
            num_tokens: that went through each of its blocks, on average.
            num_blocks: it went through.
            elapsed_s: its time.
        """
        if num_tokens < _MIN_LARGE_PASS:
            return
        newest = num_tokens * num_blocks / max(elapsed_s, 1e-9)
        known = self.tokens_per_s_per_block or newest
        self.tokens_per_s_per_block = known + _PASS_WEIGHT * (newest - known)
