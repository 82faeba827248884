"""Nodes on loopback that are closed when their test ends."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from swarm_helpers import LOOPBACK, StartNode

from planetserve.clock import Clock
from planetserve.swarm.libp2p import peer_routing
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode


@pytest.fixture(autouse=True)
def _daemons_are_hung_up_on_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of others' daemons count as incoming ones; some tests wait until there are none."""
    monkeypatch.setattr(peer_routing, "IDLE_TIMEOUT_S", 0.2)


@pytest.fixture
async def start_node() -> AsyncIterator[StartNode]:
    """Starts nodes: `await start_node(join=other_node, ...)`, options as of `NodeConfig`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            join: SwarmNode | None = None, clock: Clock | None = None, **options: Any
        ) -> SwarmNode:
            if not options.get("client_mode"):
                options.setdefault("host_maddrs", LOOPBACK)
            if join is not None:
                options.setdefault("initial_peers", join.addresses())
            node = await SwarmNode.start(NodeConfig(**options), clock)
            return await stack.enter_async_context(node)

        yield start
