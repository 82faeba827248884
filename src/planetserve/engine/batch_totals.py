"""Counts what an engine has run since its start. Pure numbers, written on the engine thread."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Upper bounds of the classes of batches, in tokens; the last class has none."""


@dataclass(slots=True)
class BatchTotals:
    """Since the start. Any thread may read it; numbers of one moment may be a batch apart."""

    decode_tokens: int = 0
    """Tokens of one-token steps."""
    prompt_tokens: int = 0
    """Tokens of longer steps."""
    busy_s: float = 0.0
    """Seconds in batches; on a CPU those of the engine thread."""
    by_size: list[int] = field(default_factory=lambda: [0] * (len(BATCH_SIZES) + 1))
    """Batches of each class."""

    def add(self, num_tokens: int, num_prompt: int, elapsed_s: float) -> None:
        """Count a batch."""
        self.decode_tokens += num_tokens - num_prompt
        self.prompt_tokens += num_prompt
        self.busy_s += elapsed_s
        self.by_size[bisect_left(BATCH_SIZES, num_tokens)] += 1
