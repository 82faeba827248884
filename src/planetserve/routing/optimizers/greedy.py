"""The greedy baseline: always the server that is cheapest now.

From the current server, go to the one with the least time per block it would run, counting the link
to it, the visit and its blocks; run its span to the end; repeat. It does not look further ahead.
"""

from __future__ import annotations

import numpy as np

from planetserve.routing.greedy_walk import run_ends, walk
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import Chain


class Greedy:
    """Least time per block, one run at a time; ties go to the first server."""

    def plan(self, snapshot: SwarmSnapshot, request: ChainRequest) -> Chain:
        return greedy_chain(RoutingProblem.build(snapshot, request))


def greedy_chain(problem: RoutingProblem) -> Chain:
    """The chain of the greedy walk."""
    ends = run_ends(problem)

    def best_now(block: int, previous: int | None) -> int:
        here = np.flatnonzero(problem.legal[block])
        links = problem.client_half_ms if previous is None else problem.links.row(previous)
        ahead = ends[block, here] - block
        per_block = (links[here] + problem.hop_ms[here]) / ahead + problem.decode_ms[here]
        return int(here[per_block.argmin()])

    return walk(problem, best_now, lambda block, server: int(ends[block, server]))
