"""Round-trip times: whom to ping, measuring one, and answering others' pings.

A ping travels the same path as activations (a frame on a stream), so it includes both daemons. It
says how far a peer is, not how busy its engine is.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
from collections.abc import Sequence

from planetserve.errors import HopTimeout, RemoteProtocolError
from planetserve.swarm.ewma import PeerEwma
from planetserve.swarm.network import Network, Stream
from planetserve.types import PeerId
from planetserve.wire.frame import FrameHeader, FrameType

PROTOCOL = "/planetserve/ping/1"

_NUM_SAMPLES = 3
_MAX_PINGS_PER_STREAM = 64
_IDLE_TIMEOUT_S = 5.0


async def ping(node: Network, peer_id: PeerId, addresses: Sequence[str], timeout_s: float) -> float:
    """Round-trip time to a peer in milliseconds: the median of three after a warm-up.

    Args:
        node: the running node.
        peer_id: whom to ping.
        addresses: where to dial it, if there is no connection yet.
        timeout_s: for connecting and all samples together.

    Raises:
        PeerUnreachable: no connection, or the peer answers no pings.
        HopTimeout: connected, but no answer in time.
        StreamClosed: the peer closed the stream.
        RemoteProtocolError: it answered something else.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    stream = await node.open_stream(peer_id, addresses, PROTOCOL, timeout_s)
    try:
        async with asyncio.timeout_at(deadline):
            samples = [await _round_trip(stream, number) for number in range(_NUM_SAMPLES + 1)]
    except TimeoutError:
        raise HopTimeout(f"{peer_id} did not answer a ping in {timeout_s:g} s") from None
    finally:
        stream.abort()
    return statistics.median(samples[1:])


def whom_to_ping(
    candidates: Sequence[PeerId], rtt: PeerEwma, *, most: int, keep: int, rng: random.Random
) -> list[PeerId]:
    """At most `most` of `candidates`: all of a few; of many, some unknown ones, drawn by lot, and
    of the `keep` nearest known ones those that were measured longest ago.

    So the nearest stay fresh while the search among the others goes on.
    """
    distance = rtt.snapshot()
    unknown = [peer_id for peer_id in candidates if peer_id not in distance]
    known = [peer_id for peer_id in candidates if peer_id in distance]
    nearest = sorted(known, key=lambda peer_id: distance[peer_id])[:keep]
    nearest.sort(key=rtt.age_s, reverse=True)
    rng.shuffle(unknown)
    chosen = unknown[: max(-(-most // 2), most - len(nearest))]
    return chosen + nearest[: most - len(chosen)]


async def serve_ping(node: Network) -> None:
    """Answer pings until the node closes.

    Raises:
        TransportError: the daemon does not answer.
    """
    await node.serve_streams(PROTOCOL, _answer)


async def _round_trip(stream: Stream, number: int) -> float:
    loop = asyncio.get_running_loop()
    nonce = os.urandom(16)
    started = loop.time()
    await stream.send(FrameHeader(FrameType.PING, session=nonce, sequence=number))
    header = await _receive_empty(stream, FrameType.PONG)
    if header.session != nonce:
        raise RemoteProtocolError("a pong for another ping")
    return 1000 * (loop.time() - started)


async def _answer(stream: Stream) -> None:
    for _ in range(_MAX_PINGS_PER_STREAM):
        header = await _receive_empty(stream, FrameType.PING, _IDLE_TIMEOUT_S)
        pong = FrameHeader(FrameType.PONG, session=header.session, sequence=header.sequence)
        await stream.send(pong)


async def _receive_empty(
    stream: Stream, kind: FrameType, timeout_s: float | None = None
) -> FrameHeader:
    """The next frame, which must be a `kind` without a payload: nothing else is read."""
    header = await stream.peek(timeout_s)
    if header.type is not kind or header.payload_bytes:
        raise RemoteProtocolError(f"{header.type.name} frame on a ping stream")
    await stream.receive()
    return header
