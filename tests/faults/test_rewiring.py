"""REWIRE: only what fits the session, sealed into the edge keys after it, and not without end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from hostile import MeetServer, Opened, until

from planetserve.crypto.secrets import new_edge_secret, seal_edge_keys
from planetserve.errors import (
    DecryptionFailed,
    PlanetServeError,
    RemoteProtocolError,
    StreamClosed,
)
from planetserve.server.server import Server
from planetserve.wire.frame import FrameHeader, FrameType
from planetserve.wire.messages import NextHop, Rewire

pytestmark = pytest.mark.asyncio(loop_scope="module")

PEER = "12D3KooWQK1wnefoLrcVHbbnf5tLzbopUd3K3bFAoJpA7YJgL5pV"
NEXT = NextHop(peer_id=PEER, edge=5, fresh=True, end=2, addresses=[])


def rewire(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "epoch": 1, "previous": None, "next": None, "first_step": 0, "max_chunk_tokens": 8,
    }  # fmt: skip
    return Rewire.model_validate({**fields, **changes}).encode()


async def send(session: Opened, message: bytes, dealt_with: bytes | None = None) -> None:
    """REWIRE and its edge keys, which may belong to another one."""
    sealed = message if dealt_with is None else dealt_with
    blob = seal_edge_keys(
        session.channel,
        session.channel.keys_epoch + 1,
        new_edge_secret(),
        new_edge_secret(),
        sealed,
    )
    # The server may have closed the stream before the second frame is on its way.
    with contextlib.suppress(StreamClosed):
        for kind, payload in ((FrameType.REWIRE, message), (FrameType.EDGE_KEYS, blob)):
            header = FrameHeader(kind, session=session.session_id, edge=session.edge)
            await session.control.send(header, payload)


@pytest.mark.parametrize(
    ("options", "message", "error"),
    [
        ({}, rewire(previous=PEER), RemoteProtocolError),
        ({}, rewire(next=NEXT), RemoteProtocolError),
        ({}, rewire(), RemoteProtocolError),
        ({"edge": 1, "previous": PEER}, rewire(previous="client"), RemoteProtocolError),
        ({"edge": 1, "previous": PEER}, rewire(previous=PEER, epoch=2), RemoteProtocolError),
    ],
    ids=["upstream of a first hop", "next of a last hop", "nothing", "the client", "other epoch"],
)
async def test_a_rewiring_that_does_not_fit(
    server: Server,
    meet: MeetServer,
    options: dict[str, Any],
    message: bytes,
    error: type[PlanetServeError],
) -> None:
    session = await (await meet()).open(**options)
    await send(session, message)
    assert isinstance(await session.error(), error)
    await until(lambda: not server.handler.num_sessions)


async def test_edge_keys_open_only_with_its_rewiring(server: Server, meet: MeetServer) -> None:
    session = await (await meet()).open(edge=1, previous=PEER)
    other = "12D3KooWJ8iDoJ7GxGTzhbPVFMQnbSq8VjLnDpvhvPhUzkRvEQXA"
    await send(session, rewire(previous=other), dealt_with=rewire(previous=PEER))
    assert isinstance(await session.error(), DecryptionFailed)
    await until(lambda: server.handler.counters["session.decryption"] >= 1)


async def test_the_old_upstream_is_cut_off(server: Server, meet: MeetServer) -> None:
    """After a rewiring nothing comes in from the hop before: not on its stream, not on another."""
    client, old, new = await meet(), await meet(), await meet()
    session = await client.open(edge=1, previous=old.node.peer_id)
    session.upstream = await old.push(session.session_id, of=client)
    assert (await session.step(2)).shape[0] == 2
    message = rewire(previous=new.node.peer_id)
    await send(session, message)
    header, _ = await session.control.receive(20.0)
    assert (header.type, header.epoch) == (FrameType.REWIRED, 1)
    with pytest.raises(PlanetServeError):
        await session.upstream.receive(20.0)
    for stranger, epoch in ((old, 0), (old, 1), (new, 0)):
        stream = await stranger.push(session.session_id, epoch=epoch, of=client)
        header, _ = await stream.receive(20.0)
        assert header.type is FrameType.ERROR
    used = server.engine.stats().pages_used
    session.upstream = await new.push(session.session_id, epoch=1, of=client)
    # Sealed with the old key, what the new upstream sends ends the session; nothing is computed.
    table, hidden_TD = session.numbers_for(2, start=2)
    await session.send(*session.sealed(table, hidden_TD))
    assert isinstance(await session.error(), DecryptionFailed)
    assert server.engine.stats().pages_used <= used


async def test_rewirings_are_counted(meet: MeetServer) -> None:
    session = await (await meet()).open(edge=1, previous=PEER)

    async def drain() -> PlanetServeError:
        return await session.error()

    answer = asyncio.create_task(drain())
    for epoch in range(1, 300):
        await send(session, rewire(previous=PEER, epoch=epoch))
    assert isinstance(await answer, RemoteProtocolError)
