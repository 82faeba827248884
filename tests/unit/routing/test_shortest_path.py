"""The shortest path is the shortest of all chains, on swarms small enough to list them all."""

from __future__ import annotations

import numpy as np
import pytest

from planetserve.errors import ConfigError
from planetserve.routing.cost import check_chain
from planetserve.routing.optimizers.shortest_path import ShortestPath
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.testing.brute_force import all_chains, random_snapshot


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
def test_equals_brute_force(scale: float) -> None:
    rng = np.random.default_rng(int(scale * 100))
    for _ in range(170):
        num_servers, num_blocks = int(rng.integers(1, 7)), int(rng.integers(1, 9))
        snapshot = random_snapshot(rng, num_servers, num_blocks, scale)
        chain = ShortestPath().plan(snapshot, ChainRequest())
        _, latency, throughput = all_chains(snapshot)
        best = int(latency.argmin())
        check_chain(snapshot, chain)
        assert chain.latency_ms == pytest.approx(latency[best], rel=1e-12)
        assert chain.throughput_tokens_per_s == pytest.approx(throughput[best], rel=1e-12)


def test_leaves_a_server_and_comes_back() -> None:
    snapshot = SwarmSnapshot(
        num_blocks=6,
        activation_bytes_per_token=0,
        hop_overhead_ms=0.0,
        default_rtt_ms=1.0,
        servers=(
            ServerPoint("base", 0, 6, 5.0, 1e3, 1e6, 10),
            ServerPoint("quick", 2, 4, 0.1, 1e3, 1e6, 10),
        ),
    )
    chain = ShortestPath().plan(snapshot, ChainRequest())
    assert [(hop.peer_id, hop.start, hop.end) for hop in chain] == [
        ("base", 0, 2),
        ("quick", 2, 4),
        ("base", 4, 6),
    ]


def test_a_detour_is_taken_when_it_beats_the_direct_link() -> None:
    # a -> c directly costs 200 ms; through b, which holds the same blocks as c, it costs 2 + 2
    snapshot = SwarmSnapshot(
        num_blocks=3,
        activation_bytes_per_token=0,
        hop_overhead_ms=0.0,
        default_rtt_ms=1.0,
        servers=(
            ServerPoint("a", 0, 1, 1.0, 1e3, 1e6, 10),
            ServerPoint("b", 1, 2, 9.0, 1e3, 1e6, 10),
            ServerPoint("c", 1, 3, 1.0, 1e3, 1e6, 10),
        ),
        rtt_ms={"a": {"b": 4.0, "c": 400.0}, "b": {"c": 4.0}},
    )
    chain = ShortestPath().plan(snapshot, ChainRequest())
    assert [hop.peer_id for hop in chain] == ["a", "b", "c"]


def test_same_snapshot_same_chain() -> None:
    snapshot = random_snapshot(np.random.default_rng(4), num_servers=40, num_blocks=24)
    chains = {ShortestPath().plan(snapshot, ChainRequest()) for _ in range(3)}
    assert len(chains) == 1


def test_cost_jitter_gives_different_chains_within_its_bound() -> None:
    snapshot = random_snapshot(np.random.default_rng(3), num_servers=60, num_blocks=24, scale=0.05)
    best = ShortestPath().plan(snapshot, ChainRequest()).latency_ms
    chains = [
        ShortestPath(cost_jitter=0.2, seed=s).plan(snapshot, ChainRequest()) for s in range(40)
    ]
    assert len({chain.hops for chain in chains}) > 5
    for chain in chains:
        check_chain(snapshot, chain)
        assert best <= chain.latency_ms <= best * 1.2


def test_a_preference_outlives_others_coming_and_going() -> None:
    servers = [ServerPoint(f"s{n}", 0, 4, 1.0, 1e3, 1e8, 1000) for n in range(20)]
    moved = 0
    for seed in range(20):
        optimizer = ShortestPath(cost_jitter=0.2, seed=seed)
        (chosen,) = optimizer.plan(of_equals(servers), ChainRequest()).hops
        left = [server for server in servers if server.id != f"s{seed}"]
        (again,) = optimizer.plan(of_equals(left), ChainRequest()).hops
        moved += again != chosen
        assert again == chosen or chosen.peer_id == f"s{seed}"
    assert moved < 5


def of_equals(servers: list[ServerPoint]) -> SwarmSnapshot:
    return SwarmSnapshot(4, 1024.0, 1.0, 10.0, tuple(servers))


def test_cost_jitter_must_be_a_fraction() -> None:
    with pytest.raises(ConfigError, match="cost_jitter"):
        ShortestPath(cost_jitter=1.5)


def with_prior(weight: float, **waits_ms: float) -> tuple[str, float]:
    """The server chosen for all blocks, and what the snapshot says of its chain."""
    blocks_ms = {"busy": 10.0, "idle": 12.0, "crowded": 40.0}
    snapshot = SwarmSnapshot(
        num_blocks=4,
        activation_bytes_per_token=0,
        hop_overhead_ms=0.0,
        default_rtt_ms=0.0,
        servers=tuple(
            ServerPoint(name, 0, 4, ms, 1e3, 1e6, 10, wait_ms=waits_ms.get(name, 0.0))
            for name, ms in blocks_ms.items()
        ),
    )
    chain = ShortestPath(load_prior=weight).plan(snapshot, ChainRequest())
    return chain.hops[0].peer_id, chain.latency_ms


def test_a_load_prior_of_half_counts_half_of_a_load_in_a_crowd() -> None:
    assert with_prior(0.0, busy=20.0, crowded=160.0) == ("idle", 48.0)
    # expected 40 + 10 + 20 and 48 + 24
    assert with_prior(0.5, busy=20.0, crowded=200.0) == ("busy", 60.0)
    # expected 40 + 15 + 20 and 48 + 24
    assert with_prior(0.5, busy=30.0, crowded=200.0) == ("idle", 48.0)


def test_the_load_prior_shrinks_with_the_crowd() -> None:
    # A quarter of it is left: expected 40 + 8.75 + 5 and 48 + 6.
    assert with_prior(0.5, busy=10.0) == ("busy", 50.0)
    assert with_prior(0.5, busy=11.0) == ("idle", 48.0)


def test_an_idle_swarm_gets_no_load_prior() -> None:
    """A server is not avoided for what it could do besides, and the chain is the optimum."""
    large = ServerPoint("large", 0, 40, 10.0, 1e3, 1e6, 10)
    head = ServerPoint("head", 0, 20, 9.0, 1e3, 1e6, 10)
    snapshot = SwarmSnapshot(40, 0.0, 0.0, 0.0, (large, head))
    hops = ShortestPath(load_prior=1.0).plan(snapshot, ChainRequest()).hops
    assert [hop.peer_id for hop in hops] == ["head", "large"]
