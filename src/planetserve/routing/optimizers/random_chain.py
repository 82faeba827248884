"""Any server that holds the next block: a swarm without overlay forwarding. A baseline."""

from __future__ import annotations

import numpy as np

from planetserve.routing.greedy_walk import run_ends, walk
from planetserve.routing.optimizers.base import checked_seed
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import Chain


class RandomChain:
    """A uniformly random holder of the next block runs its span to the end; repeat.

    Args:
        seed: of the choices; None draws a fresh one for every plan.
    """

    def __init__(self, seed: int | None = None):
        self._seed = checked_seed(seed)

    def plan(self, snapshot: SwarmSnapshot, request: ChainRequest) -> Chain:
        problem = RoutingProblem.build(snapshot, request)
        rng = np.random.default_rng(self._seed)
        ends = run_ends(problem)
        return walk(
            problem,
            lambda block, _previous: int(rng.choice(np.flatnonzero(problem.legal[block]))),
            lambda block, server: int(ends[block, server]),
        )
