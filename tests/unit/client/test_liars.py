"""Some servers lie whenever they can. Others that are honest and fewer still get the text done.

Each attempt plans a chain; one of its liars, if it has any, does what it likes best: refuses,
speaks badly of a neighbour, sends it rubbish or passes on what nobody asked for. What the client
concludes from it decides on the next chain.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from written_swarm import FACTS, Board, server

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.config import ClientConfig
from planetserve.errors import (
    EdgeStalled,
    HopTimeout,
    PeerReportedError,
    PlanetServeError,
    RemoteProtocolError,
)
from planetserve.testing.clock import ManualClock
from planetserve.types import CLIENT, Chain, ServerInfo

NUM_SPANS = 4
BLOCKS = 2
"""Of each span."""


def refuses(_rng: random.Random, _chain: Chain, liar: str) -> PlanetServeError:
    error = PeerReportedError.of(liar, "session_closed", "your fault", 3600.0)
    error.peer_id = liar
    return error


def edge_suspicions(rng: random.Random, chain: Chain, liar: str) -> PlanetServeError:
    """It accuses a neighbour, or the neighbour does: to the client both look alike."""
    ring = [CLIENT, *(hop.peer_id for hop in chain), CLIENT]
    at = ring.index(liar)
    edges = [edge for edge in ((ring[at - 1], liar), (liar, ring[at + 1])) if CLIENT not in edge]
    error = rng.choice([PeerReportedError, EdgeStalled])("it was the other one")
    if edges:
        error.edge = rng.choice(edges)
    else:
        error.peer_id = liar
    return error


def passes_on(rng: random.Random, _chain: Chain, _liar: str) -> PlanetServeError:
    return rng.choice([RemoteProtocolError, HopTimeout])("any hop may have caused this")


LIES: dict[str, tuple[Callable[[random.Random, Chain, str], PlanetServeError], ...]] = {
    "refusing": (refuses,),
    "quarrelling": (edge_suspicions,),
    "passing on": (passes_on,),
    "everything": (refuses, edge_suspicions, passes_on),
}


def swarm(rng: random.Random, num_liars: int) -> tuple[list[ServerInfo], set[str]]:
    """One to three honest servers a span, and liars that look much better."""
    honest = [
        server(f"honest {span} {number}", span * BLOCKS, (span + 1) * BLOCKS)
        for span in range(NUM_SPANS)
        for number in range(rng.randint(1, 3))
    ]
    spans = [rng.randrange(NUM_SPANS) for _ in range(num_liars)]
    if rng.random() < 0.5:
        spans = spans[:1] * num_liars  # side by side
    liars = [
        server(f"liar {number}", at * BLOCKS, (at + 1) * BLOCKS, decode_ms_per_block=0.01)
        for number, at in enumerate(spans)
    ]
    return [*honest, *liars], {info.peer_id for info in liars}


async def client_of(servers: list[ServerInfo], monkeypatch: pytest.MonkeyPatch) -> ChainManager:
    manager = ChainManager(ClientConfig(chain_cost_jitter=0.0), FACTS, ManualClock())

    async def silent(_peers: object) -> list[str]:
        return []

    monkeypatch.setattr(manager.view, "silent", silent)
    manager.view._directory = Board(*servers)  # type: ignore[assignment]
    await manager.view.refresh()
    return manager


@pytest.mark.parametrize("lies", LIES)
@pytest.mark.parametrize("num_liars", [1, 2, 3])
async def test_a_text_goes_on_and_no_honest_server_is_left_out(
    monkeypatch: pytest.MonkeyPatch, lies: str, num_liars: int
) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        servers, liars = swarm(rng, num_liars)
        manager = await client_of(servers, monkeypatch)
        attempt = 0
        while True:
            attempt += 1
            chain = await manager.plan(1, 10)
            lying = [hop.peer_id for hop in chain if hop.peer_id in liars]
            if not lying:
                break
            error = rng.choice(LIES[lies])(rng, chain, rng.choice(lying))
            await manager.report_failure(error, chain)
            assert manager.retry_delay_s(error, attempt) is not None
        assert set(manager.peers.banned()) <= liars


@pytest.mark.parametrize("num_liars", [1, 2, 3])
async def test_an_honest_server_among_liars_is_used_where_nobody_else_is(
    monkeypatch: pytest.MonkeyPatch, num_liars: int
) -> None:
    """All who could come before it speak badly of it, until one comes that does not."""
    liars = [server(f"liar {number}", 0, 4) for number in range(num_liars)]
    servers = [*liars, server("honest", 4, 8), server("late", 0, 4, decode_ms_per_block=50.0)]
    manager = await client_of(servers, monkeypatch)
    for _ in range(num_liars):
        chain = await manager.plan(1, 10)
        assert [hop.peer_id for hop in chain][1:] == ["honest"]
        error = PeerReportedError("it sends rubbish")
        error.edge = (chain.hops[0].peer_id, "honest")
        assert not await manager.report_failure(error, chain)
    assert [hop.peer_id for hop in await manager.plan(1, 10)] == ["late", "honest"]
    assert not manager.peers.banned()
