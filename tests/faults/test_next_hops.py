"""What a client gains by naming a next hop: an answer, and nothing about who is where."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hostile import MeetServer, error_on, until

from planetserve.crypto.identity import Identity
from planetserve.errors import PeerUnreachable, RemoteProtocolError
from planetserve.server import next_hop_dials
from planetserve.server.server import Server
from planetserve.wire.frame import FrameHeader, FrameType
from planetserve.wire.messages import ErrorReply, NextHop, decode

pytestmark = pytest.mark.asyncio(loop_scope="module")

PEER = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
RIGHT = {"peer_id": PEER, "edge": 1, "fresh": True, "end": 3, "addresses": []}

WRONG: dict[str, dict[str, Any]] = {
    "an edge from the client": {"edge": 0},
    "this hop's own edge": {"edge": 2},
    "an edge into the client": {"edge": 65535},
    "blocks that this hop runs": {"end": 2},
    "no blocks": {"end": 0},
    "no peer id": {"peer_id": "nobody"},
    "the client": {"peer_id": "client"},
    "a peer id of another kind": {"peer_id": "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"},
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_next_hop_that_cannot_be(server: Server, meet: MeetServer, name: str) -> None:
    """It is refused before anything is opened, in OPEN and in REWIRE."""
    stranger = await meet()
    changes = {"edge": 2, "previous": PEER, "next": {**RIGHT, **WRONG[name]}}
    payload = {**stranger.message(os.urandom(32)).model_dump(), **changes}
    stream = await stranger.stream()
    await stream.send(
        FrameHeader(FrameType.OPEN, session=os.urandom(16), edge=2), json.dumps(payload).encode()
    )
    assert isinstance(await error_on(stream), RemoteProtocolError)
    session = await stranger.open(edge=2, previous=PEER, next=NextHop.model_validate(RIGHT))
    rewire = {"epoch": 1, "previous": None, "first_step": 0, "max_chunk_tokens": 8}
    payload = {**rewire, "next": changes["next"]}
    header = FrameHeader(FrameType.REWIRE, session=session.session_id, edge=2)
    await session.control.send(header, json.dumps(payload).encode())
    assert isinstance(await session.error(), RemoteProtocolError)
    await until(lambda: not server.handler.num_sessions)


async def test_a_previous_hop_is_a_peer(server: Server, meet: MeetServer) -> None:
    with pytest.raises(RemoteProtocolError):
        await (await meet()).open(edge=1, previous="nobody")
    assert not server.handler.num_sessions


@pytest.fixture
def places() -> Iterator[dict[str, str]]:
    """Where something listens that is no peer, where nothing does, and where nobody can be."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and does not listen
        yield {
            "open": f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}",
            "closed": f"/ip4/127.0.0.1/tcp/{free.getsockname()[1]}",
            "unreachable": "/ip4/240.0.0.1/tcp/80",
            "unknown": "/dns4/does-not-exist.invalid/tcp/80",
        }


async def test_a_port_scan_tells_nothing(
    server: Server, meet: MeetServer, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_hop_dials, "CONNECT_TIMEOUT_S", 1.0)
    stranger = await meet()
    loop = asyncio.get_running_loop()

    async def ask(place: str) -> tuple[bytes, float]:
        peer_id = Identity.generate().peer_id
        hop = {**RIGHT, "peer_id": peer_id, "addresses": [f"{place}/p2p/{peer_id}"]}
        session = await stranger.open(next=NextHop.model_validate(hop))
        asked_s = loop.time()
        header, payload = await session.control.receive(20.0)
        assert header.type is FrameType.NEXT_HOP_LOST
        took_s = loop.time() - asked_s
        reply = decode(ErrorReply, payload)
        assert (reply.code, reply.blamed_peer) == (PeerUnreachable.code, peer_id)
        await session.close()
        return bytes(payload).replace(peer_id.encode(), b""), took_s

    answers = await asyncio.gather(*map(ask, places.values()))
    assert len({payload for payload, _ in answers}) == 1
    # Whatever is there: none comes as soon as it is known.
    assert all(took_s > 0.9 for _, took_s in answers)


async def test_what_a_session_ends_with_has_no_text_of_an_exception(
    server: Server, meet: MeetServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("/home/operator/secret")

    monkeypatch.setattr(server.engine, "submit", fail)
    session = await (await meet()).open()
    await session.send(*session.sealed(*session.numbers_for(1)))
    header, payload = await session.control.receive(20.0)
    assert header.type is FrameType.ERROR
    assert b"secret" not in payload
    assert json.loads(bytes(payload)) == {
        "code": "internal", "retry_after_s": 0.0, "blamed_peer": "",
    }  # fmt: skip


async def test_a_session_whose_push_fails_in_an_unforeseen_way_ends(
    server: Server, meet: MeetServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told the client, and nothing stays open."""
    client, hop = await meet(), await meet()

    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    session = await client.open(edge=1, previous=hop.node.peer_id)
    monkeypatch.setattr(server.engine, "submit", fail)
    session.upstream = await hop.push(session.session_id, of=client)
    await session.send(*session.sealed(*session.numbers_for(1)))
    error = await session.error()
    assert (error.code, error.peer_id) == ("internal", None)
    await until(lambda: not server.handler.num_sessions)
