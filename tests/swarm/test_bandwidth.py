"""The rate of a link from waits in sending to it; what buffers take at first counts for nothing."""

from __future__ import annotations

import asyncio

import pytest
from swarm_helpers import LOOPBACK, StartNode

from planetserve.swarm.bandwidth import BandwidthMeter
from planetserve.swarm.libp2p.streams import FrameStream
from planetserve.testing.proxy import Link, LinkProxy
from planetserve.wire.frame import FrameHeader, FrameType

MIB = 2**20


def waited(meter: BandwidthMeter, sent_bytes: int, began_s: float, ended_s: float) -> float | None:
    """A wait after so many bytes in all."""
    meter.sent(sent_bytes - meter._sent_bytes)
    return meter.waited(began_s, ended_s)


def test_bytes_between_two_waits_count_and_those_before_the_first_do_not() -> None:
    meter = BandwidthMeter()
    meter.begin(0.0)
    assert waited(meter, 50 * MIB, 0.1, 0.3) is None
    assert waited(meter, 51 * MIB, 0.6, 0.7) == pytest.approx(2 * MIB)
    assert waited(meter, 54 * MIB, 0.9, 1.0) == pytest.approx(10 * MIB)


def test_short_waits_and_few_bytes_say_nothing() -> None:
    meter = BandwidthMeter()
    meter.begin(0.0)
    assert waited(meter, 1 * MIB, 0.1, 0.2) is None
    assert waited(meter, 9 * MIB, 0.300, 0.301) is None
    assert waited(meter, 1 * MIB + 1000, 0.5, 0.6) is None


def test_a_pause_of_the_sender_ends_a_measurement() -> None:
    meter = BandwidthMeter()
    meter.begin(0.0)
    assert waited(meter, 1 * MIB, 0.1, 0.2) is None
    meter.end(0.3)
    meter.begin(0.31)
    assert waited(meter, 2 * MIB, 0.6, 0.7) == pytest.approx(2 * MIB)
    meter.end(0.8)
    meter.begin(9.0)
    assert waited(meter, 4 * MIB, 9.1, 9.2) is None


async def test_a_node_learns_the_rate_of_a_slow_link(start_node: StartNode) -> None:
    near = await start_node()
    far = await start_node(join=near, host_maddrs=LOOPBACK)
    port = int(far.addresses()[0].split("/")[4])
    received = asyncio.Event()

    async def take(stream: FrameStream) -> None:
        for _ in range(3):
            await stream.receive()
        received.set()

    await far.serve_streams("sink", take)
    sender = await start_node(client_mode=True)
    async with await LinkProxy.start(("127.0.0.1", port), Link(0.005, 4e6)) as proxy:
        place = f"/ip4/127.0.0.1/tcp/{proxy.address[1]}/p2p/{far.peer_id}"
        stream = await sender.open_stream(far.peer_id, [place], "sink", 5.0)
        for _ in range(3):
            await stream.send(FrameHeader(FrameType.STEP), bytes(1 * MIB))
        await received.wait()
        assert set(sender.send_rates.snapshot()) == {far.peer_id}
        assert 1e6 < sender.send_rates.snapshot()[far.peer_id] < 16e6
        await stream.close()
