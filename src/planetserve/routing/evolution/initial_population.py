"""The first population: chains that are good in some direction, and random ones.

The good ones are those of the bounded sweep for the front of latency and throughput, and the greedy
chain. With more objectives there are also the undominated chains that leave servers only at the end
of their spans, and chains with the least weighted sum of latency, mistrust and price. So evolution
begins with the results of the exact methods; a cold start has random chains only.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planetserve.routing.arrays import IntArray
from planetserve.routing.evolution.label_front import walk_front
from planetserve.routing.evolution.objectives import log_mistrust, prices
from planetserve.routing.exact import DEFAULT_EFFORT, sweep
from planetserve.routing.optimizers.greedy import greedy_chain
from planetserve.routing.optimizers.shortest_path import least_latency_hosts
from planetserve.routing.problem import RoutingProblem

_WEIGHTS = 16
_EFFORT = 320_000
"""Effort of the sweep with two objectives: 1 s at most."""


def good_chains(
    problem: RoutingProblem, num_objectives: int, rng: np.random.Generator, time_limit_s: float
) -> IntArray:
    """`[chains, num_blocks]` distinct good starts; the sweep for some ends at the time limit."""
    found = [greedy_chain(problem)]
    effort = _EFFORT if num_objectives == 2 else DEFAULT_EFFORT
    found += sweep(problem, effort, time_limit_s).chains
    hosts = [problem.hosts(chain) for chain in found]
    if num_objectives > 2:
        hosts += walk_front(problem, num_objectives)
        hosts += _weighted(problem, num_objectives, rng)
    return np.array(list(dict.fromkeys(hosts)), dtype=np.intp)


def _weighted(
    problem: RoutingProblem, num_objectives: int, rng: np.random.Generator
) -> list[tuple[int, ...]]:
    """Shortest paths where mistrust and price count as milliseconds at random rates of exchange."""
    mistrust = log_mistrust(problem)
    price = prices(problem) if num_objectives > 3 else np.zeros(problem.num_servers)
    found = []
    for exponent in rng.uniform(-2, 3, size=(_WEIGHTS, 2)):
        per_mistrust, per_price = 10**exponent
        changed = replace(
            problem,
            hop_ms=problem.hop_ms + per_mistrust * mistrust,
            decode_ms=problem.decode_ms + per_price * price,
        )
        found.append(tuple(least_latency_hosts(changed)))
    return found
