"""Gateways for tests, and who asks them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai

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


@contextlib.contextmanager
def openai_client(address: Address, key: str = "any") -> Iterator[openai.OpenAI]:
    """The official client, which tries nothing again."""
    with openai.OpenAI(base_url=f"{address.url}/v1", api_key=key, max_retries=0) as made:
        yield made


@contextlib.contextmanager
def web_client(address: Address, key: str | None = None) -> Iterator[httpx2.Client]:
    """Plain HTTP."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with httpx2.Client(base_url=address.url, timeout=30, headers=headers) as made:
        yield made


def count(web: httpx2.Client, name: str) -> float:
    """The sum of the metrics whose lines begin so."""
    lines = web.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def pages_used(swarm: LocalSwarm) -> int:
    """Pages of keys and values that the servers hold."""
    return sum(server.engine.stats().pages_used for server in swarm.servers)


def wait_for_no_pages(swarm: LocalSwarm) -> None:
    """Return when all texts have ended on the servers."""
    deadline_s = time.monotonic() + 20
    while pages_used(swarm):
        assert time.monotonic() < deadline_s, "pages are still in use"
        time.sleep(0.02)
