"""Every optimiser by name: legal chains, exact prices, and the exact front against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from planetserve.errors import MissingBlocksError, NoChainAvailable
from planetserve.routing.cost import check_chain, latency_ms, throughput_tokens_per_s
from planetserve.routing.exact import gap_of, sweep
from planetserve.routing.optimizers import OPTIMIZERS
from planetserve.routing.optimizers.nsga2 import Nsga2
from planetserve.routing.optimizers.pareto_exact import ParetoExact
from planetserve.routing.optimizers.shortest_path import ShortestPath
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.testing.brute_force import all_chains, random_snapshot
from planetserve.types import BlockSpan, Chain


def _front(latency: np.ndarray, throughput: np.ndarray) -> list[tuple[float, float]]:
    """The points that no chain beats in both, fastest first."""
    found: list[tuple[float, float]] = []
    for index in np.lexsort((-throughput, latency)):
        if not found or throughput[index] > found[-1][1] * (1 + 1e-12):
            found.append((float(latency[index]), float(throughput[index])))
    return found


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
def test_exact_front_equals_brute_force(scale: float) -> None:
    rng = np.random.default_rng(int(scale * 1000))
    for _ in range(60):
        snapshot = random_snapshot(rng, int(rng.integers(1, 7)), int(rng.integers(1, 9)), scale)
        _, latency, throughput = all_chains(snapshot)
        chains = ParetoExact().front(snapshot, ChainRequest())
        for chain in chains:
            check_chain(snapshot, chain)
        got = [(chain.latency_ms, chain.throughput_tokens_per_s) for chain in chains]
        expected = _front(latency, throughput)
        assert len(got) == len(expected)
        np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_exact_front_where_trust_cuts_spans_in_two() -> None:
    rng = np.random.default_rng(77)
    for _ in range(30):
        snapshot = random_snapshot(rng, int(rng.integers(3, 7)), 8, 0.1)
        middle = int(rng.integers(1, 7))
        trusted = frozenset(s.id for s in snapshot.servers if rng.random() < 0.5) | {"s0"}
        request = ChainRequest(trusted={BlockSpan(middle, middle + 1): trusted})
        hosts, latency, throughput = all_chains(snapshot)
        legal = np.array([snapshot.servers[i].id in trusted for i in hosts[:, middle]])
        chains = ParetoExact().front(snapshot, request)
        got = [(chain.latency_ms, chain.throughput_tokens_per_s) for chain in chains]
        np.testing.assert_allclose(got, _front(latency[legal], throughput[legal]), rtol=1e-9)


def test_a_sweep_ends_with_its_time() -> None:
    snapshot = random_snapshot(np.random.default_rng(78), 40, 60)
    problem = RoutingProblem.build(snapshot, ChainRequest())
    swept = sweep(problem, 10**12, time_limit_s=0.0)
    best = ShortestPath().plan(snapshot, ChainRequest())
    assert not swept.complete
    assert swept.chains[0].latency_ms == pytest.approx(best.latency_ms)


def test_a_bound_proves_nothing_about_chains_slower_than_its_floor() -> None:
    chain = Chain((), latency_ms=10.0, throughput_tokens_per_s=100.0)
    above = 100.0 * (1 + 1e-9)
    assert gap_of(chain, [(50.0, 8.0), (above, math.inf)]) == pytest.approx(0.2)
    assert gap_of(chain, [(50.0, 8.0), (100.0, 10.0), (above, math.inf)]) == 0.0
    assert gap_of(chain, []) == 1.0


@pytest.mark.parametrize("effort", [0, 1, 3000])
def test_little_effort_still_gives_a_front(effort: int) -> None:
    rng = np.random.default_rng(21)
    for _ in range(6):
        snapshot = random_snapshot(rng, 12, 14, 0.1)
        truth = ParetoExact(30_000_000).solve(snapshot, ChainRequest())
        assert truth.exact
        found = ParetoExact(effort).solve(snapshot, ChainRequest())
        assert found.chains[0].latency_ms == pytest.approx(truth.chains[0].latency_ms)
        for chain, gap in zip(found.chains, found.gaps, strict=True):
            least_ms = min(
                c.latency_ms
                for c in truth.chains
                if c.throughput_tokens_per_s >= chain.throughput_tokens_per_s * (1 - 1e-12)
            )
            assert least_ms >= chain.latency_ms * (1 - gap) * (1 - 1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_chain_is_legal_and_priced_right(name: str) -> None:
    rng = np.random.default_rng(5)
    optimizer = OPTIMIZERS.create(name)
    for _ in range(4):
        snapshot = random_snapshot(rng, 6, 7)
        chain = optimizer.plan(snapshot, ChainRequest())
        check_chain(snapshot, chain)
        assert chain.latency_ms == pytest.approx(latency_ms(snapshot, chain), rel=1e-12)
        assert chain.throughput_tokens_per_s == pytest.approx(
            throughput_tokens_per_s(snapshot, chain), rel=1e-12
        )
        _, latency, _ = all_chains(snapshot)
        assert chain.latency_ms >= latency.min() * (1 - 1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_filters_and_gaps(name: str) -> None:
    servers = (
        ServerPoint("a", 0, 4, 1.0, 1e3, 1e7, 100, reputation=0.9),
        ServerPoint("b", 2, 6, 1.0, 1e3, 1e7, 1000, reputation=0.9),
        ServerPoint("c", 0, 6, 9.0, 1e3, 1e7, 1000, reputation=0.1),
    )
    snapshot = SwarmSnapshot(
        num_blocks=6,
        activation_bytes_per_token=4096,
        hop_overhead_ms=1.0,
        default_rtt_ms=10.0,
        servers=servers,
    )
    optimizer = OPTIMIZERS.create(name)
    trusted = optimizer.plan(snapshot, ChainRequest(min_reputation=0.5))
    assert {hop.peer_id for hop in trusted} == {"a", "b"}
    roomy = optimizer.plan(snapshot, ChainRequest(tokens=500))
    assert "a" not in {hop.peer_id for hop in roomy}
    with pytest.raises(NoChainAvailable):
        optimizer.plan(snapshot, ChainRequest(tokens=5000))
    with pytest.raises(MissingBlocksError) as caught:
        optimizer.plan(snapshot, ChainRequest(blocked=frozenset("c"), min_reputation=0.95))
    assert caught.value.missing == ((0, 6),)
    with pytest.raises(MissingBlocksError) as caught:
        optimizer.plan(snapshot, ChainRequest(blocked=frozenset({"b", "c"})))
    assert caught.value.missing == ((4, 6),)


def test_nsga2_is_seeded_and_near_the_exact_front() -> None:
    rng = np.random.default_rng(9)
    snapshot = random_snapshot(rng, 20, 16)
    exact = ParetoExact().front(snapshot, ChainRequest())
    optimizer = Nsga2(seed=1, population=30, generations=10, time_limit_s=0)
    found = optimizer.front(snapshot, ChainRequest())
    assert found == optimizer.front(snapshot, ChainRequest())
    worst_ms = 1.1 * max(chain.latency_ms for chain in exact)
    assert _area(found, worst_ms) >= 0.99 * _area(exact, worst_ms)


def test_nsga2_with_four_objectives_is_never_beaten_by_greedy() -> None:
    rng = np.random.default_rng(10)
    for _ in range(3):
        snapshot = random_snapshot(rng, 12, 10)
        greedy = OPTIMIZERS.create("greedy").plan(snapshot, ChainRequest())
        front = Nsga2(objectives=4).front(snapshot, ChainRequest())
        assert any(
            chain.latency_ms <= greedy.latency_ms * (1 + 1e-12)
            or chain.throughput_tokens_per_s > greedy.throughput_tokens_per_s
            for chain in front
        )


def _area(chains: tuple[Chain, ...], worst_ms: float) -> float:
    """Hypervolume between the chains and (worst latency, no throughput)."""
    area, reached = 0.0, 0.0
    for chain in sorted(chains, key=lambda chain: chain.latency_ms):
        gained = max(0.0, chain.throughput_tokens_per_s - reached)
        area += gained * max(0.0, worst_ms - chain.latency_ms)
        reached += gained
    return area
