"""Petals' two routing modes, with the costs its code uses (Borzunov et al., 2023; release 2.2).

Baselines. Both enter a server anywhere in its span but leave it only at the end, so that the graph
stays small, and both ignore bandwidth. Filters, including free cache, are applied first like for
any other optimiser, so Petals' penalty for a short cache never applies.
"""

from __future__ import annotations

import numpy as np

from planetserve.routing.arrays import FloatArray, IntArray
from planetserve.routing.greedy_walk import run_ends, walk
from planetserve.routing.optimizers.base import checked_seed
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import Chain

HOP_OVERHEAD_MS = 18.0
"""Overhead in milliseconds that Petals adds for every visit, whatever the swarm's own is."""


class PetalsMinLatency:
    """Petals' `min_latency`: the shortest path where a run goes on to the end of the span."""

    def plan(self, snapshot: SwarmSnapshot, request: ChainRequest) -> Chain:
        problem = RoutingProblem.build(snapshot, request)
        ends = run_ends(problem)
        to_go = _cost_to_go(problem, ends)

        def nearest(block: int, previous: int | None) -> int:
            if previous is None:
                links = problem.client_half_ms
            else:
                links = problem.links.row(previous)
            return int(np.argmin(links + to_go[block]))

        return walk(problem, nearest, lambda block, server: int(ends[block, server]))


def _cost_to_go(problem: RoutingProblem, ends: IntArray) -> FloatArray:
    """`[num_blocks, n]` cost of the rest when the server starts a run at the block."""
    num_blocks, n = problem.legal.shape
    everybody, alike = np.arange(n), np.ones(n)
    to_go = np.full((num_blocks, n), np.inf)
    leave = np.full((num_blocks + 1, n), np.inf)
    leave[num_blocks] = problem.client_half_ms
    for block in range(num_blocks - 1, -1, -1):
        here = np.flatnonzero(problem.legal[block])
        end = ends[block, here]
        run_ms = (end - block) * problem.decode_ms[here]
        to_go[block, here] = HOP_OVERHEAD_MS + run_ms + leave[end, here]
        if block > 0:
            # A run goes on to the end of the span, so no server follows itself.
            leave[block] = problem.links.cheapest(to_go[block], everybody, alike)
    return to_go


class PetalsMaxThroughput:
    """Petals' `max_throughput`: a random walk that favours servers with many blocks still ahead.

    Args:
        seed: of the walk; None draws a fresh one for every plan.
    """

    def __init__(self, seed: int | None = None):
        self._seed = checked_seed(seed)

    def plan(self, snapshot: SwarmSnapshot, request: ChainRequest) -> Chain:
        problem = RoutingProblem.build(snapshot, request)
        rng = np.random.default_rng(self._seed)
        ends = run_ends(problem)

        def by_length(block: int, _previous: int | None) -> int:
            here = np.flatnonzero(problem.legal[block])
            ahead = ends[block, here] - block
            return int(rng.choice(here, p=ahead / ahead.sum()))

        return walk(problem, by_length, lambda block, server: int(ends[block, server]))
