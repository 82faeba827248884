"""Real nodes, most of them hostile: the honest ones announce and look up as if they were alone."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterator

import pytest
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.proto import dht_pb2
from swarm_helpers import StartNode, make_info

from planetserve.clock import SystemClock
from planetserve.crypto.identity import Identity, peer_id_bytes
from planetserve.swarm import records
from planetserve.swarm.dht.search import MAX_NAMED, place_of
from planetserve.swarm.directory import Directory
from planetserve.swarm.libp2p.node import SwarmNode
from planetserve.swarm.libp2p.peer_routing import PeerRouting
from planetserve.types import PeerId

CLOCK = SystemClock()
MODEL = "tiny"
FIND, STORE, PING = (f"PlanetServeDHT.rpc_{name}" for name in ("find", "store", "ping"))
NEAR_S = 12.0
"""A look-up used to take its whole 15 s, and to find nothing, where one peer was hostile."""
MADE_UP = [peer_id_bytes(Identity.generate().peer_id) for _ in range(500)]

Answer = Callable[[bytes, PeerId], Awaitable[bytes]]
Conduct = Callable[[SwarmNode], dict[str, Answer]]


@pytest.fixture
def trap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever looks for the made-up peers is sent to a port where nobody ever says a word."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0), backlog=512)) as listener:
        port = listener.getsockname()[1]
        address = b"\x04\x7f\x00\x00\x01\x06" + port.to_bytes(2, "big")
        closest = PeerRouting._closest

        async def lie(
            self: PeerRouting, key: bytes, asker: bytes
        ) -> list[tuple[bytes, list[bytes]]]:
            if key in MADE_UP:
                return [(key, [address])]
            return await closest(self, key, asker)

        monkeypatch.setattr(PeerRouting, "_closest", lie)
        yield


def naming(node: SwarmNode, request: bytes, peers: list[bytes]) -> dht_pb2.FindResponse:
    """An answer that knows no records, and of these peers the ones nearest to each key."""
    response = dht_pb2.FindResponse(peer=node.dht.protocol.node_info)
    for key in dht_pb2.FindRequest.FromString(request).keys:
        place = int.from_bytes(key, "big")
        near = sorted(peers, key=lambda peer: place_of(peer) ^ place)[:MAX_NAMED]
        response.results.add(
            nearest_node_ids=[place_of(peer).to_bytes(20, "big") for peer in near],
            nearest_peer_ids=near,
        )
    return response


def names_made_up_peers(node: SwarmNode) -> dict[str, Answer]:
    async def find(data: bytes, _remote: PeerId) -> bytes:
        return bytes(naming(node, data, MADE_UP).SerializeToString())

    return {FIND: find}


def names_what_are_no_peers(node: SwarmNode) -> dict[str, Answer]:
    """Of any length, at the places that follow from them."""
    noise = [random.Random(size).randbytes(size) for size in (0, 1, 33, 38, 64, 65, 5000)]

    async def find(data: bytes, _remote: PeerId) -> bytes:
        return bytes(naming(node, data, noise).SerializeToString())

    return {FIND: find}


def hangs(_node: SwarmNode) -> dict[str, Answer]:
    async def hang(_data: bytes, _remote: PeerId) -> bytes:
        await asyncio.Event().wait()
        return b""

    return {FIND: hang, STORE: hang}


def answers_garbage(_node: SwarmNode) -> dict[str, Answer]:
    async def garbage(data: bytes, _remote: PeerId) -> bytes:
        return random.Random(len(data)).randbytes(5000)

    return {FIND: garbage, STORE: garbage, PING: garbage}


def answers_with_two_million_fields(_node: SwarmNode) -> dict[str, Answer]:
    async def fields(_data: bytes, _remote: PeerId) -> bytes:
        return b"\x12\x00" * 1_000_000

    return {FIND: fields, STORE: fields}


def answers_too_few_results(node: SwarmNode) -> dict[str, Answer]:
    async def find(_data: bytes, _remote: PeerId) -> bytes:
        return bytes(naming(node, b"", MADE_UP).SerializeToString())

    return {FIND: find}


def drops_what_it_takes(node: SwarmNode) -> dict[str, Answer]:
    async def find(data: bytes, _remote: PeerId) -> bytes:
        return bytes(naming(node, data, []).SerializeToString())

    async def store(data: bytes, _remote: PeerId) -> bytes:
        count = len(dht_pb2.StoreRequest.FromString(data).keys)
        response = dht_pb2.StoreResponse(peer=node.dht.protocol.node_info, store_ok=[True] * count)
        return bytes(response.SerializeToString())

    return {FIND: find, STORE: store}


def answers_forged_records(node: SwarmNode) -> dict[str, Answer]:
    """Of the honest servers, too, with an expiry that nothing outlives."""
    owner = Identity.generate()
    now_s = time.time()
    body = records.server_body(make_info(owner), now_s, now_s + 60)
    envelope = b"\xc5" + len(records.sign(owner, body)).to_bytes(2, "big")
    envelope += records.sign(owner, body)

    async def find(data: bytes, remote: PeerId) -> bytes:
        forged = DictionaryDHTValue()
        for name in (remote, *(Identity.generate().peer_id for _ in range(200))):
            forged.store(name, envelope, time.time() + 1e9)
        response = naming(node, data, [])
        for result in response.results:
            result.type = dht_pb2.FOUND_DICTIONARY
            result.value = node.dht.protocol.serializer.dumps(forged)
            result.expiration_time = float("inf")
        return bytes(response.SerializeToString())

    return {FIND: find}


CONDUCTS: list[Conduct] = [
    names_made_up_peers,
    names_what_are_no_peers,
    hangs,
    answers_garbage,
    answers_with_two_million_fields,
    answers_too_few_results,
    drops_what_it_takes,
    answers_forged_records,
]


async def announce_and_look_up(start_node: StartNode, conducts: list[Conduct]) -> None:
    """Three honest nodes and a client beside as many hostile ones as there are `conducts`."""
    first = await start_node()
    hostile = [await start_node(first) for _ in conducts]
    for node, conduct in zip(hostile, conducts, strict=True):
        node.calls.update(conduct(node))
    honest = [first, await start_node(first), await start_node(first)]
    for node in honest:
        async with asyncio.timeout(NEAR_S):
            await Directory(node, CLOCK).announce(make_info(node.identity), ttl_s=300)
    for node in [*honest, await start_node(first, client_mode=True)]:
        async with asyncio.timeout(NEAR_S):
            found = await Directory(node, CLOCK).lookup(MODEL)
        assert {info.peer_id for info in found} == {info.peer_id for info in honest}


@pytest.mark.usefixtures("trap")
@pytest.mark.parametrize("conduct", CONDUCTS)
async def test_one_hostile_keeper_hides_nobody(start_node: StartNode, conduct: Conduct) -> None:
    await announce_and_look_up(start_node, [conduct])


@pytest.mark.usefixtures("trap")
@pytest.mark.parametrize("seed", range(2))
async def test_five_hostile_keepers_of_eight_hide_nobody(start_node: StartNode, seed: int) -> None:
    await announce_and_look_up(start_node, random.Random(seed).choices(CONDUCTS, k=5))


@pytest.mark.parametrize("conduct", [hangs, answers_garbage])
async def test_one_hostile_initial_peer_of_two_keeps_nobody_out(
    start_node: StartNode, conduct: Conduct
) -> None:
    first = await start_node()
    hostile = await start_node(first)
    hostile.calls.update(conduct(hostile))
    both = (*hostile.addresses(), *first.addresses())
    async with asyncio.timeout(NEAR_S):
        server = await start_node(initial_peers=both)
        await Directory(server, CLOCK).announce(make_info(server.identity), ttl_s=300)
    async with asyncio.timeout(NEAR_S):
        client = await start_node(initial_peers=both, client_mode=True)
        (found,) = await Directory(client, CLOCK).lookup(MODEL)
    assert found.peer_id == server.peer_id
