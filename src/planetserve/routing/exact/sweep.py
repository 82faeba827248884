"""The epsilon-constraint sweep: the least latency at every throughput there is, slowest first.

The least latency of all, then the least latency at more than that chain's throughput, and so on
until no chain is faster.
"""

from __future__ import annotations

from planetserve.routing.exact.floor import TOLERANCE, Answer, FloorSolver
from planetserve.routing.problem import RoutingProblem

_LEAST_RATE = 1e-12
_COARSE_STEP = 0.05
"""Relative step of the rate once nothing is proven any more."""


def sweep(problem: RoutingProblem, effort: int) -> tuple[Answer, ...]:
    """The front of latency and throughput, fastest token first; every answer has a chain.

    Args:
        problem: where to look.
        effort: work to spend, as for `FloorSolver`; past it answers are unproven and farther apart.
    """
    solver = FloorSolver(problem, effort)
    front: list[Answer] = []
    rate = _LEAST_RATE
    while True:
        answer = solver.solve(rate)
        if answer.chain is None:
            return tuple(front)
        # Throughput rises from answer to answer, so an earlier one that is no faster is dominated.
        while front and front[-1].latency_ms >= answer.latency_ms * (1 - TOLERANCE):
            front.pop()
        front.append(answer)
        step = _COARSE_STEP if solver.exhausted else TOLERANCE
        rate = answer.chain.throughput_tokens_per_s * (1 + step)
