"""One plan: the chains that an optimiser finds, which of them it takes, and how long that took."""

from __future__ import annotations

import time
from dataclasses import dataclass

from planetserve.routing.front import pick_chain
from planetserve.routing.optimizers import ChainOptimizer, FrontOptimizer
from planetserve.routing.optimizers.base import ProvenFront, ProvingOptimizer
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import Chain


@dataclass(frozen=True, slots=True)
class Plan:
    """What came out, and of what."""

    snapshot: SwarmSnapshot
    optimizer: str
    request: ChainRequest
    chains: tuple[Chain, ...]
    """The whole front if the optimiser knows one; least latency first."""
    picked: int
    """Which of them the request would run on."""
    solve_ms: float
    """Wall time of the optimiser, from the snapshot as read from its file."""
    proven: ProvenFront | None = None
    """What is proven of the chains, by optimisers that prove something."""

    @property
    def chain(self) -> Chain:
        """The chain that the request would run on."""
        return self.chains[self.picked]


def solve(
    snapshot: SwarmSnapshot, optimizer: ChainOptimizer, name: str, request: ChainRequest
) -> Plan:
    """Run the optimiser once.

    Raises:
        MissingBlocksError, NoChainAvailable: no chain satisfies the request.
    """
    proven = None
    started = time.perf_counter()
    if isinstance(optimizer, ProvingOptimizer):
        proven = optimizer.solve(snapshot, request)
        chains = proven.chains
    elif isinstance(optimizer, FrontOptimizer):
        chains = optimizer.front(snapshot, request)
    else:
        chains = (optimizer.plan(snapshot, request),)
    picked = chains.index(pick_chain(chains, request)) if len(chains) > 1 else 0
    solve_ms = 1000 * (time.perf_counter() - started)
    return Plan(snapshot, name, request, chains, picked, solve_ms, proven)
