"""A swarm for clients without a network: its directory holds what the test writes there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import torch

from planetserve.client.planning.chain_planner import ModelFacts
from planetserve.client.planning.peer_book import PlanInputs
from planetserve.errors import PeerUnreachable
from planetserve.types import BlockSpan, ServerInfo, ServerState

FACTS = ModelFacts("tiny", "tiny-prefix", "f" * 64, 8, 16, torch.float32)


def server(name: str, start: int = 0, end: int = 8, **fields: Any) -> ServerInfo:
    known: dict[str, Any] = {
        "peer_id": name,
        "model": FACTS.prefix,
        "fingerprint": FACTS.fingerprint,
        "span": BlockSpan(start, end),
        "num_blocks": 8,
        "state": ServerState.ONLINE,
        "dtype": "float32",
        "addresses": (),
        "decode_ms_per_block": 1.0,
        "tokens_per_s_per_block": 1000.0,
        "network_bytes_per_s": 1e8,
        "free_cache_tokens": 4096,
        "max_session_tokens": 2048,
    }
    return ServerInfo(**known | fields)


def inputs(servers: Iterable[ServerInfo], **rtt_ms: float) -> PlanInputs:
    """A plan's inputs where the client has only measured these round-trip times."""
    return PlanInputs(tuple(servers), rtt_ms, {})


class Board:
    """A directory whose answers the test writes."""

    def __init__(self, *servers: ServerInfo):
        self.servers = list(servers)
        self.listed = [FACTS.prefix]
        self.num_lookups = 0
        self.is_silent = False
        self.is_broken = False

    async def lookup(self, _prefix: str) -> list[ServerInfo]:
        self.num_lookups += 1
        if self.is_broken:
            raise PeerUnreachable("nobody answers")
        if self.is_silent:
            await asyncio.Event().wait()
        return self.servers

    async def models(self) -> dict[str, None]:
        return dict.fromkeys(self.listed)
