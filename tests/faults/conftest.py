"""One server of a tiny model, and nodes of strangers who try things on it.

For faults in the middle of a text: a larger model, and the table of what the faults did.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from fault_swarm import FaultSwarm
from fault_table import FaultTable
from faulted_texts import Material
from hostile import MeetServer, Stranger, Target, until
from rich.console import Console
from transformers import AutoModelForCausalLM

from planetserve.server.server import Server
from planetserve.testing.checkpoints import make_tiny_checkpoint
from planetserve.testing.swarm import LocalSwarm

FAULT_TABLE = pytest.StashKey[FaultTable]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAULT_TABLE] = FaultTable()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(config: pytest.Config) -> None:
    table = config.stash[FAULT_TABLE]
    if table.rows:
        table.show(Console(width=120))
        table.write()


@pytest.fixture(scope="session")
def fault_table(pytestconfig: pytest.Config) -> FaultTable:
    """Where a test puts what its fault did; printed after the run."""
    return pytestconfig.stash[FAULT_TABLE]


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-block random Llama, float32."""
    folder = tmp_path_factory.mktemp("llama")
    make_tiny_checkpoint(folder, "llama", seed=1, num_hidden_layers=2)
    return folder


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 6-block random Llama, float32."""
    folder = tmp_path_factory.mktemp("deep")
    make_tiny_checkpoint(folder, "llama", seed=1, num_hidden_layers=6, max_position_embeddings=256)
    return folder


@pytest.fixture(scope="session")
def material(deep_folder: Path) -> Material:
    """The same model in one piece, an assistant, and prompts."""
    return Material.of(
        AutoModelForCausalLM.from_pretrained(deep_folder, dtype=torch.float32).eval()
    )


@pytest.fixture(scope="module")
def fault_swarm(
    request: pytest.FixtureRequest, deep_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FaultSwarm]:
    """A server for each of the module's `SPANS`, every one behind a link."""
    folder = tmp_path_factory.mktemp("keys")
    with FaultSwarm(str(deep_folder), request.module.SPANS, folder, links=True) as running:
        yield running


@pytest.fixture
def repaired_swarm(fault_swarm: FaultSwarm) -> Iterator[FaultSwarm]:
    """`fault_swarm` with everybody running and in fair weather, before the test and after it."""
    fault_swarm.repair()
    yield fault_swarm
    fault_swarm.restore()


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
