"""What a server may do to the client that uses it: cost it a fail-over, no memory and no token.

The server here keeps to the handshake and then sends what nobody asked for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest
import torch
from fault_swarm import FaultSwarm, Held
from faulted_texts import GREEDY, Material

from planetserve.client.hop_link import MAX_UNREAD
from planetserve.errors import PeerUnreachable, PlanetServeError
from planetserve.types import PeerId
from planetserve.wire.frame import FrameHeader, FrameType
from planetserve.wire.messages import error_reply

pytestmark = pytest.mark.timeout(120)

SPANS = ("0:3", "0:3", "3:6", "3:6")
NUM_FRAMES = 400


def step(session_id: bytes, accused: PeerId) -> tuple[FrameHeader, bytes]:
    """An answer of the largest size that every stream takes at once, of noise."""
    return FrameHeader(FrameType.STEP, session=session_id), bytes(60 * 1024)


def parked(session_id: bytes, accused: PeerId) -> tuple[FrameHeader, bytes]:
    payload = error_reply(PeerUnreachable("gone"), accused).encode()
    return FrameHeader(FrameType.PARKED, session=session_id), payload


@pytest.mark.parametrize("make", [step, parked])
@pytest.mark.parametrize("first_block", [0, 3])
def test_a_flood_between_two_texts(
    repaired_swarm: FaultSwarm,
    material: Material,
    make: Callable[[bytes, PeerId], tuple[FrameHeader, bytes]],
    first_block: int,
) -> None:
    """The client takes in a bounded number of frames, and goes on without this server, or without
    the pair if it says that another one is at fault: which of them lies, nobody can tell."""
    swarm = repaired_swarm
    whole = material.local.generate(material.prompt, **{**GREEDY, "max_new_tokens": 12})
    num_received = 0

    def tap(way: str, remote: PeerId, header: FrameHeader) -> None:
        nonlocal num_received
        num_received += (way, remote) == ("received", host.server.node.peer_id)

    with swarm.client() as model, model.inference_session(max_length=100):
        first = model.generate(material.prompt, **{**GREEDY, "max_new_tokens": 6})
        host = swarm.runs[first_block]
        (session,) = host.server.handler._sessions.values()
        accused = swarm.runs[3].server.node.peer_id
        frame = make(session.session_id, accused)

        async def flood() -> None:
            with contextlib.suppress(PlanetServeError):
                for _ in range(NUM_FRAMES):
                    await session._control.send(*frame)

        async def begin() -> None:
            swarm.spawn(flood())

        model.runtime.node.taps.append(tap)
        swarm.local.call(begin())
        before = -1
        while num_received > before:
            before = num_received
            time.sleep(0.5)
        # The last one has been read and is not in the inbox yet.
        assert num_received == MAX_UNREAD + 1
        second = model.generate(None, **{**GREEDY, "max_new_tokens": 6})
        assert model.chain is not None
        suspects = {host.server.node.peer_id}
        if make is parked and first_block == 0:
            suspects.add(accused)
        assert not suspects <= {hop.peer_id for hop in model.chain}
    assert torch.equal(torch.cat([first, second], dim=1), whole)
    assert swarm.leaked() == Held.nothing()
