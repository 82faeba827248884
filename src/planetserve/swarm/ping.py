"""Round-trip times: measuring one, answering others' pings, remembering a bounded number.

A ping travels the same path as activations (a frame on a stream), so it includes both daemons. It
says how far a peer is, not how busy its engine is.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from planetserve.clock import Clock
from planetserve.errors import HopTimeout, RemoteProtocolError
from planetserve.swarm.node import SwarmNode
from planetserve.swarm.streams import FrameStream, open_stream, serve_streams
from planetserve.types import PeerId
from planetserve.wire.frame import FrameHeader, FrameType

PROTOCOL = "/planetserve/ping/1"

_NUM_SAMPLES = 3
_MAX_PINGS_PER_STREAM = 64
_IDLE_TIMEOUT_S = 30.0
_NEWEST_WEIGHT = 0.3


async def ping(
    node: SwarmNode, peer_id: PeerId, addresses: Sequence[str], timeout_s: float
) -> float:
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
    stream = await open_stream(node, peer_id, addresses, PROTOCOL, timeout_s)
    try:
        async with asyncio.timeout_at(deadline):
            samples = [await _round_trip(stream, number) for number in range(_NUM_SAMPLES + 1)]
    except TimeoutError:
        raise HopTimeout(f"{peer_id} did not answer a ping in {timeout_s:g} s") from None
    finally:
        stream.abort()
    return statistics.median(samples[1:])


async def serve_ping(node: SwarmNode) -> None:
    """Answer pings until the node closes.

    Raises:
        TransportError: the daemon does not answer.
    """
    await serve_streams(node, PROTOCOL, _answer)


async def _round_trip(stream: FrameStream, number: int) -> float:
    loop = asyncio.get_running_loop()
    nonce = os.urandom(16)
    started = loop.time()
    await stream.send(FrameHeader(FrameType.PING, session=nonce, sequence=number))
    header, _ = await stream.receive()
    if header.type is not FrameType.PONG or header.session != nonce:
        raise RemoteProtocolError(f"{header.type.name} frame in answer to a ping")
    return 1000 * (loop.time() - started)


async def _answer(stream: FrameStream) -> None:
    for _ in range(_MAX_PINGS_PER_STREAM):
        header, payload = await stream.receive(_IDLE_TIMEOUT_S)
        if header.type is not FrameType.PING or payload:
            raise RemoteProtocolError(f"{header.type.name} frame on a ping stream")
        pong = FrameHeader(FrameType.PONG, session=header.session, sequence=header.sequence)
        await stream.send(pong)


@dataclass(slots=True)
class _Average:
    rtt_ms: float
    measured_at: float


class RttTable:
    """Moving averages of round-trip times, of the peers measured last.

    Args:
        max_peers: how many to remember; the one measured longest ago is forgotten first.
        clock: source of monotonic time.
        max_age_s: a measurement older than this is no longer given.
    """

    def __init__(self, max_peers: int, clock: Clock, max_age_s: float = 600.0):
        self._max_peers = max_peers
        self._clock = clock
        self._max_age_s = max_age_s
        self._averages: OrderedDict[PeerId, _Average] = OrderedDict()

    def add(self, peer_id: PeerId, rtt_ms: float) -> None:
        """Count in one measurement."""
        now = self._clock.monotonic()
        known = self.get_ms(peer_id)
        if known is not None:
            rtt_ms = _NEWEST_WEIGHT * rtt_ms + (1 - _NEWEST_WEIGHT) * known
        self._averages[peer_id] = _Average(rtt_ms, now)
        self._averages.move_to_end(peer_id)
        if len(self._averages) > self._max_peers:
            self._averages.popitem(last=False)

    def get_ms(self, peer_id: PeerId) -> float | None:
        """The peer's average round-trip time; None if it is unknown or too old."""
        known = self._averages.get(peer_id)
        if known is None or self._clock.monotonic() - known.measured_at > self._max_age_s:
            return None
        return known.rtt_ms

    def snapshot(self) -> dict[PeerId, float]:
        """All averages that are not too old."""
        known = ((peer_id, self.get_ms(peer_id)) for peer_id in self._averages)
        return {peer_id: rtt_ms for peer_id, rtt_ms in known if rtt_ms is not None}
