"""An OPEN or a first frame with one thing wrong: which error comes back, and what is counted."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import pytest
from hostile import MeetServer, error_on, until

from planetserve.errors import (
    CacheExhausted,
    HandshakeFailed,
    ModelMismatchError,
    PlanetServeError,
    RemoteProtocolError,
    SessionLengthError,
    UnsupportedError,
)
from planetserve.server.server import Server
from planetserve.wire.frame import FrameHeader, FrameType
from planetserve.wire.protocols import PUSH_PROTOCOL

pytestmark = pytest.mark.asyncio(loop_scope="module")

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"

WELL_FORMED: dict[str, tuple[dict[str, Any], type[PlanetServeError]]] = {
    "another model": ({"model": "other"}, ModelMismatchError),
    "another revision": ({"fingerprint": "0" * 64}, ModelMismatchError),
    "blocks past the span": ({"end": 3}, RemoteProtocolError),
    "no blocks": ({"start": 1, "end": 1}, RemoteProtocolError),
    "reversed blocks": ({"start": 2, "end": 1}, RemoteProtocolError),
    "a first hop with an upstream peer": ({"previous": PEER}, RemoteProtocolError),
    "a low-order offer": ({"offer": "A" * 43 + "="}, HandshakeFailed),
    "rows past the server's length": ({"max_length": 257}, SessionLengthError),
    "the largest length": ({"max_length": 1 << 24}, SessionLengthError),
    "more than the cache": ({"num_rows": 1024, "max_length": 256}, CacheExhausted),
}


@pytest.mark.parametrize("name", WELL_FORMED)
async def test_an_open_that_is_refused(server: Server, meet: MeetServer, name: str) -> None:
    changes, kind = WELL_FORMED[name]
    stranger = await meet()
    before = server.handler.counters.copy()
    with pytest.raises(kind) as caught:
        await stranger.open(**changes)
    assert type(caught.value) is kind
    assert server.handler.counters - before == {f"open.{kind.code}": 1}
    assert server.engine.stats().pages_leased == 0
    assert not server.handler.num_sessions


async def test_a_session_cannot_be_opened_twice(server: Server, meet: MeetServer) -> None:
    owner = await meet()
    session = await owner.open()
    with pytest.raises(RemoteProtocolError):
        await owner.open(session.session_id)
    assert (await session.step(2)).shape[0] == 2


@pytest.mark.parametrize("thief_is_first", [True, False])
async def test_a_session_id_is_worth_nothing_to_others(
    server: Server, meet: MeetServer, thief_is_first: bool
) -> None:
    """A hop knows the id, the edge and the peer of the next hop. With them it opens sessions of its
    own, and neither stands in the client's way nor gets what the hop before pushes."""
    client, hop, thief = await meet(), await meet(), await meet()
    session_id, sessions = os.urandom(16), {}
    for peer in (thief, client) if thief_is_first else (client, thief):
        sessions[peer] = await peer.open(session_id, edge=1, previous=hop.node.peer_id)
    session = sessions[client]
    session.upstream = await hop.push(session_id, of=client)
    assert (await session.step(2)).shape[0] == 2
    await sessions[thief].close()
    assert (await session.step(1, start=2)).shape[0] == 1
    await until(lambda: server.handler.num_sessions == 1)


