"""Selection of the servers to plan on, out of very many.

Planning time grows with the square of the servers. In a large swarm nearly all of them are too far
away or too slow to be in a good chain, so the best few hundred are enough: for every block in turn
its best holder, then its second best, and so on.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from planetserve.routing.arrays import FloatArray


def best_holders(
    start: NDArray[np.intp],
    end: NDArray[np.intp],
    cost: FloatArray,
    num_blocks: int,
    limit: int,
) -> NDArray[np.intp]:
    """Positions, sorted, of at most `limit` servers. Every block keeps its best holders, as many as
    the limit allows.

    Args:
        start, end: `[n]` spans.
        cost: `[n]` the lower, the better.
        num_blocks: of the model.
        limit: how many to keep; at least `num_blocks`, so that every block keeps one.
    """
    if len(cost) <= limit:
        return np.arange(len(cost))
    order = np.argsort(cost, kind="stable")
    blocks = np.arange(num_blocks)
    holds = (start[order, None] <= blocks) & (blocks < end[order, None])
    rank = np.where(holds, np.cumsum(holds, axis=0, dtype=np.int32), np.iinfo(np.int32).max)
    best_rank = rank.min(axis=1)
    kept: NDArray[np.intp] = np.sort(order[np.argsort(best_rank, kind="stable")[:limit]])
    return kept
