"""The exact front of latency against throughput.

An epsilon-constraint sweep: the least latency of all, then the least latency at more than that chain's
throughput, and so on until no chain is faster. Every step is solved exactly (see
`planetserve.routing.exact`), counting what a server does in the whole chain, visits apart included.

The problem is NP-hard at the fast end, where a chain has a server per block or two. So the work is
bounded: past `effort`, points are the best found, and `solve` says for each how far it may be
from the optimum. `front` and `plan` take them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from planetserve.errors import ConfigError
from planetserve.routing.exact.floor import TOLERANCE, FloorSolver
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import Chain

_LEAST_RATE = 1e-12
_COARSE_STEP = 0.05
"""Relative step of the rate once nothing is proven any more: fewer, wider points."""


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A chain of the front. `gap` bounds by what part of its latency it can be beaten; 0 is exact."""

    chain: Chain
    gap: float


class ParetoExact:
    """Front of latency and throughput.

    Args:
        effort: work to spend on one front, in partial chains looked at (some 20 us each); the
            default is about a second.
    """

    def __init__(self, effort: int = 60_000):
        if effort < 0:
            raise ConfigError(f"effort must not be negative, got {effort}")
        self._effort = effort

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
