"""What the libp2p daemon would do for strangers on its own: nothing of it is done."""

from __future__ import annotations

import contextlib

import pytest
from swarm_helpers import StartNode, exchange, until

from planetserve.errors import PlanetServeError
from planetserve.swarm.libp2p import refused_protocols
from planetserve.swarm.libp2p.node import SwarmNode
from planetserve.swarm.libp2p.streams import FrameStream
from planetserve.wire.frame import FrameHeader, FrameType

RESERVE = b"\x02\x08\x00"
"""A message of circuit relay version 2: its length, and the type RESERVE."""
RESERVED = b"(d"
"""Of an answer: the status OK (100)."""
HOP = refused_protocols.RELAY_PROTOCOLS[0]


async def carried(node: SwarmNode, near: SwarmNode, far: SwarmNode) -> int:
    """Bytes that get from `far` through `node` to `near`, which listens nowhere."""
    got: list[int] = []

    async def sink(stream: FrameStream) -> None:
        while True:
            _, payload = await stream.receive()
            got.append(len(payload))

    await near.serve_streams("test/1", sink)
    path = f"{node.addresses()[0]}/p2p-circuit/p2p/{near.peer_id}"
    with contextlib.suppress(PlanetServeError):
        stream = await far.open_stream(near.peer_id, [path], "test/1", timeout_s=5.0)
        await stream.send(FrameHeader(FrameType.STEP), bytes(1000))
        await until(lambda: bool(got))
    return sum(got)


async def two_that_want_relaying(start_node: StartNode, node: SwarmNode) -> list[SwarmNode]:
    return [await start_node(node, client_mode=True, use_relay=True) for _ in range(2)]


async def test_a_node_relays_for_nobody(start_node: StartNode) -> None:
    node = await start_node()
    near, far = await two_that_want_relaying(start_node, node)
    assert await exchange(near, node, HOP, (RESERVE,)) == b""
    assert await carried(node, near, far) == 0
    assert node.refused["libp2p"] > 0


async def test_a_node_that_is_to_relay_does(start_node: StartNode) -> None:
    node = await start_node(use_relay=True)
    near, far = await two_that_want_relaying(start_node, node)
    assert (await exchange(near, node, HOP, (RESERVE,))).endswith(RESERVED)
    assert await carried(node, near, far) == 1000


@pytest.mark.parametrize("client_mode", [False, True])
@pytest.mark.parametrize(
    "protocol", [*refused_protocols.RELAY_PROTOCOLS, *refused_protocols.OTHER_PROTOCOLS]
)
async def test_streams_of_these_protocols_end_unheard(
    start_node: StartNode, protocol: str, client_mode: bool
) -> None:
    """Also on the connections that a client has made."""
    stranger = await start_node()
    node = await start_node(stranger, client_mode=client_mode)
    assert await exchange(stranger, node, protocol, (RESERVE,)) == b""
