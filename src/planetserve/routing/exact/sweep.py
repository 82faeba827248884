"""The epsilon-constraint sweep: the least latency at every throughput there is, slowest first.

The least latency of all, then the least latency at more than that chain's throughput, and so on
until no chain is faster. When the effort for proofs is used up, floors are set farther apart, and
what is found is improved once more from the fastest chain back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planetserve.routing.exact.bounds import Limits
from planetserve.routing.exact.floor import FloorSolver
from planetserve.routing.exact.matching import deal_out
from planetserve.routing.exact.neighbourhood import Neighbourhood
from planetserve.routing.exact.work import TOLERANCE, Work
from planetserve.routing.problem import RoutingProblem
from planetserve.types import Chain

DEFAULT_EFFORT = 280_000
"""Some 0.6 to 0.9 s at most. Proves the whole front of small swarms, and of larger ones whose
servers hold a small part of the model."""
_PROVING_SHARE = 0.3
"""Part of the effort for proofs; the rest is for good chains where proofs are out of reach."""
_SEARCH_SHARE = 0.05
"""Part of the effort that one search may take, so that a hard floor leaves some for the rest."""
_LEAST_RATE = 1e-12
_LEAST_STEP = 1.015
"""Least ratio of two rates once nothing is proven any more."""
_TAIL_DUAL_STEPS = 5
_WAY_BACK = 0.15
"""Part of the effort without proofs that is for the way back."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found, fastest token first."""

    chains: tuple[Chain, ...]
    gaps: tuple[float, ...]
    """By what part of its latency each chain might be beaten by one of no less throughput."""
    complete: bool
    """Whether there is proven to be no point of the front besides these, apart from their gaps."""


def sweep(problem: RoutingProblem, effort: int) -> Swept:
    """The front of latency and throughput.

    Args:
        problem: where to look.
        effort: work to spend, as for `Work`.
    """
    work = Work(problem, effort)
    solver = FloorSolver(work, effort - int(_PROVING_SHARE * effort), int(_SEARCH_SHARE * effort))
    floors: list[tuple[float, float]] = []
    rate, reached, complete = _LEAST_RATE, 0.0, True
    while solver.proving or not floors:
        answer = solver.solve(rate)
        floors.append((rate, answer.lower_ms))
        if answer.chain is None:
            complete = answer.lower_ms == math.inf
            break
        reached = answer.chain.throughput_tokens_per_s
        rate = reached * (1 + TOLERANCE)
    else:
        complete = False
    if not complete:
        floors += _climb(work, solver, reached)
    chains = work.front()
    return Swept(tuple(chains), tuple(gap_of(chain, floors) for chain in chains), complete)


def _climb(work: Work, solver: FloorSolver, start: float) -> list[tuple[float, float]]:
    """Look for chains faster than `start`; the floors that were looked at, and their bounds."""
    neighbourhood = Neighbourhood(work)
    top, budget = _top_rate(work, start), work.left
    floors: list[tuple[float, float]] = []
    reached, rate = start, start * _LEAST_STEP
    while top > reached * _LEAST_STEP and work.left > _WAY_BACK * budget:
        answer = solver.solve(rate, _TAIL_DUAL_STEPS)
        floors.append((rate, answer.lower_ms))
        slower = work.best(reached)
        if slower is not None and answer.lower_ms < math.inf:
            neighbourhood.improve(slower[1], Limits.at_rate(work.problem, rate))
        best = work.best(rate)
        if best is None:
            top = rate
            rate = math.sqrt(reached * top)
            continue
        reached = best[0].throughput_tokens_per_s
        # Steps such that the effort lasts to the top.
        left = (work.left / budget - _WAY_BACK) / max(1 - work.left / budget, 0.01) * len(floors)
        rate = reached * max(_LEAST_STEP, (top / reached) ** (1 / max(1.0, left)))
    _descend(work, neighbourhood, start)
    return floors


def _descend(work: Work, neighbourhood: Neighbourhood, start: float) -> None:
    """Make slower chains out of faster ones, where that gives better ones."""
    rates = [chain.throughput_tokens_per_s for chain in work.front()]
    for rate, faster in zip(rates[-2::-1], rates[:0:-1], strict=True):
        best = work.best(faster)
        if rate <= start or work.left <= 0 or best is None:
            return
        neighbourhood.polish(best[1], Limits.at_rate(work.problem, rate))


def _top_rate(work: Work, reached: float) -> float:
    """A rate that no chain passes, by at most 1 %: blocks cannot be dealt out any faster."""
    problem = work.problem
    low, high = reached, float(np.minimum(problem.block_rate, problem.hop_rate).max())
    while low < 0.99 * high:
        middle = math.sqrt(low * high)
        work.spend_passes(1)
        if deal_out(work.graph, Limits.at_rate(problem, middle)) is None:
            high = middle
        else:
            low = middle
    return high


def gap_of(chain: Chain, floors: list[tuple[float, float]]) -> float:
    """By what part of its latency a chain might be beaten by one of no less throughput.

    Args:
        floors: pairs of a throughput and a lower bound on the latency of chains that reach it.
    """
    rate = chain.throughput_tokens_per_s
    lower_ms = max((lower for floor, lower in floors if floor <= rate), default=0.0)
    return (
        0.0 if chain.latency_ms <= lower_ms * (1 + TOLERANCE) else 1 - lower_ms / chain.latency_ms
    )
