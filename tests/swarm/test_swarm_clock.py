"""Clocks that are off: what a node goes by, and when it says that its own should be set."""

from __future__ import annotations

import logging
import math

import pytest
from swarm_helpers import StartNode, make_info

from planetserve.clock import SystemClock
from planetserve.errors import ConfigError
from planetserve.swarm.dht.swarm_clock import MAX_OFFSET_S, SwarmClock
from planetserve.swarm.directory import Directory
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode
from planetserve.testing.clock import ManualClock

MODEL = "tiny"


class Shifted(SystemClock):
    """This machine's clock, some seconds ahead."""

    def __init__(self, ahead_s: float):
        self.ahead_s = ahead_s

    def unix(self) -> float:
        return super().unix() + self.ahead_s


@pytest.mark.parametrize(
    ("offsets_s", "taken_s"),
    [
        ([], 0.0),
        ([2.9], 0.0),
        ([-2.9], 0.0),
        ([240.0], 240.0),
        ([-240.0], -240.0),
        ([0.1, 600.0], 0.0),
        ([-600.0, -0.1], 0.0),
        ([300.0, 301.0, -5e8], 300.0),
        ([300.0, 1e12, 301.0], 301.0),
        ([0.0, 0.1, 800.0, 900.0, 0.2], 0.0),
    ],
)
def test_what_most_initial_peers_say_counts(offsets_s: list[float], taken_s: float) -> None:
    clock = SwarmClock(ManualClock())
    clock.correct(offsets_s)
    assert clock.offset_s == taken_s
    assert clock.unix() == ManualClock().unix() + taken_s


@pytest.mark.parametrize(
    ("offset_s", "words"),
    [
        (MAX_OFFSET_S + 100, r"clock is 1,000 s behind the initial peers'; set it"),
        (-86_400.0, r"clock is 86,400 s ahead of the initial peers'; set it"),
        (math.inf, "behind"),
        (math.nan, "set it"),
    ],
)
def test_a_clock_that_is_far_off_is_to_be_set(offset_s: float, words: str) -> None:
    clock = SwarmClock(ManualClock())
    with pytest.raises(ConfigError, match=words):
        clock.correct([offset_s])
    assert clock.offset_s == 0.0


def test_a_correction_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = SwarmClock(ManualClock())
    for offset_s in (120.0, 120.4, 119.7):
        clock.correct([offset_s])
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "120 s behind" in record.getMessage()
    clock.correct([0.0])
    assert clock.offset_s == 0.0


@pytest.mark.parametrize("ahead_s", [-840.0, -4.0, 840.0])
async def test_nodes_whose_clocks_are_minutes_off_find_each_other(
    start_node: StartNode, ahead_s: float
) -> None:
    """Whichever of them it is: the server, the client or the peer that both join through."""
    for off in ("server", "client", "first"):
        clocks = {name: Shifted(ahead_s if name == off else 0.0) for name in
                  ("first", "server", "client")}  # fmt: skip
        first = await start_node(clock=clocks["first"])
        server = await start_node(first, clock=clocks["server"])
        client = await start_node(first, clock=clocks["client"], client_mode=True)
        announced = Directory(server, clocks["server"])
        for ttl_s in (30, 600):
            await announced.announce(make_info(server.identity), ttl_s)
            for node, clock in ((client, clocks["client"]), (first, clocks["first"])):
                (found,) = await Directory(node, clock).lookup(MODEL)
                assert found.peer_id == server.peer_id
        assert not first.records.rejected
        assert not client.records.rejected


async def test_a_node_far_off_is_told_so_when_it_starts(start_node: StartNode) -> None:
    first = await start_node()
    config = NodeConfig(client_mode=True, initial_peers=first.addresses())
    with pytest.raises(ConfigError, match="clock is 7,200 s ahead of the initial peers'; set it"):
        await SwarmNode.start(config, Shifted(7200.0))


async def test_nobody_lives_longer_by_a_clock_that_is_off(start_node: StartNode) -> None:
    """Records end by the swarm's time, which their owner's clock has no part in."""
    first, clock = await start_node(), Shifted(500.0)
    server = await start_node(first, clock=clock)
    await Directory(server, clock).announce(make_info(server.identity), ttl_s=600)
    kept = [found.expiration_time for found in first.dht.protocol.storage.data.values()]
    assert len(kept) == 2
    assert max(kept) <= first.clock.unix() + 600 + 3, "and what a ping takes"
