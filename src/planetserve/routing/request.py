"""The requirements of one request on a chain: room for its tokens, trusted servers, and the
objective.

The filters are hard: no optimiser ever returns a hop that breaks one. `pick` says which chain of a
latency/throughput front to take (see `planetserve.routing.front`); optimisers that know one chain
ignore it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planetserve.errors import ConfigError
from planetserve.types import BlockSpan

PICKS = ("knee", "latency", "throughput", "request")


@dataclass(frozen=True, slots=True)
class ChainRequest:
    """A request as the planner sees it.

    Raises:
        ConfigError: a count is negative or `pick` is none of `PICKS`.
    """

    tokens: int = 0
    """Tokens the session may hold; every server of the chain needs that much free cache."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    """Expected lengths; read by the pick `request`."""
    min_reputation: float = 0.0
    allowed: frozenset[str] | None = None
    """Only these servers; None allows all."""
    blocked: frozenset[str] = frozenset()
    trusted: Mapping[BlockSpan, frozenset[str]] | None = None
    """Blocks of each span may be run only by the servers named for it."""
    pick: str | None = None
    """One of `PICKS`; None leaves the choice to the optimiser."""

    def __post_init__(self) -> None:
        if min(self.tokens, self.prompt_tokens, self.output_tokens) < 0:
            raise ConfigError("tokens, prompt_tokens and output_tokens must not be negative")
        if self.pick is not None and self.pick not in PICKS:
            raise ConfigError(f"unknown pick {self.pick!r}; choose one of: {', '.join(PICKS)}")
        if self.pick == "request" and self.prompt_tokens + self.output_tokens == 0:
            raise ConfigError("pick 'request' needs prompt_tokens or output_tokens")
