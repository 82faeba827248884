"""What a chain optimiser is: a pure function from a snapshot and a request to a chain.

Optimisers hold their settings and nothing else; one object may be used for any number of plans.
They are chosen by name from `OPTIMIZERS`, and third parties add theirs through the entry-point
group `planetserve.chain_optimizers`. Most start with `RoutingProblem.build`, which applies the
filters.
"""

from __future__ import annotations

from dataclasses import dataclass
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
        """Chains none of which another one beats in every objective, fastest token first.

        Raises:
            MissingBlocksError, NoChainAvailable: as `plan`.
        """
        ...


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """A chain of a front, and by what part of its latency another one might still beat it."""

    chain: Chain
    gap: float
    """0 when it is proven that no chain of at least this throughput is faster."""


@runtime_checkable
class ProvingOptimizer(FrontOptimizer, Protocol):
    """Also proves how good its front is."""

    def solve(self, snapshot: SwarmSnapshot, request: ChainRequest) -> tuple[FrontPoint, ...]:
        """The chains of `front` with what is proven of each.

        Raises:
            MissingBlocksError, NoChainAvailable: as `plan`.
        """
        ...
