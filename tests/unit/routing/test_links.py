"""Links: the table of all pairs and the known pairs say the same, and what the snapshot says."""

from __future__ import annotations

import numpy as np
import pytest

from planetserve.routing import round_trips
from planetserve.routing.links import KnownLinks, Links, LinkTable
from planetserve.routing.optimizers import OPTIMIZERS
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.testing.brute_force import random_snapshot


def _snapshot(seed: int) -> SwarmSnapshot:
    """Some pairs are known, nearer ones and farther ones than the default."""
    rng = np.random.default_rng(seed)
    full = random_snapshot(rng, num_servers=12, num_blocks=10)
    some = {
        first: {second: ms for second, ms in row.items() if rng.random() < 0.4}
        for first, row in full.rtt_ms.items()
    }
    return SwarmSnapshot(
        full.num_blocks,
        full.activation_bytes_per_token,
        full.hop_overhead_ms,
        full.default_rtt_ms,
        full.servers,
        some,
    )


def _both(snapshot: SwarmSnapshot, members: np.ndarray, patch: pytest.MonkeyPatch) -> list[Links]:
    made = []
    for cells, full, kind in ((10**6, 0.2, LinkTable), (0, np.inf, KnownLinks)):
        patch.setattr(round_trips, "_MAX_CELLS", cells)
        patch.setattr(round_trips, "_FULL", full)
        made.append(snapshot.round_trips.links(members))
        assert isinstance(made[-1], kind)
    return made


@pytest.mark.parametrize("seed", range(5))
def test_both_kinds_say_what_the_snapshot_says(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = _snapshot(seed)
    members = np.array([0, 2, 3, 5, 6, 7, 9, 11])
    names = [snapshot.servers[i].id for i in members]
    truth = np.array([[snapshot.rtt(a, b) / 2 for b in names] for a in names])
    rng = np.random.default_rng(seed)
    everybody, to = np.arange(8), np.array([1, 2, 6])
    cost, scale = rng.uniform(0, 30, size=8), rng.uniform(1, 2, size=8)
    cost[[0, 4]] = np.inf
    through = (truth * scale[:, None] + cost)[to]
    through[np.arange(3), to] = np.inf
    for links in _both(snapshot, members, monkeypatch):
        np.testing.assert_array_equal(links.row(3), truth[3])
        np.testing.assert_array_equal(links.block(everybody, to), truth[:, to])
        np.testing.assert_array_equal(
            links.pairs(everybody[::-1], everybody), truth[::-1].diagonal()
        )
        # A server may or may not count as on the way to itself, for nothing.
        least = np.minimum(through.min(axis=1), cost[to])
        found = np.minimum(links.cheapest(cost, to, scale), cost[to])
        np.testing.assert_allclose(found, least)


def test_a_server_far_from_all_others_and_one_that_nobody_can_come_to() -> None:
    known = KnownLinks(3, np.array([0, 0]), np.array([1, 2]), np.array([90.0, 80.0]), 5.0)
    cost, everybody, alike = np.array([1.0, 2.0, np.inf]), np.arange(3), np.ones(3)
    np.testing.assert_array_equal(known.cheapest(cost, everybody, alike)[[0, 2]], [6.0, 7.0])
    nothing = np.full(3, np.inf)
    assert np.isinf(known.cheapest(nothing, everybody, alike)).all()


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_plans_the_same_on_both(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("nsga2", "latency_throughput_tradeoff"):
        pytest.importorskip("pymoo")
    snapshot = _snapshot(7)
    chains = []
    for cells, full in ((10**6, 0.2), (0, np.inf)):
        monkeypatch.setattr(round_trips, "_MAX_CELLS", cells)
        monkeypatch.setattr(round_trips, "_FULL", full)
        chains.append(OPTIMIZERS.create_from(name, seed=3).plan(snapshot, ChainRequest()))
    assert chains[0] == chains[1]


def test_a_large_swarm_keeps_no_table() -> None:
    servers = tuple(ServerPoint(f"s{i}", 0, 2, 1.0, 1e3, 1e7, 100) for i in range(2500))
    near = {"client": {"s7": 1.0}, "s7": {"s8": 1.0}}
    snapshot = SwarmSnapshot(2, 0.0, 0.0, 50.0, servers, near)
    links = snapshot.round_trips.links(np.arange(2500))
    assert isinstance(links, KnownLinks)
    assert links.row(7)[8] == links.row(8)[7] == 0.5
    chain = OPTIMIZERS.create("shortest_path").plan(snapshot, ChainRequest())
    assert [hop.peer_id for hop in chain] == ["s7"]
