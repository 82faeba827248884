"""Gateways for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from planetserve.client.event_loop_thread import EventLoopThread
from planetserve.config import GatewayConfig
from planetserve.gateway.server import Address, running
from planetserve.testing.swarm import LocalSwarm


@contextlib.contextmanager
def gateway(swarm: LocalSwarm, **settings: Any) -> Iterator[Address]:
    """A gateway on a loop of its own."""
    config = GatewayConfig(
        model="demo", initial_peers=swarm.initial_peers, port=0, dtype="float32", **settings
    )
    loop_thread, stack = EventLoopThread("gateway"), contextlib.AsyncExitStack()
    try:
        yield loop_thread.call(stack.enter_async_context(running(config)))
    finally:
        loop_thread.call(stack.aclose())
        loop_thread.close()
