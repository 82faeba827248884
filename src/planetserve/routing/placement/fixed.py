"""Hold a configured span, whatever the other servers hold."""

from __future__ import annotations

from collections.abc import Sequence

from planetserve.errors import ConfigError
from planetserve.routing.placement.base import check_sizes
from planetserve.routing.snapshot import ServerPoint
from planetserve.types import BlockSpan


class Fixed:
    """Always `num_blocks` blocks from `start`."""

    def __init__(self, start: int = 0):
        self._start = start

    def choose_span(
        self,
        servers: Sequence[ServerPoint],
        num_blocks_model: int,
        num_blocks: int,
        own_tokens_per_s_per_block: float,
    ) -> BlockSpan:
        check_sizes(num_blocks_model, num_blocks)
        if not 0 <= self._start <= num_blocks_model - num_blocks:
            raise ConfigError(
                f"blocks {self._start}:{self._start + num_blocks} leave the model, "
                f"which has {num_blocks_model}"
            )
        return BlockSpan(self._start, self._start + num_blocks)
