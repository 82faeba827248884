"""Nodes on loopback that are closed when their test ends."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from planetserve.swarm.node import NodeConfig, SwarmNode

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)

StartNode = Callable[..., Awaitable[SwarmNode]]


@pytest.fixture
async def start_node() -> AsyncIterator[StartNode]:
    """`await start_node(join=other_node, ...)` starts a node on loopback."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(join: SwarmNode | None = None, **options: Any) -> SwarmNode:
            if not options.get("client_mode"):
                options.setdefault("host_maddrs", LOOPBACK)
            if join is not None:
                options.setdefault("initial_peers", join.addresses())
            node = await SwarmNode.start(NodeConfig(**options))
            return await stack.enter_async_context(node)

        yield start
