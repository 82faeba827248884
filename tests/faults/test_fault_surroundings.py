"""What goes wrong around the servers of a text: impostors, the bootstrap peer, clocks, everybody.

Faults F10, F18 and F23 of the matrix in `docs/development.md`.
"""

from __future__ import annotations

import time
from typing import Any

import psutil
import pytest
import torch
from fault_kinds import killed, stopped
from fault_swarm import FaultSwarm, Held, Host, Moment, daemon_pid
from faulted_texts import GREEDY, Material

from planetserve.clock import SystemClock
from planetserve.config import ServerConfig
from planetserve.crypto.identity import Identity
from planetserve.errors import NoChainAvailable, PeerUnreachable, TransportError
from planetserve.server.server import Server
from planetserve.testing.swarm import LOOPBACK
from planetserve.types import BlockSpan

SPANS = ("0:3", "3:6", "3:6")


@pytest.fixture
def swarm(repaired_swarm: FaultSwarm) -> FaultSwarm:
    return repaired_swarm


@pytest.fixture
def expected(material: Material) -> torch.Tensor:
    tokens: torch.Tensor = material.local.generate(material.prompt, **GREEDY)
    return tokens


def lies_about_its_key(swarm: FaultSwarm, host: Host) -> None:
    """It runs under the peer id of another: it cannot sign for it."""
    node, right = host.server.node, host.server.node.identity
    node.identity = Identity.generate()
    swarm.on_restore(lambda: setattr(node, "identity", right))


def is_not_at_its_address(swarm: FaultSwarm, host: Host) -> None:
    """Another peer answers where its record says that it is."""
    link, other = host.link, swarm.hosts[0].link
    assert link is not None
    assert other is not None
    link.lead_to(other.port)
    swarm.local.call(link.reset())


@pytest.mark.parametrize("lie", [lies_about_its_key, is_not_at_its_address])
@pytest.mark.parametrize("which", [1, 2])
def test_an_impostor_is_not_used(
    swarm: FaultSwarm, material: Material, expected: torch.Tensor, lie: Any, which: int
) -> None:
    """F10: neither for a new text nor as a replacement; the true server of the name is."""
    impostor = swarm.hosts[which]
    lie(swarm, impostor)
    with swarm.client() as model:
        assert torch.equal(model.generate(material.prompt, **GREEDY), expected)
        honest = swarm.hosts[3 - which].server.node.peer_id
        assert model.chain.hops[-1].peer_id == honest
        assert swarm.leaked() == Held.nothing()


def test_no_text_needs_the_bootstrap_peer(
    swarm: FaultSwarm, material: Material, expected: torch.Tensor
) -> None:
    """F18: neither a text that is being written, its recovery included, nor a new client."""
    bootstrap = swarm.local._bootstrap

    def strike(swarm: FaultSwarm, host: Host) -> None:
        daemon = psutil.Process(daemon_pid(bootstrap))
        daemon.suspend()
        swarm.on_restore(daemon.resume)
        killed(swarm, host)

    with swarm.client() as model:
        fault = swarm.strike_at(Moment(3, 3), strike)
        assert torch.equal(model.generate(material.prompt, **GREEDY), expected)
        assert fault.struck_s is not None
    others = [address for host in swarm.hosts[:1] for address in host.server.node.addresses()]
    with swarm.client(initial_peers=others) as model:
        assert torch.equal(model.generate(material.prompt, **GREEDY), expected)
    with pytest.raises(PeerUnreachable), swarm.client():
        pass


def test_when_all_servers_of_a_block_are_gone_the_error_says_so(
    swarm: FaultSwarm, material: Material, expected: torch.Tensor
) -> None:
    def strike(swarm: FaultSwarm, host: Host) -> None:
        for other in swarm.hosts:
            if other.span == host.span:
                killed(swarm, other)

    with swarm.client(wait_for_blocks_timeout=1.0) as model:
        swarm.strike_at(Moment(3, 3), strike)
        with pytest.raises(NoChainAvailable, match="blocks 3:6"):
            model.generate(material.prompt, **GREEDY)
        assert swarm.leaked() == Held.nothing()
        swarm.repair()
        assert torch.equal(model.generate(material.prompt, **GREEDY), expected)


def test_a_server_that_reaches_nobody_ends_all_the_same(
    swarm: FaultSwarm, material: Material, expected: torch.Tensor
) -> None:
    """Asked to leave, it cannot say so in the directory; its session goes on elsewhere."""
    with swarm.client() as model, model.inference_session(max_length=99):
        first = model.generate(material.prompt, **{**GREEDY, "max_new_tokens": 4})
        host = swarm.runs[3]
        stopped(swarm, host)
        swarm.local.call(host.server.close(drain_timeout_s=0.5))
        assert host.server.engine._worker._thread is None
        rest = model.generate(None, **{**GREEDY, "max_new_tokens": 10})
    assert torch.equal(torch.cat([first, rest], dim=1), expected)
    assert swarm.leaked() == Held.nothing()


class SkewedClock(SystemClock):
    """A machine whose clock is wrong by so many seconds, from a moment on or always."""

    def __init__(self, skew_s: float):
        self.skew_s = skew_s

    def unix(self) -> float:
        return time.time() + self.skew_s


def start_skewed(swarm: FaultSwarm, clock: SkewedClock) -> Server:
    config = ServerConfig(
        model=swarm.model, initial_peers=swarm.local.initial_peers, block_indices=BlockSpan(0, 6),
        host_maddrs=LOOPBACK, torch_dtype="float32", num_threads=1, dht_prefix="skewed",
    )  # fmt: skip
    return swarm.local.call(Server.start(config, clock))


@pytest.mark.parametrize("skew_s", [5.0, -5.0])
def test_a_clock_that_is_a_little_wrong_is_good_enough(
    swarm: FaultSwarm, material: Material, expected: torch.Tensor, skew_s: float
) -> None:
    """F23; and a session outlives a clock that jumps back an hour in its middle."""
    clock = SkewedClock(skew_s)
    server = start_skewed(swarm, clock)
    try:
        with swarm.client(dht_prefix="skewed") as model, model.inference_session(max_length=99):
            first = model.generate(material.prompt, **{**GREEDY, "max_new_tokens": 4})
            clock.skew_s = -3600.0
            rest = model.generate(None, **{**GREEDY, "max_new_tokens": 10})
            assert torch.equal(torch.cat([first, rest], dim=1), expected)
            assert server.engine.stats().num_sessions == 1
    finally:
        swarm.local.call(server.close())


@pytest.mark.parametrize("skew_s", [300.0, -300.0])
def test_a_clock_that_is_very_wrong_is_an_error(swarm: FaultSwarm, skew_s: float) -> None:
    """F23: nobody would believe or find its records."""
    with pytest.raises(TransportError, match="clock"):
        start_skewed(swarm, SkewedClock(skew_s))
