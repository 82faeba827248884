"""What a session asks of every chain it runs on, and of the one that takes a part's place."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch

from planetserve.types import BlockSpan
from planetserve.wire.frame import SESSION_BYTES


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
    receipts: bool = False
    """Whether hops that can are asked to sign for what they do."""
    session_id: bytes = field(default_factory=lambda: os.urandom(SESSION_BYTES))
    """Names the session; hard to guess."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Blocks of a chain that need other hops, and the peers on both sides ("client" at an end)."""

    span: BlockSpan
    before: str
    after: str
