"""What a placement strategy is: which span of blocks a joining server should hold.

A pure function of what the other servers announce. Strategies are chosen by name from `PLACEMENTS`,
and third parties add theirs through the entry-point group `planetserve.placements`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from planetserve.errors import ConfigError
from planetserve.routing.snapshot import ServerPoint
from planetserve.types import BlockSpan


class Placement(Protocol):
    """Chooses a span."""

    def choose_span(
        self,
        servers: Sequence[ServerPoint],
        num_blocks_model: int,
        num_blocks: int,
        own_tokens_per_s_per_block: float,
    ) -> BlockSpan:
        """The span of `num_blocks` blocks that the joining server should hold.

        Args:
            servers: the others; without the joining server itself when it is moving.
            num_blocks_model: blocks of the whole model.
            num_blocks: how many the joining server has room for.
            own_tokens_per_s_per_block: its speed when batched.

        Raises:
            ConfigError: the model does not have that many blocks.
        """
        ...


def check_sizes(num_blocks_model: int, num_blocks: int) -> None:
    """Raise ConfigError unless `num_blocks` consecutive blocks fit the model."""
    if not 1 <= num_blocks <= num_blocks_model:
        raise ConfigError(
            f"cannot hold {num_blocks} blocks of a model that has {num_blocks_model}; "
            f"give a number from 1 to {num_blocks_model}"
        )
