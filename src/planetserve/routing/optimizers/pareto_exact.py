"""The exact front of latency against throughput.

An epsilon-constraint sweep: the least latency of all, then the least latency at more than that
chain's throughput, and so on until no chain is faster. Every step is solved exactly (see
`planetserve.routing.exact`), counting what a server does in the whole chain, all visits together.

The problem is NP-hard at the fast end, where a chain has a server per block or two. So the work is
bounded: past `effort`, points are the best found, at wider steps, and `solve` says for each by how
much it might be beaten. `front` and `plan` take them as they are.
"""

from __future__ import annotations

from planetserve.errors import ConfigError
from planetserve.routing.exact.floor import TOLERANCE, FloorSolver
from planetserve.routing.front import pick_chain
from planetserve.routing.optimizers.base import FrontPoint
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import Chain

_LEAST_RATE = 1e-12
_COARSE_STEP = 0.05
"""Relative step of the rate once nothing is proven any more."""


class ParetoExact:
    """Front of latency and throughput.

    Args:
        effort: work to spend on one front, in partial chains looked at, some 10 us each. The
            default proves the whole front of a swarm of 100 servers that each hold up to a third of
            80 blocks, in about a second.
    """

    def __init__(self, effort: int = 80_000):
        if effort < 0:
            raise ConfigError(f"effort must not be negative, got {effort}")
        self._effort = effort

    def plan(self, snapshot: SwarmSnapshot, request: ChainRequest) -> Chain:
        return pick_chain(self.front(snapshot, request), request)

    def front(self, snapshot: SwarmSnapshot, request: ChainRequest) -> tuple[Chain, ...]:
        return tuple(point.chain for point in self.solve(snapshot, request))

    def solve(self, snapshot: SwarmSnapshot, request: ChainRequest) -> tuple[FrontPoint, ...]:
        problem = RoutingProblem.build(snapshot, request)
        solver = FloorSolver(problem, self._effort)
        points: list[FrontPoint] = []
        rate = _LEAST_RATE
        while True:
            answer = solver.solve(rate)
            if answer.chain is None:
                return tuple(points)
            chain = answer.chain
            while points and points[-1].chain.latency_ms >= chain.latency_ms * (1 - TOLERANCE):
                points.pop()
            gap = 0.0 if answer.exact else 1 - answer.lower_ms / chain.latency_ms
            points.append(FrontPoint(chain, gap))
            step = _COARSE_STEP if solver.exhausted else TOLERANCE
            rate = chain.throughput_tokens_per_s * (1 + step)
