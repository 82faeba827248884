"""Prices for limits: a subgradient ascent on the Lagrangian dual.

A chain that keeps its limits costs at least its priced cost less the price of using every limit up.
So `lower_bounds` at any prices, minus that price, is a lower bound. It rises when the prices of
what its own chain overuses are raised and the others lowered. Held and Karp (1971) did this for
tours; the step length is Polyak's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from planetserve.routing.arrays import FloatArray
from planetserve.routing.run_graph import Bounds, Limits, RunGraph, lower_bounds, usage

_SHRINK = 0.9
"""Factor on the step length whenever a step did not raise the bound."""
_MEMORY = 0.5
"""Fraction of the last direction that is kept, against zigzags (Camerini et al., 1975)."""


@dataclass(frozen=True, slots=True)
class Priced:
    """Prices, the bounds at these prices, and the lower bound on the unpriced problem they give."""

    block_price: FloatArray
    hop_price: FloatArray
    bounds: Bounds
    lower: float

    def price_of(self, limits: Limits) -> float:
        """The price of using every limit up."""
        return float(self.block_price @ limits.blocks + self.hop_price @ limits.hops)

    def on(self, free: Priced) -> Priced:
        """These prices as a start under other limits, about which only `free` is known."""
        return Priced(self.block_price, self.hop_price, free.bounds, free.lower)


def unpriced(graph: RunGraph, limits: Limits) -> Priced:
    """The starting point: nothing has a price."""
    free = np.zeros(graph.problem.num_servers)
    bounds = lower_bounds(graph, limits, free, free)
    return Priced(free, free, bounds, bounds.total)


def ascend(
    graph: RunGraph,
    limits: Limits,
    start: Priced,
    upper: Callable[[tuple[int, ...]], float],
    steps: int,
) -> Priced:
    """Better prices than `start`'s after at most `steps` steps.

    Args:
        upper: called with every chain found; returns the cost of the best known chain that keeps
            all limits. The ascent ends when the bound reaches it.
    """
    usable = limits.blocks > 0
    block_price, hop_price = start.block_price * usable, start.hop_price * usable
    best, scale = start, 1.0
    block_way, hop_way = np.zeros(len(usable)), np.zeros(len(usable))
    for _ in range(steps):
        bounds = lower_bounds(graph, limits, block_price, hop_price)
        lower = bounds.total - float(block_price @ limits.blocks + hop_price @ limits.hops)
        ceiling = upper(bounds.hosts)
        if lower > best.lower:
            best = Priced(block_price, hop_price, bounds, lower)
        else:
            scale *= _SHRINK
        if best.lower >= ceiling:
            break
        blocks, hops = usage(bounds.hosts, len(usable))
        over_blocks = np.where(usable, blocks - limits.blocks, 0)
        over_hops = np.where(usable, hops - limits.hops, 0)
        over_blocks[(over_blocks < 0) & (block_price <= 0)] = 0
        over_hops[(over_hops < 0) & (hop_price <= 0)] = 0
        if not over_blocks.any() and not over_hops.any():
            break
        block_way = (1 - _MEMORY) * over_blocks + _MEMORY * block_way
        hop_way = (1 - _MEMORY) * over_hops + _MEMORY * hop_way
        norm = float(block_way @ block_way + hop_way @ hop_way) or 1.0
        target = min(ceiling, 1.05 * best.lower)
        step = scale * max(target - lower, 0.002 * best.lower) / norm
        block_price = np.maximum(0.0, block_price + step * block_way)
        hop_price = np.maximum(0.0, hop_price + step * hop_way)
    return best
