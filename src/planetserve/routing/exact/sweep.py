"""The epsilon-constraint sweep: the least latency at every throughput there is, slowest first.

The least latency of all, then the least latency at more than that chain's throughput, and so on
until no chain is faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planetserve.routing.exact.floor import TOLERANCE, Answer, FloorSolver
from planetserve.routing.problem import RoutingProblem

DEFAULT_EFFORT = 80_000
"""Proves the front of most swarms of 100 servers that hold up to a third of 80 blocks each, in
about a second."""
_LEAST_RATE = 1e-12
_COARSE_STEP = 0.05
"""Relative step of the rate once nothing is proven any more."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found."""

    answers: tuple[Answer, ...]
    """Fastest token first; every one has a chain."""
    complete: bool
    """Whether there is proven to be no point of the front besides these, apart from their gaps."""


def sweep(problem: RoutingProblem, effort: int) -> Swept:
    """The front of latency and throughput.

    Args:
        problem: where to look.
        effort: work to spend, as for `FloorSolver`; past it answers are unproven and farther apart.
    """
    solver = FloorSolver(problem, effort)
    front: list[Answer] = []
    rate, complete = _LEAST_RATE, True
    while True:
        answer = solver.solve(rate)
        if answer.chain is None:
            return Swept(tuple(front), complete and answer.lower_ms == math.inf)
        # Throughput rises from answer to answer, so an earlier one that is no faster is dominated.
        while front and front[-1].latency_ms >= answer.latency_ms * (1 - TOLERANCE):
            front.pop()
        front.append(answer)
        complete = complete and not solver.exhausted
        step = _COARSE_STEP if solver.exhausted else TOLERANCE
        rate = answer.chain.throughput_tokens_per_s * (1 + step)
