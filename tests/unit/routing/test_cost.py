"""Latency, throughput and validity of a chain, against hand-computed numbers and enumeration."""

from __future__ import annotations

import numpy as np
import pytest

from planetserve.errors import ConfigError
from planetserve.routing.cost import check_chain, latency_ms, throughput_tokens_per_s
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.testing.brute_force import all_chains, random_snapshot
from planetserve.types import Chain, Hop

SNAPSHOT = SwarmSnapshot(
    num_blocks=8,
    activation_bytes_per_token=1000,
    hop_overhead_ms=3.0,
    default_rtt_ms=100.0,
    servers=(
        ServerPoint("a", 0, 8, 1.0, 800.0, 1e6, 100),
        ServerPoint("b", 2, 6, 2.0, 400.0, 1e5, 100),
    ),
    rtt_ms={"client": {"a": 10.0}, "b": {"a": 4.0}},
)
REVISIT = Chain((Hop("a", 0, 2), Hop("b", 2, 4), Hop("a", 4, 8)))


def test_latency_by_hand() -> None:
    # links 5 + 2 + 2 + 5, three hops of 3, blocks 2x1 + 2x2 + 4x1, sending 1 + 10 + 1
    assert latency_ms(SNAPSHOT, REVISIT) == pytest.approx(14 + 9 + 10 + 12)


def test_throughput_counts_all_visits_of_a_server() -> None:
    # a: 800 / 6 blocks and 1e6 / (1000 x 2 hops) = 500; b: 400 / 2 and 1e5 / 1000 = 100
    assert throughput_tokens_per_s(SNAPSHOT, REVISIT) == pytest.approx(100.0)
    assert throughput_tokens_per_s(SNAPSHOT, Chain((Hop("a", 0, 8),))) == pytest.approx(100.0)


def test_throughput_without_activations_is_compute_alone() -> None:
    silent = SwarmSnapshot(8, 0, 3.0, 100.0, SNAPSHOT.servers)
    assert throughput_tokens_per_s(silent, REVISIT) == pytest.approx(800 / 6)


def test_agrees_with_enumeration() -> None:
    rng = np.random.default_rng(3)
    snapshot = random_snapshot(rng, num_servers=4, num_blocks=5, scale=0.1)
    problem = RoutingProblem.build(snapshot, ChainRequest())
    hosts, latency, throughput = all_chains(snapshot)
    for row in rng.choice(len(hosts), size=min(200, len(hosts)), replace=False):
        chain = problem.chain(hosts[row].tolist())
        check_chain(snapshot, chain)
        assert chain.latency_ms == pytest.approx(latency[row])
        assert chain.throughput_tokens_per_s == pytest.approx(throughput[row])


@pytest.mark.parametrize(
    ("hops", "says"),
    [
        ((), "ends at block 0"),
        ((Hop("a", 0, 4),), "ends at block 4 of 8"),
        ((Hop("a", 1, 8),), "must start at 0"),
        ((Hop("a", 0, 3), Hop("b", 4, 6), Hop("a", 6, 8)), "hop 2 is 4:6"),
        ((Hop("a", 0, 2), Hop("b", 2, 7), Hop("a", 7, 8)), "outside 2:6"),
        ((Hop("a", 0, 2), Hop("a", 2, 8)), "one hop"),
        ((Hop("a", 0, 2), Hop("x", 2, 8)), "'x' is no server"),
        ((Hop("client", 0, 8),), "'client' is no server"),
        ((Hop("a", 0, 2), Hop("b", 2, 2), Hop("a", 2, 8)), "must start at 2"),
    ],
)
def test_refuses_what_is_no_chain(hops: tuple[Hop, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_chain(SNAPSHOT, Chain(hops))
