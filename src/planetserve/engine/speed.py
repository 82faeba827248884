"""How fast a span runs lately: moving averages over real batches, in the units servers announce.

Written by the engine thread, read anywhere (`reading` is replaced as a whole).
"""

from __future__ import annotations

from planetserve.scheduler.batch import ScheduledBatch

_WEIGHT = 0.1
_MIN_LARGE_BATCH = 16
"""Only batches of at least this many tokens say something about throughput."""


class Speedometer:
    """Moving averages of decode latency and of throughput, per block."""

    def __init__(self, num_blocks: int):
        self._num_blocks = num_blocks
        self.reading = (0.0, 0.0)
        """Milliseconds of a decode step per block, tokens per second through a block.
        0 for what has not been seen yet."""

    def reset(self) -> None:
        """Forget everything so far."""
        self.reading = (0.0, 0.0)

    def record(self, batch: ScheduledBatch, elapsed_s: float) -> None:
        """Take a batch into account that ran for `elapsed_s`."""
        decode_ms, tokens_per_s = self.reading
        seconds_per_block = max(elapsed_s, 1e-9) / self._num_blocks
        if any(piece.num_tokens == 1 for piece in batch.pieces):
            decode_ms = _average(decode_ms, 1000 * seconds_per_block)
        num_tokens = batch.num_tokens
        if num_tokens >= _MIN_LARGE_BATCH:
            tokens_per_s = _average(tokens_per_s, num_tokens / seconds_per_block)
        self.reading = (decode_ms, tokens_per_s)


def _average(old: float, new: float) -> float:
    return new if old == 0 else old + _WEIGHT * (new - old)
