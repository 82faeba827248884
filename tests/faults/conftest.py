"""One server of a tiny model, and nodes of strangers who try things on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from hostile import MeetServer, Stranger, Target, until

from planetserve.server.server import Server
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.testing.swarm import LocalSwarm


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-block random Llama, float32."""
    folder = tmp_path_factory.mktemp("llama")
    make_tiny_checkpoint(folder, "llama", seed=1, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def swarm(llama_folder: Path) -> Iterator[LocalSwarm]:
    """A bootstrap peer and one server of the whole model."""
    options = {"attn_cache_tokens": 512, "inference_max_length": 256}
    with LocalSwarm(str(llama_folder), ["0:2"], options) as running:
        yield running


@pytest.fixture
def server(swarm: LocalSwarm) -> Server:
    return swarm.servers[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def strangers(swarm: LocalSwarm) -> AsyncIterator[list[Stranger]]:
    """Nodes that the tests of a module share; `meet` adds to them."""
    nodes: list[Stranger] = []
    yield nodes
    for stranger in nodes:
        await stranger.node.close()


@pytest_asyncio.fixture(loop_scope="module")
async def meet(
    swarm: LocalSwarm, server: Server, strangers: list[Stranger]
) -> AsyncIterator[MeetServer]:
    """`await meet()`: a stranger with a peer id that the test has not met yet."""
    num_met = 0

    async def meet() -> Stranger:
        nonlocal num_met
        if num_met == len(strangers):
            strangers.append(await Stranger.join(swarm.initial_peers, Target.of_server(server)))
        num_met += 1
        return strangers[num_met - 1]

    yield meet
    for stranger in strangers:
        for stream in list(stranger.node.streams):
            stream.abort()
    await until(lambda: not server.handler.num_sessions)
