"""A good chain that keeps every limit, found fast: the upper end of the exact search.

One path is kept per boundary and server, the cheapest found so far, with its own counts; it is only
extended to servers that its counts allow. So what comes out keeps all limits, but it need not be
the best, and there may be a chain although none comes out.
"""

from __future__ import annotations

import numpy as np

from planetserve.routing.exact.bounds import Limits, RunGraph
from planetserve.routing.exact.meter import Meter
from planetserve.routing.problem import IntArray
from planetserve.routing.snapshot import FloatArray

_MAX_CELLS = 40_000_000
"""Counts kept at most, 2 bytes each; beyond that there is no answer."""


def feasible_chain(
    graph: RunGraph, limits: Limits, block_price: FloatArray, hop_price: FloatArray
) -> tuple[int, ...] | None:
    """A chain within `limits`, cheap at the given prices, as a host per block, or None."""
    problem = graph.problem
    num_blocks, n = problem.legal.shape
    held = problem.legal.sum(axis=0)
    tight_blocks = np.flatnonzero((limits.blocks > 0) & (limits.blocks < held))
    tight_hops = np.flatnonzero((limits.hops > 0) & (limits.hops < limits.blocks))
    meter = Meter.of(limits, tight_blocks.tolist(), tight_hops.tolist())
    if (num_blocks + 1) * n * len(meter.limit) > _MAX_CELLS:
        return None
    block_ms, visit_ms = problem.decode_ms + block_price, problem.hop_ms + hop_price
    cost = np.full((num_blocks + 1, n), np.inf)
    used = np.zeros((num_blocks + 1, n, len(meter.limit)), dtype=np.int16)
    came = np.zeros((num_blocks + 1, n, 2), dtype=np.intp)
    for block in range(num_blocks):
        here = graph.holders[block]
        here_columns = np.flatnonzero(limits.blocks[here] > 0)
        here = here[here_columns]
        if block == 0:
            before = np.zeros(1, dtype=np.intp)
            arrive = graph.links[0][:, here_columns]
            counts = np.zeros((1, len(meter.limit)), dtype=np.int16)
        else:
            before = graph.holders[block - 1]
            arrive = cost[block, before][:, None] + graph.links[block][:, here_columns]
            counts = used[block, before]
        arrive = np.where(meter.may_enter(counts, here), arrive, np.inf)
        best = arrive.argmin(axis=0)
        entered = arrive[best, np.arange(len(here))] + visit_ms[here]
        alive = np.flatnonzero(np.isfinite(entered))
        if not len(alive):
            continue
        here, best, entered = here[alive], best[alive], entered[alive]
        counts = counts[best]
        meter.charge_visit(counts, here)
        last = np.minimum(
            graph.run_end[block, here] - block, meter.blocks_left(counts, here, limits)
        )
        steps = np.arange(1, int(last.max()) + 1)[:, None]
        through = np.where(steps <= last, entered + steps * block_ms[here], np.inf)
        step, column = np.nonzero(through < cost[block + 1 : block + 1 + len(steps), here])
        server = here[column]
        cost[block + 1 + step, server] = through[step, column]
        counts = counts[column]
        meter.charge_blocks(counts, server, (step + 1).astype(np.int16))
        used[block + 1 + step, server] = counts
        came[block + 1 + step, server, 0] = block
        came[block + 1 + step, server, 1] = before[best[column]]
    final = cost[num_blocks] + problem.client_half_ms
    if not np.isfinite(final).any():
        return None
    return _trace(came, int(final.argmin()))


def _trace(came: IntArray, server: int) -> tuple[int, ...]:
    hosts: list[int] = []
    at = len(came) - 1
    while at > 0:
        start, previous = int(came[at, server, 0]), int(came[at, server, 1])
        hosts += [server] * (at - start)
        at, server = start, previous
    return tuple(reversed(hosts))
