"""What a client would plan on if it joined the swarm now."""

from __future__ import annotations

import asyncio

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.planning.chain_planner import ModelFacts
from planetserve.config import ClientConfig
from planetserve.model.capabilities import check_servable
from planetserve.model.checkpoint import Checkpoint, parse_dtype
from planetserve.routing.snapshot import SwarmSnapshot


def open_model(
    model: str, *, torch_dtype: str, revision: str | None, token: str | None, cache_dir: str | None
) -> ModelFacts:
    """What a plan needs to know of a model; reads its configuration and no weights.

    Raises:
        ConfigError: the model cannot be found or served, or not in this data type.
    """
    checkpoint = Checkpoint.open(model, revision=revision, token=token, cache_dir=cache_dir)
    check_servable(checkpoint)
    return ModelFacts.of(checkpoint, parse_dtype(torch_dtype, checkpoint, "cpu"))


def live_snapshot(config: ClientConfig, facts: ModelFacts, tokens: int) -> SwarmSnapshot:
    """Join the swarm as a client of these settings, measure, and leave.

    Args:
        tokens: of the session to plan for, which decides with the dtype whom a client would use.

    Raises:
        ConfigError: a setting does not fit the model, or names a peer that cannot exist.
        PeerUnreachable: no initial peer answers.
        ModelMismatchError: the swarm serves something else.
        NoChainAvailable: servers lack free cache.
        SessionLengthError: none of them takes sequences this long.
        MissingBlocksError: blocks stay without a server for `wait_for_blocks_timeout` seconds.
    """
    return asyncio.run(_look(ChainManager(config, facts), max(1, tokens)))


async def _look(manager: ChainManager, tokens: int) -> SwarmSnapshot:
    await manager.start()
    try:
        # Waits for blocks that are missing, and says why if they stay so.
        await manager.plan(num_rows=1, lease_tokens=tokens)
        return manager.snapshot(lease_tokens=tokens)
    finally:
        await manager.close()
