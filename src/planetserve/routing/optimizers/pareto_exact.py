"""The exact front of latency against throughput, by the sweep in `planetserve.routing.exact`.

The load of a server is counted over the whole chain, all visits together, and a server may be
visited any number of times. The problem is NP-hard at the fast end, where a chain has a server per
block or two. So the work is bounded: past `effort`, points are the best found, in wider steps, and
`solve` says by how much each might be beaten. `front` and `plan` use them without that.
"""

from __future__ import annotations

from planetserve.errors import ConfigError
from planetserve.routing.exact import DEFAULT_EFFORT, sweep
from planetserve.routing.front import pick_chain
from planetserve.routing.optimizers.base import ProvenFront
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import Chain


class ParetoExact:
    """Front of latency and throughput.

    Args:
        effort: work to spend on one front, in partial chains looked at, some 3 us each. More proves
            more; `solve` says what is proven.
    """

    def __init__(self, effort: int = DEFAULT_EFFORT):
        if effort < 0:
            raise ConfigError(f"effort must not be negative, got {effort}")
        self._effort = effort

    def plan(self, snapshot: SwarmSnapshot, request: ChainRequest) -> Chain:
        return pick_chain(self.front(snapshot, request), request)

    def front(self, snapshot: SwarmSnapshot, request: ChainRequest) -> tuple[Chain, ...]:
        return self.solve(snapshot, request).chains

    def solve(self, snapshot: SwarmSnapshot, request: ChainRequest) -> ProvenFront:
        swept = sweep(RoutingProblem.build(snapshot, request), self._effort)
        return ProvenFront(swept.chains, swept.gaps, swept.complete)
