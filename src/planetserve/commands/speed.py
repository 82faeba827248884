"""How fast a model would be here: blocks of it, with made-up weights, timed as a server times them.

What a swarm of such machines would reach follows by the planner's own formula
(`routing/cost.py`); what a real one reaches is planned on its records.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import psutil
import torch
from torch.nn import functional

from planetserve.client.planning.chain_planner import ModelFacts
from planetserve.commands.memory import BlockMemory
from planetserve.config import ClientConfig, ServerConfig
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.span_blocks import SpanBlocks
from planetserve.model.text_config import text_config
from planetserve.plan.live import live_snapshot
from planetserve.plan.solving import solve
from planetserve.routing.optimizers import OPTIMIZERS
from planetserve.routing.request import ChainRequest
from planetserve.server.factory import build_engine, engine_config_of
from planetserve.server.server import DEFAULT_NETWORK_BYTES_PER_S
from planetserve.tensors import dtype_name
from planetserve.types import BlockSpan, Chain

_NUM_TIMED_BLOCKS = 2
"""Two show what a step costs besides its blocks; one does not."""
_NUM_HEAD_RUNS = 5


@dataclass(frozen=True, slots=True)
class LocalSpeed:
    """What was timed here.

    Attributes:
        span: the blocks that ran.
        ms_per_block: one block's share of a token of one user.
        overhead_ms: what a token costs a server besides.
        tokens_per_s_per_block: tokens per second through one block in a large batch.
        head_ms: choosing a token, on the client: the product with the vocabulary.
        base_bytes: memory of the process without weights and KV cache.
    """

    span: BlockSpan
    ms_per_block: float
    overhead_ms: float
    tokens_per_s_per_block: float
    head_ms: float
    base_bytes: int

    def alone_tokens_per_s(self, num_blocks: int) -> float:
        """Of one user, with all blocks on this machine."""
        return 1000 / (num_blocks * self.ms_per_block + self.overhead_ms + self.head_ms)

    def swarm_tokens_per_s(
        self, num_blocks: int, num_servers: int, rtt_ms: float, activation_bytes: int
    ) -> float:
        """Of one user, over servers like this machine that are all `rtt_ms` apart."""
        sending_ms = 1000 * activation_bytes / DEFAULT_NETWORK_BYTES_PER_S
        links_ms = (num_servers + 1) * rtt_ms / 2 + num_servers * sending_ms
        blocks_ms = num_blocks * self.ms_per_block + num_servers * self.overhead_ms
        return 1000 / (blocks_ms + links_ms + self.head_ms)


def measure(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, memory: BlockMemory
) -> LocalSpeed:
    """Time the model's last blocks as a server of them would, without reading their weights.

    Raises:
        ConfigError: they do not fit into memory.
        PlanetServeError: they do not run.
    """
    end = checkpoint.num_blocks
    span = BlockSpan(max(0, end - _NUM_TIMED_BLOCKS), end)
    config = ServerConfig(model=checkpoint.name, block_indices=span, new_swarm=True)
    head_ms = _head_ms(checkpoint, dtype)

    def load() -> SpanBlocks:
        return SpanBlocks.load(checkpoint, span, dtype, device, at_random=True)

    engine = build_engine(load, config.linear_backend, engine_config_of(config, checkpoint))
    try:
        stats = engine.stats()
        base_bytes = 0  # of a GPU's memory, what the process takes is not free already
        if device.type == "cpu":
            held = sum(memory.per_block[span.start : span.end])
            base_bytes = max(0, psutil.Process().memory_info().rss - held)
    finally:
        engine.close()
    return LocalSpeed(
        span,
        stats.decode_ms_per_block,
        stats.overhead_ms,
        stats.tokens_per_s_per_block or 1000 / stats.decode_ms_per_block,
        head_ms,
        base_bytes,
    )


def live_chain(config: ClientConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> Chain:
    """The chain that a user would get in a swarm now; waits for nothing that is missing.

    Raises:
        PlanetServeError: the swarm cannot be joined, or has no chain.
    """
    facts = ModelFacts.of(checkpoint, dtype)
    snapshot = live_snapshot(config, facts, tokens=1)
    optimizer = OPTIMIZERS.create_from(config.chain_optimizer)
    return solve(snapshot, optimizer, config.chain_optimizer, ChainRequest(tokens=1)).chain


def activation_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """What one token sends from server to server."""
    return checkpoint.hidden_size * int(dtype.itemsize)


def _head_ms(checkpoint: Checkpoint, dtype: torch.dtype) -> float:
    """Typical time of a token's product with the vocabulary on this CPU, where clients have it."""
    size = int(text_config(checkpoint.config).vocab_size)
    # Not zeros: the system would map them all to one page, which reads faster than memory.
    weight_VD = torch.full((size, checkpoint.hidden_size), 0.01, dtype=dtype)
    row_1D = torch.ones(1, checkpoint.hidden_size, dtype=dtype)
    took_ms = []
    for _ in range(_NUM_HEAD_RUNS):
        started_s = time.perf_counter()
        functional.linear(row_1D, weight_VD)
        took_ms.append(1000 * (time.perf_counter() - started_s))
    return statistics.median(took_ms)


def named(dtype: torch.dtype) -> str:
    """The dtype as settings name it."""
    return dtype_name(dtype)