MALFORMED: dict[str, dict[str, Any] | bytes] = {
    "noise": b"\x00\xff" * 40,
    "nothing": b"",
    "a list": b"[]",
    "deep": b"[" * 60_000,
    "a long number": b'{"start":' + b"9" * 50_000 + b"}",
    "many unknown fields": {f"colour_{number}": "blue" for number in range(33)},
    "an unknown field without a proper name": {"colour\n": "blue"},
    "text for a number": {"start": "0"},
    "a fraction": {"num_rows": 1.0},
    "a boolean": {"epoch": True},
    "not a number": {"max_length": float("nan")},
    "a negative number": {"start": -1},
    "too many rows": {"num_rows": 1025},
    "an offer of 31 bytes": {"offer": "A" * 43},
    "an offer with a line break": {"offer": "A" * 43 + "=\n"},
    "another dtype": {"dtype": "int8"},
    "half a character": {"model": "\ud800"},
    "a long name": {"model": "m" * 257},
    "many addresses": {"next": {"peer_id": PEER, "end": 3, "addresses": ["/ip4/1.2.3.4"] * 17}},
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_an_open_that_is_no_message(server: Server, meet: MeetServer, name: str) -> None:
    stranger = await meet()
    wrong = MALFORMED[name]
    if isinstance(wrong, dict):
        right = stranger.message(os.urandom(32)).model_dump()
        wrong = json.dumps({**right, **wrong}).encode()
    before = server.handler.counters.copy()
    stream = await stranger.stream()
    await stream.send(FrameHeader(FrameType.OPEN, session=os.urandom(16)), wrong)
    error = await error_on(stream)
    assert isinstance(error, RemoteProtocolError)
    assert "blue" not in str(error)
    assert "colour" not in str(error)
    assert server.handler.counters - before == {"open.protocol": 1}


LATER: dict[str, dict[str, Any]] = {
    "a critical field": {"colour": "blue", "critical": ["colour"]},
    "a capability": {"capabilities": ["colour"]},
}


@pytest.mark.parametrize("name", LATER)
async def test_an_open_that_needs_what_the_server_does_not_know(
    server: Server, meet: MeetServer, name: str
) -> None:
    stranger = await meet()
    before = server.handler.counters.copy()
    right = stranger.message(os.urandom(32)).model_dump()
    stream = await stranger.stream()
    opening = FrameHeader(FrameType.OPEN, session=os.urandom(16))
    await stream.send(opening, json.dumps({**right, **LATER[name]}).encode())
    assert type(await error_on(stream)) is UnsupportedError
    assert server.handler.counters - before == {"open.unsupported": 1}


async def test_an_open_with_what_the_server_need_not_know(server: Server, meet: MeetServer) -> None:
    stranger = await meet()
    right = stranger.message(os.urandom(32)).model_dump()
    stream = await stranger.stream()
    opening = FrameHeader(FrameType.OPEN, session=os.urandom(16))
    await stream.send(opening, json.dumps({**right, "colour": {"of": ["blue"]}}).encode())
    assert (await stream.receive())[0].type is FrameType.OPENED


async def test_an_open_of_another_version_is_told_so(server: Server, meet: MeetServer) -> None:
    before = server.handler.counters.copy()
    stream = await (await meet()).stream()
    later = bytearray(FrameHeader(FrameType.OPEN, session=os.urandom(16)).pack())
    later[0] = 2
    await asyncio.get_running_loop().sock_sendall(stream._socket, later)
    assert type(await error_on(stream)) is UnsupportedError
    assert server.handler.counters - before == {"frame": 1}


@pytest.mark.parametrize("kind", [kind for kind in FrameType if kind is not FrameType.OPEN])
async def test_a_session_stream_begins_with_open(
    server: Server, meet: MeetServer, kind: FrameType
) -> None:
    stream = await (await meet()).stream()
    before = server.handler.counters.copy()
    await stream.send(FrameHeader(kind, session=os.urandom(16)), os.urandom(200))
    assert isinstance(await error_on(stream), RemoteProtocolError)
    assert server.handler.counters - before == {"open.protocol": 1}


@pytest.mark.parametrize(
    "payload",
    [b"", b"{}", b'{"client":"x","edge":0,"epoch":0}', b'{"client":"x","edge":1,"epoch":-1}'],
)
async def test_a_push_stream_begins_with_hello(
    server: Server, meet: MeetServer, payload: bytes
) -> None:
    for kind in (FrameType.HELLO, FrameType.STEP):
        stream = await (await meet()).stream(PUSH_PROTOCOL)
        before = server.handler.counters.copy()
        await stream.send(FrameHeader(kind, session=os.urandom(16)), payload)
        assert isinstance(await error_on(stream), RemoteProtocolError)
        assert server.handler.counters - before == {"push.protocol": 1}


async def test_a_stream_without_a_frame_is_counted(server: Server, meet: MeetServer) -> None:
    stranger = await meet()
    before = server.handler.counters["frame"]
    for protocol in (None, PUSH_PROTOCOL):
        stream = await (stranger.stream(protocol) if protocol else stranger.stream())
        stream._socket.send(FrameHeader(FrameType.OPEN).pack()[:40])
        stream.abort()
    await until(lambda: server.handler.counters["frame"] == before + 2)
