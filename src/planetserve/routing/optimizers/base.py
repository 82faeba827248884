"""The interface of chain optimisers: pure functions from a snapshot and a request to a chain.

Optimisers hold their settings and nothing else; one object may be used for any number of plans.
They are chosen by name from `OPTIMIZERS`, and third parties add theirs through the entry-point
group `planetserve.chain_optimizers`. Most start with `RoutingProblem.build`, which applies the
filters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from planetserve.errors import ConfigError
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import Chain


class ChainOptimizer(Protocol):
    """Plans one chain."""

    def plan(self, snapshot: SwarmSnapshot, request: ChainRequest) -> Chain:
        """A chain for `request` on `snapshot`, with its predicted latency and throughput.

        Raises:
            MissingBlocksError: some blocks are held by no server that the request may use;
                `missing` names them.
            NoChainAvailable: every block has a server, but some have none with enough free cache.
        """
        ...


@runtime_checkable
class FrontOptimizer(ChainOptimizer, Protocol):
    """Also knows the chains between which latency trades for throughput."""

    def front(self, snapshot: SwarmSnapshot, request: ChainRequest) -> tuple[Chain, ...]:
        """Undominated chains, least latency first.

        Raises:
            MissingBlocksError, NoChainAvailable: as `plan`.
        """
        ...


@dataclass(frozen=True, slots=True)
class ProvenFront:
    """A front and what is proven of it."""

    chains: tuple[Chain, ...]
    gaps: tuple[float, ...]
    """Per chain, the fraction of its latency by which a chain of at least its throughput might be
    faster; 0 when that is excluded."""
    complete: bool
    """Whether no other chain belongs on the front, as far as the gaps are 0."""

    @property
    def exact(self) -> bool:
        """Whether this is proven to be the front."""
        return self.complete and not any(self.gaps)


@runtime_checkable
class ProvingOptimizer(FrontOptimizer, Protocol):
    """Also proves how good its front is."""

    def solve(self, snapshot: SwarmSnapshot, request: ChainRequest) -> ProvenFront:
        """The chains of `front` with what is proven of them.

        Raises:
            MissingBlocksError, NoChainAvailable: as `plan`.
        """
        ...


def checked_seed(seed: int | None) -> int | None:
    """`seed`, if numpy and pymoo take it.

    Raises:
        ConfigError: it is not in `[0, 2**32)`.
    """
    if seed is not None and not 0 <= seed < 2**32:
        raise ConfigError(f"seed must be from 0 to {2**32 - 1}, not {seed!r}")
    return seed
