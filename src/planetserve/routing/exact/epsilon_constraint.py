"""The epsilon-constraint sweep: the least latency at every possible throughput, lowest first.

First the chain of least latency, then the one of least latency with more throughput than that
chain, and so on until no chain is faster or the effort for this is used up. After that, floors are
searched in the order of what they may add to the front's area, so that little effort gives a rough
front and more effort a fine one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from planetserve.routing.exact.label_setting import beam_effort
from planetserve.routing.exact.large_neighbourhood_search import LargeNeighbourhoodSearch
from planetserve.routing.exact.matching import assign_blocks
from planetserve.routing.exact.search_budget import TOLERANCE, SearchBudget
from planetserve.routing.exact.throughput_constraint import ThroughputConstraint
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.run_graph import Limits
from planetserve.types import Chain

DEFAULT_EFFORT = 200_000
"""Effort of a sweep: 0.7 s at most. It proves the whole front of small swarms, and of larger ones
whose servers hold a small part of the model."""
_PROVING_SHARE = 0.3
"""Fraction of the effort for floor after floor; the rest goes to the floors that may gain most."""
_PROVING_TIME = 0.5
"""The same fraction of the time, so that a slow machine also gets a rough front of all
throughputs."""
_SEARCH_SHARE = 0.1
"""Fraction of the effort that one search for a proof may take, so that a hard floor leaves some."""
_LEAST_RATE = 1e-12
_BEAM = 100
_WIDER = 4
"""Factor on the beam width and on the required gain each time that a floor is searched again."""
_LOOK_SHARE = 0.15
"""Fraction of the effort that one beam search may take."""
_WORST = 1.1
"""Latency that stands for no chain, as a multiple of the greatest of a chain."""
_FAR = 1.1
"""Ratio of neighbouring throughputs above which the first beam search is between them."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep found, fastest token first."""

    chains: tuple[Chain, ...]
    gaps: tuple[float, ...]
    """Per chain, the fraction of its latency by which a chain of no less throughput might be
    faster."""
    complete: bool
    """Whether it is proven that the front has no other points, apart from the gaps."""


def sweep(problem: RoutingProblem, effort: int, time_limit_s: float = math.inf) -> Swept:
    """The front of latency and throughput.

    Args:
        problem: where to look.
        effort, time_limit_s: work to spend, as for `SearchBudget`.
    """
    work = SearchBudget(problem, effort, time_limit_s)
    solver = ThroughputConstraint(work, int(_SEARCH_SHARE * effort))
    _prove_upwards(work, solver, effort - int(_PROVING_SHARE * effort))
    if not _complete(work.front(), solver):
        _refine(work, solver)
    chains = work.front()
    gaps = tuple(gap_of(chain, solver.floors) for chain in chains)
    return Swept(tuple(chains), gaps, _complete(chains, solver))


def _prove_upwards(work: SearchBudget, solver: ThroughputConstraint, stop_at: int) -> None:
    """Floor after floor, until there is none or no more than `stop_at` of the effort is left."""
    best = solver.prove(_LEAST_RATE, work.left - stop_at)
    while best is not None and work.left > stop_at and not work.is_over(_PROVING_TIME):
        rate = best.throughput_tokens_per_s * (1 + TOLERANCE)
        best = solver.prove(rate, work.left - stop_at)


def _refine(work: SearchBudget, solver: ThroughputConstraint) -> None:
    """Search the floors that may gain most; each failure makes the next search of a floor wider."""
    neighbourhood = LargeNeighbourhoodSearch(work)
    top = _top_rate(work)
    widest = max(1, int(_LOOK_SHARE * work.left / beam_effort(work.graph)))
    looks: dict[float, int] = {}
    while not work.is_over():
        gain, rate = max(_open_places(work, solver, top, looks))
        if gain <= 0:
            return
        again = looks.get(rate, 0)
        looks[rate] = again + 1
        slower = work.below(rate)
        solver.look(rate, min(_BEAM * _WIDER**again, widest), prove=again > 0)
        limits = Limits.at_rate(work.problem, rate)
        if slower is not None:
            neighbourhood.improve(slower, limits)
        best = work.best(rate)
        if best is not None:
            neighbourhood.polish(best[1], limits)


def _open_places(
    work: SearchBudget, solver: ThroughputConstraint, top: float, looks: dict[float, int]
) -> Iterator[tuple[float, float]]:
    """Floors to search, by the area between front and bounds that one search may settle."""
    chains = work.front()
    points = [(chain.throughput_tokens_per_s, chain.latency_ms) for chain in chains]
    last_ms = max(points[-1][1], solver.lower_ms(points[-1][0] * (1 + TOLERANCE)))
    none = max(top, points[-1][0]), _WORST * (last_ms if last_ms < math.inf else points[-1][1])
    for (slower, _), (rate, latency_ms) in pairwise([*points, none]):
        low, high = slower * (1 + TOLERANCE), rate
        open_ms = latency_ms * (1 - TOLERANCE) - solver.lower_ms(low)
        again = looks.get(low, 0)
        if not again:
            # What was found for a floor below `rate` is no slower than `rate` itself.
            high = min((floor for floor in looks if low < floor < high), default=high)
        area = (high - low) * open_ms / _WIDER**again
        yield area, math.sqrt(low * high) if not again and high > low * _FAR else low


def _complete(chains: Sequence[Chain], solver: ThroughputConstraint) -> bool:
    """Whether bounds leave no room between neighbouring chains, and none above the last."""
    above = [solver.lower_ms(c.throughput_tokens_per_s * (1 + TOLERANCE)) for c in chains]
    least = [chain.latency_ms * (1 - TOLERANCE) for chain in chains[1:]]
    return all(bound >= ms for bound, ms in zip(above, [*least, math.inf], strict=True))


def _top_rate(work: SearchBudget) -> float:
    """An upper bound on the throughput of all chains, within 1 %: no assignment of blocks is
    faster."""
    problem = work.problem
    low = work.front()[-1].throughput_tokens_per_s
    high = float(np.minimum(problem.block_rate, problem.hop_rate).max())
    while low < 0.99 * high:
        middle = math.sqrt(low * high)
        work.spend_passes(1)
        if assign_blocks(work.graph, Limits.at_rate(problem, middle)) is None:
            high = middle
        else:
            low = middle
    return high


def gap_of(chain: Chain, floors: list[tuple[float, float]]) -> float:
    """Fraction of its latency by which a chain of no less throughput might be faster.

    Args:
        floors: pairs of a throughput and a lower bound on the latency of chains that reach it.
    """
    rate = chain.throughput_tokens_per_s
    lower_ms = max((lower for floor, lower in floors if floor <= rate), default=0.0)
    return (
        0.0 if chain.latency_ms <= lower_ms * (1 + TOLERANCE) else 1 - lower_ms / chain.latency_ms
    )
