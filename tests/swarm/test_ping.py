"""A ping says how far a peer is, whatever it answers."""

from __future__ import annotations

import pytest
from swarm_helpers import StartNode

from planetserve.errors import RemoteProtocolError
from planetserve.swarm.libp2p.streams import FrameStream
from planetserve.swarm.ping import PROTOCOL, ping, serve_ping
from planetserve.wire.frame import FrameHeader, FrameType


async def test_a_ping_takes_some_time(start_node: StartNode) -> None:
    far = await start_node()
    await serve_ping(far)
    near = await start_node(far, client_mode=True)
    assert await ping(near, far.peer_id, far.addresses(), timeout_s=10.0) > 0


@pytest.mark.parametrize(
    ("kind", "nonce", "payload"),
    [
        (FrameType.PONG, bytes(16), b""),  # sent before the ping has come
        (FrameType.PING, None, b""),
        (FrameType.STATUS, None, b"{}"),
    ],
)
async def test_nobody_looks_nearer_than_it_is(
    start_node: StartNode, kind: FrameType, nonce: bytes | None, payload: bytes
) -> None:
    async def lie(stream: FrameStream) -> None:
        if nonce is None:
            asked, _ = await stream.receive()
            answer = FrameHeader(kind, session=asked.session)
        else:
            answer = FrameHeader(kind, session=nonce)
        await stream.send(answer, payload)
        await stream.receive(10.0)

    liar = await start_node()
    await liar.serve_streams(PROTOCOL, lie)
    near = await start_node(liar, client_mode=True)
    with pytest.raises(RemoteProtocolError):
        await ping(near, liar.peer_id, liar.addresses(), timeout_s=10.0)
