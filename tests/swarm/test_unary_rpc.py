"""Requests to the directory that are cut short, slow, or none at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2, p2pd_pb2
from hypothesis import given
from hypothesis import strategies as st
from swarm_helpers import StartNode, exchange, until, varint

from planetserve.errors import RemoteProtocolError
from planetserve.swarm.dht.field_count import check_num_fields
from planetserve.swarm.libp2p import unary_rpc
from planetserve.swarm.libp2p.node import SwarmNode

PING = "PlanetServeDHT.rpc_ping"
CALL = p2pd_pb2.PersistentConnectionRequest(
    callId=bytes(16), callUnary=p2pd_pb2.CallUnaryRequest(peer=b"", proto=PING, data=b"")
).SerializeToString()

Send = Callable[..., Awaitable[bytes]]


@pytest.fixture
async def server(start_node: StartNode) -> SwarmNode:
    return await start_node()


@pytest.fixture
async def send(start_node: StartNode, server: SwarmNode) -> Send:
    """`await send(pieces...)`: a stream with these bytes on it; what comes back until its end."""
    client = await start_node(server, client_mode=True)

    async def send(*pieces: bytes) -> bytes:
        return await exchange(client, server, PING, pieces)

    return send


async def test_a_request_may_come_in_pieces(send: Send, server: SwarmNode) -> None:
    data = varint(len(CALL)) + CALL
    for pieces in (
        [data],
        [data[:1], data[1:20], data[20:]],
        [data[i : i + 1] for i in range(len(data))],
    ):
        answer = await send(*pieces)
        message = p2pd_pb2.PersistentConnectionRequest.FromString(answer[1:])
        assert len(answer) == 1 + answer[0]
        assert message.callId == bytes(16)
        pong = dht_pb2.PingResponse.FromString(message.unaryResponse.response)
        assert pong.peer.node_id == server.dht.node_id.to_bytes()
    assert not server.refused


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 10,
        b"\xff\xff\xff\x7f" + bytes(100),
        varint(len(CALL)) + bytes(len(CALL)),
        varint(18) + CALL[:18],
        varint(0),
    ],
    ids=["long length", "too long", "not a message", "not a call", "empty"],
)
async def test_what_is_no_request_ends_the_stream(
    send: Send, server: SwarmNode, data: bytes
) -> None:
    assert await send(data) == b""
    assert server.refused == {"call": 1}


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xff\xff\x01" + bytes(100)])
async def test_half_a_request_is_waited_for_so_long(
    send: Send, server: SwarmNode, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unary_rpc, "REQUEST_TIMEOUT_S", 0.2)
    assert await send(data) == b""
    assert server.refused == {"call": 1}
    await until(lambda: not server._incoming.num_open)


async def test_a_request_is_no_longer_than_it_needs_to_be(send: Send, server: SwarmNode) -> None:
    """Its first bytes say how long it is; the rest is not waited for."""
    assert await send(varint(unary_rpc.MAX_REQUEST_BYTES + 1)) == b""
    assert server.refused == {"call": 1}


@pytest.mark.parametrize("field", [b"\x12\x00", b"\x10\x00", b"\x1a\x00"])
async def test_many_small_fields_are_refused_before_they_are_decoded(
    start_node: StartNode, server: SwarmNode, field: bytes
) -> None:
    """Each would take some fifty bytes and more time than its sender spent on it."""
    client = await start_node(server, client_mode=True)

    body = field * (unary_rpc.MAX_REQUEST_BYTES // 4)
    for name in ("ping", "find", "store"):
        protocol = f"PlanetServeDHT.rpc_{name}"
        request = p2pd_pb2.PersistentConnectionRequest(
            callId=bytes(16),
            callUnary=p2pd_pb2.CallUnaryRequest(peer=b"", proto=protocol, data=body),
        ).SerializeToString()
        data = varint(len(request)) + request
        answer = await exchange(client, server, protocol, (data,))
        message = p2pd_pb2.PersistentConnectionRequest.FromString(answer[1:])
        assert message.unaryResponse.error == b"protocol"
    before = server.refused.copy()
    request = field * 100
    assert await exchange(client, server, PING, (varint(len(request)) + request,)) == b""
    assert server.refused["call"] == before["call"] + 1


@given(st.binary(max_size=60))
def test_the_shape_of_a_message_is_checked_without_surprises(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        check_num_fields(memoryview(data), most=5, most_inside=5)


async def test_streams_of_calls_count_with_the_others(
    server: SwarmNode, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    await until(lambda: not server._incoming.num_open)  # one may be the client's daemon's own
    monkeypatch.setattr(server._incoming, "max_streams", 8)
    monkeypatch.setattr(unary_rpc, "REQUEST_TIMEOUT_S", 1.0)
    assert await asyncio.gather(*(send(b"") for _ in range(5))) == [b""] * 5
    assert server.refused == {"stream": 3, "call": 2}


async def test_what_fails_is_told_to_the_caller_only(
    start_node: StartNode, server: SwarmNode
) -> None:
    client = await start_node(server, client_mode=True)
    stub = client.dht.protocol.get_stub(PeerID.from_base58(server.peer_id))
    with pytest.raises(Exception, match="protocol"):
        await stub.rpc_store(dht_pb2.StoreRequest(keys=[b"x"]), timeout=5.0)
    assert await stub.rpc_ping(dht_pb2.PingRequest(), timeout=5.0)


async def test_answers_that_nobody_takes_are_bounded(
    start_node: StartNode, server: SwarmNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megabytes for a hundred bytes of a question: each peer has some on their way, and all too."""
    answer_bytes = 1 << 20
    monkeypatch.setattr(unary_rpc, "MAX_UNSENT_BYTES_PER_PEER", 2 * answer_bytes)
    monkeypatch.setattr(unary_rpc, "MAX_UNSENT_BYTES", 3 * answer_bytes)

    async def large(_data: bytes, _remote: str) -> bytes:
        return bytes(answer_bytes)

    greedy = [await start_node(server, client_mode=True) for _ in range(2)]
    other = await start_node(server, client_mode=True)
    find = "PlanetServeDHT.rpc_find"
    monkeypatch.setitem(server.calls, find, large)
    with contextlib.ExitStack() as streams:
        loop = asyncio.get_running_loop()
        for number in range(8):
            sock = await greedy[number // 4].open_socket(server.peer_id, find)
            streams.enter_context(sock)
            await loop.sock_sendall(sock, varint(len(CALL)) + CALL)
        await until(lambda: server._calls.unsent.total == 3 * answer_bytes)
        sock = streams.enter_context(await other.open_socket(server.peer_id, find))
        await loop.sock_sendall(sock, varint(len(CALL)) + CALL)
        assert b"queue_full" in await loop.sock_recv(sock, 4096)
        assert server._calls.unsent.total == 3 * answer_bytes
    await until(lambda: server._calls.unsent.total == 0)
