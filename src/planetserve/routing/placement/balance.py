"""Join where the swarm has the least throughput.

Like Petals' block selection (Borzunov et al., 2023), a server adds up the throughput of each block
over all servers that hold it, and joins the blocks with the least. The rule is leximin: of all
windows, take the one after which the sorted list of block throughputs is greatest, compared from
the weakest block up. So blocks without a server come first, and among windows that raise the
weakest block equally the next weakest decides. Equal servers that join one after the other tile the
model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planetserve.errors import ConfigError
from planetserve.routing.arrays import FloatArray
from planetserve.routing.placement.base import check_sizes
from planetserve.routing.snapshot import ServerPoint
from planetserve.types import BlockSpan

_DIGITS = 9
"""Number of significant digits at which throughputs are compared, so that the order of summation
never decides."""


class Balance:
    """Leximin over block throughputs; ties go to the lowest start."""

    def choose_span(
        self,
        servers: Sequence[ServerPoint],
        num_blocks_model: int,
        num_blocks: int,
        own_tokens_per_s_per_block: float,
    ) -> BlockSpan:
        check_sizes(num_blocks_model, num_blocks)
        if not 0 < own_tokens_per_s_per_block < np.inf:
            raise ConfigError("own_tokens_per_s_per_block must be positive and finite")
        covered = block_throughputs(servers, num_blocks_model)
        starts = num_blocks_model - num_blocks + 1
        after = np.tile(covered, (starts, 1))
        for start in range(starts):
            after[start, start : start + num_blocks] += own_tokens_per_s_per_block / num_blocks
        best = _leximin(after)
        return BlockSpan(best, best + num_blocks)


def block_throughputs(servers: Sequence[ServerPoint], num_blocks_model: int) -> FloatArray:
    """Tokens per second each block gets from all its holders, each running its whole span.

    Spans are cut at the model's end; what servers announce is not trusted to fit it.
    """
    total = np.zeros(num_blocks_model)
    for server in servers:
        total[server.start : server.end] += server.tokens_per_s_per_block / len(server.span)
    return total


def _leximin(rows: FloatArray) -> int:
    """The first of the rows whose sorted values are greatest, compared from the smallest on."""
    ordered = _rounded(np.sort(rows, axis=1))
    # lexsort takes the most significant key last.
    best = ordered[np.lexsort(ordered.T[::-1])[-1]]
    return int(np.argmax((ordered == best).all(axis=1)))


def _rounded(values: FloatArray) -> FloatArray:
    """Non-negative `values` at `_DIGITS` significant digits."""
    magnitude = np.floor(np.log10(values, out=np.zeros_like(values), where=values > 0))
    unit = 10.0 ** (magnitude - (_DIGITS - 1))
    rounded: FloatArray = np.round(values / unit) * unit
    return rounded
