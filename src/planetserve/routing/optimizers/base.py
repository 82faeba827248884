"""What a chain optimiser is: a pure function from a snapshot and a request to a chain.

Optimisers hold their settings and nothing else; one object may be used for any number of plans.
They are chosen by name from `OPTIMIZERS`, and third parties add theirs through the entry-point
group `planetserve.chain_optimizers`. Most start with `RoutingProblem.build`, which applies the
filters.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import Chain


class ChainOptimizer(Protocol):
    """Plans one chain."""

    def plan(self, snapshot: SwarmSnapshot, request: ChainRequest) -> Chain:
        """A chain for `request` on `snapshot`, with its predicted latency and throughput.

        Raises:
            MissingBlocksError: nobody the request may use holds some blocks; `missing` names them.
            NoChainAvailable: somebody holds every block, but not with enough free cache.
        """
        ...


@runtime_checkable
class FrontOptimizer(ChainOptimizer, Protocol):
    """Also knows the chains between which latency trades for throughput."""

    def front(self, snapshot: SwarmSnapshot, request: ChainRequest) -> tuple[Chain, ...]:
        """Chains none of which is worse than another in both respects, fastest token first.

        Raises:
            MissingBlocksError, NoChainAvailable: as `plan`.
        """
        ...
