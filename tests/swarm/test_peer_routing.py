"""Where peers are: what this node's process answers to others' daemons, and what it does not."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable

import pytest
from google.protobuf import proto
from hivemind.utils.multiaddr import Multiaddr
from hypothesis import given
from hypothesis import strategies as st
from swarm_helpers import StartNode, exchange, until, varint

from planetserve.crypto.identity import Identity, peer_id_bytes
from planetserve.errors import PeerUnreachable, RemoteProtocolError
from planetserve.swarm.dht import operations
from planetserve.swarm.libp2p import peer_routing
from planetserve.swarm.libp2p.kademlia_messages import Message
from planetserve.swarm.libp2p.node import SwarmNode
from planetserve.swarm.libp2p.peer_routing import PROTOCOL

PING = b"\x08\x05"

Send = Callable[..., Awaitable[bytes]]


def find(peer_id: str) -> bytes:
    key = peer_id_bytes(peer_id)
    return b"\x08\x04\x12" + varint(len(key)) + key


def told(answer: bytes) -> dict[bytes, list[str]]:
    """Addresses by peer id."""
    stream = io.BytesIO(answer)
    message = proto.parse_length_prefixed(Message, stream)
    assert not stream.read()
    return {
        peer.id: [str(Multiaddr(place)) for place in peer.addrs] for peer in message.closer_peers
    }


def place(node: SwarmNode) -> str:
    return node.addresses()[0].partition("/p2p/")[0]


@pytest.fixture
async def server(start_node: StartNode) -> SwarmNode:
    return await start_node()


@pytest.fixture
async def client(start_node: StartNode, server: SwarmNode) -> SwarmNode:
    return await start_node(server, client_mode=True)


@pytest.fixture
async def send(client: SwarmNode, server: SwarmNode) -> Send:
    """`await send(pieces...)`: a stream with these bytes on it; what comes back until its end."""

    async def send(*pieces: bytes) -> bytes:
        return await exchange(client, server, PROTOCOL, pieces)

    return send


async def test_a_peer_is_found_by_its_id_across_the_swarm(
    start_node: StartNode, server: SwarmNode
) -> None:
    """The client knows the first server, that one the second, and only that one the third."""
    second = await start_node(server)
    third = await start_node(second)
    client = await start_node(server, client_mode=True)
    await client.connect(third.peer_id, ())
    with pytest.raises(PeerUnreachable):
        await client.connect(Identity.generate().peer_id, ())


async def test_the_one_asked_for_and_those_next_to_it_are_told(
    start_node: StartNode, server: SwarmNode, client: SwarmNode, send: Send
) -> None:
    other = await start_node(server)
    await until(lambda: peer_id_bytes(other.peer_id) in operations.known(server.dht))
    await asyncio.sleep(0.3)  # connections are asked for five times a second
    both = {peer_id_bytes(other.peer_id): [place(other)]}
    for peer_id in (other.peer_id, client.peer_id, Identity.generate().peer_id):
        question = find(peer_id)
        assert told(await send(varint(len(question)) + question)) == both
    question = find(server.peer_id)
    mine = {peer_id_bytes(server.peer_id): [place(server)]}
    assert told(await send(varint(len(question)) + question)) == mine


async def test_several_questions_may_come_on_one_stream_in_pieces(send: Send) -> None:
    data = varint(len(PING)) + PING
    for pieces in (
        [data * 3],
        [data[:1], data[1:] + data, data],
        [data, data[:2], data[2:] + data],
    ):
        assert await send(*pieces) == data * 3


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 10,
        varint(1025) + bytes(1025),
        varint(2) + b"\x08\x01",
        varint(2) + b"\x08\x85",
        varint(0),
        b"",
        b"\xff\xff\xff\x01" + bytes(100),
        varint(100) + PING,
    ],
    ids=["long length", "too long", "GET_VALUE", "cut", "empty", "nothing", "4 MiB", "half"],
)
async def test_anything_else_ends_the_stream(send: Send, server: SwarmNode, data: bytes) -> None:
    assert await send(data) == b""
    await until(lambda: not server._incoming.num_open)


async def test_one_peer_may_ask_so_often(start_node: StartNode) -> None:
    server = await start_node(max_peer_lookups=1e-3, peer_lookup_burst=30)
    client = await start_node(server, client_mode=True)
    loop = asyncio.get_running_loop()
    data = varint(len(PING)) + PING
    with await client.open_socket(server.peer_id, PROTOCOL) as sock:
        await loop.sock_sendall(sock, data * 40)
        answer = b""
        async with asyncio.timeout(5):
            while part := await loop.sock_recv(sock, 4096):
                answer += part
    assert len(answer) < len(data * 30)
    # The client's own daemon looks peers up too, and may be refused as well.
    assert server.refused["route"] >= 1


@given(st.binary(max_size=60))
def test_no_bytes_are_more_than_no_question(data: bytes) -> None:
    try:
        peer_routing._parse(data)
    except RemoteProtocolError:
        return
    assert data[:1]
