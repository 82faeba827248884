"""What a session asks of every chain it runs on, and of the one that takes a part's place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planetserve.types import BlockSpan


@dataclass(frozen=True, slots=True)
class RingSpec:
    """What a session needs of its chain, and how long it waits for what."""

    num_rows: int
    max_length: int
    """Tokens per row to lease at every hop; a session may grow past it while pages are free."""
    hidden_size: int
    dtype: torch.dtype
    connect_timeout_s: float
    step_timeout_s: float
    stall_timeout_s: float
    """Time without progress after which the edge that stands still is given up."""
    probe_after_s: float
    """Silence after which the hops are asked how they are: a dead one costs seconds, not the
    step timeout."""
    ping_timeout_s: float


@dataclass(frozen=True, slots=True)
class Gap:
    """Blocks of a chain that need other hops, and the peers on both sides ("client" at an end)."""

    span: BlockSpan
    before: str
    after: str
