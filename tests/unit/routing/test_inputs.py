"""Every optimiser looks at every input of its plan, however round-trip times are given.

Blocks 0 to 3 are held by `b` and `c`, 4 to 7 by `d` and `e`; `b` and `d` are a little faster. One
input changes, and whoever reads it takes another server.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from planetserve.errors import ConfigError
from planetserve.routing.optimizers import OPTIMIZERS, ChainOptimizer
from planetserve.routing.request import ChainRequest
from planetserve.routing.round_trips import RttMatrix
from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.testing.brute_force import random_snapshot
from planetserve.types import CLIENT, Chain

PETALS = {"petals_min_latency"}
BLIND = {"petals_max_throughput", "random"}
EVERY = [name for name in OPTIMIZERS.names() if name not in BLIND]
EVOLVE = ("nsga2", "latency_throughput_tradeoff")


def server(name: str, start: int, end: int, decode_ms: float, rate: float = 1e7) -> ServerPoint:
    return ServerPoint(name, start, end, decode_ms, 4000.0 / decode_ms, rate, 1000)


def swarm(
    *more: ServerPoint, rtt_ms: Mapping[tuple[str, str], float] | None = None
) -> SwarmSnapshot:
    """All pairs but those of `c` and `client` are known: 10 ms, unless `rtt_ms` says otherwise."""
    servers = (
        server("b", 0, 4, 1.0), server("c", 0, 4, 1.1, 1e8),
        server("d", 4, 8, 1.0), server("e", 4, 8, 1.1, 1e8), *more,
    )  # fmt: skip
    table: dict[str, dict[str, float]] = {}
    for one, other in itertools.combinations([CLIENT, *(s.id for s in servers)], 2):
        if (one, other) != (CLIENT, "c"):
            table.setdefault(one, {})[other] = (rtt_ms or {}).get((one, other), 10.0)
    return SwarmSnapshot(8, 1000.0, 1.0, 11.0, servers, table)


def with_b(snapshot: SwarmSnapshot, **values: float) -> SwarmSnapshot:
    servers = [dataclasses.replace(s, **values) if s.id == "b" else s for s in snapshot.servers]
    return dataclasses.replace(snapshot, servers=tuple(servers))


def as_matrix(snapshot: SwarmSnapshot) -> SwarmSnapshot:
    names = [*(s.id for s in snapshot.servers), CLIENT]
    half_ms = [[snapshot.rtt(one, other) / 2 for other in names] for one in names]
    return dataclasses.replace(snapshot, rtt_ms=RttMatrix(np.array(half_ms)))


def as_it_is(snapshot: SwarmSnapshot) -> SwarmSnapshot:
    return snapshot


FORMS = {"table": as_it_is, "matrix": as_matrix}
FORM = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def optimizer_of(name: str, seed: int) -> ChainOptimizer:
    if name in EVOLVE:
        pytest.importorskip("pymoo")
        name += ":population=12,generations=4"
    return OPTIMIZERS.create_from(name, seed=seed)


def planned(name: str, snapshot: SwarmSnapshot, pick: str = "latency") -> Chain:
    return optimizer_of(name, seed=1).plan(snapshot, ChainRequest(tokens=64, pick=pick))


def taken(name: str, snapshot: SwarmSnapshot) -> list[str]:
    return [hop.peer_id for hop in planned(name, snapshot)]


SWARM = swarm()
INPUTS: dict[str, tuple[SwarmSnapshot, list[str], set[str]]] = {
    "client links": (swarm(rtt_ms={(CLIENT, "b"): 50.0}), ["c", "d"], set()),
    "links between servers": (
        swarm(rtt_ms={("b", "d"): 50.0, ("c", "d"): 50.0}), ["b", "e"], set()
    ),
    "default round trip": (dataclasses.replace(SWARM, default_rtt_ms=0.0), ["c", "d"], set()),
    "decode time": (with_b(SWARM, decode_ms_per_block=5.0), ["c", "d"], set()),
    "wait": (with_b(SWARM, wait_ms=20.0), ["c", "d"], PETALS),
    "network rate": (with_b(SWARM, network_bytes_per_s=5e4), ["c", "d"], PETALS),
    "activation bytes": (
        dataclasses.replace(SWARM, activation_bytes_per_token=2e5), ["c", "e"], PETALS
    ),
    "free cache": (with_b(SWARM, free_cache_tokens=63), ["c", "d"], set()),
}  # fmt: skip
"""The swarm after the change, what is taken there, and whose published cost does not have it."""


@FORM
@pytest.mark.parametrize("changed", INPUTS)
@pytest.mark.parametrize("name", EVERY)
def test_an_optimiser_notices(
    name: str, changed: str, form: Callable[[SwarmSnapshot], SwarmSnapshot]
) -> None:
    snapshot, expected, unaware = INPUTS[changed]
    assert taken(name, form(SWARM)) == ["b", "d"]
    assert taken(name, form(snapshot)) == (["b", "d"] if name in unaware else expected)


@FORM
@pytest.mark.parametrize("name", EVERY)
def test_an_optimiser_notices_the_overhead_of_a_visit(
    name: str, form: Callable[[SwarmSnapshot], SwarmSnapshot]
) -> None:
    cheap = swarm(server("whole", 0, 8, 3.0))
    dear = dataclasses.replace(cheap, hop_overhead_ms=40.0)
    assert taken(name, form(dear)) == ["whole"]
    # Petals counts 18 ms wherever it is.
    assert taken(name, form(cheap)) == (["whole"] if name in PETALS else ["b", "d"])


@FORM
@pytest.mark.parametrize("name", ["pareto_exact", *EVOLVE])
def test_who_wants_throughput_notices_rates(
    name: str, form: Callable[[SwarmSnapshot], SwarmSnapshot]
) -> None:
    """All four get a share of the blocks; `b` none when it can do next to nothing."""
    slow = with_b(SWARM, tokens_per_s_per_block=10.0)
    narrow = with_b(SWARM, network_bytes_per_s=1e4)
    assert "b" in {hop.peer_id for hop in planned(name, form(SWARM), "throughput")}
    for snapshot in (slow, narrow):
        assert "b" not in {hop.peer_id for hop in planned(name, form(snapshot), "throughput")}


@FORM
@pytest.mark.parametrize("name", sorted(BLIND))
def test_a_blind_choice_looks_at_nothing_but_room(
    name: str, form: Callable[[SwarmSnapshot], SwarmSnapshot]
) -> None:
    chains = {
        changed: [
            OPTIMIZERS.create_from(name, seed=seed).plan(form(snapshot), ChainRequest(tokens=64))
            for seed in range(20)
        ]
        for changed, (snapshot, _, _) in INPUTS.items()
    }
    hops = {changed: [chain.hops for chain in found] for changed, found in chains.items()}
    with_room = hops.pop("free cache")
    assert all(found == hops["wait"] for found in hops.values())
    assert {hop.peer_id for found in hops["wait"] for hop in found} == {"b", "c", "d", "e"}
    assert {hop.peer_id for found in with_room for hop in found} == {"c", "d", "e"}


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_matrix_gives_the_chain_of_a_table_with_the_same_times(name: str) -> None:
    rng = np.random.default_rng(5)
    for seed in range(8):
        snapshot = random_snapshot(rng, num_servers=7, num_blocks=9, scale=(1.0, 0.1)[seed % 2])
        optimizer = optimizer_of(name, seed)
        chain = optimizer.plan(snapshot, ChainRequest())
        assert optimizer.plan(as_matrix(snapshot), ChainRequest()) == chain


def test_a_snapshot_with_a_matrix_is_saved_as_a_table() -> None:
    snapshot = as_matrix(SWARM)
    again = SwarmSnapshot.from_json(snapshot.to_json())
    names = [*(s.id for s in SWARM.servers), CLIENT]
    for one, other in itertools.product(names, names):
        assert again.rtt(one, other) == snapshot.rtt(one, other) == SWARM.rtt(one, other)
    assert again.servers == SWARM.servers


@pytest.mark.parametrize(
    ("half_ms", "text"),
    [
        (np.zeros((4, 4)), "a matrix of 4 ends is not of 4 servers"),
        (np.zeros((5, 4)), "shape"),
        (np.zeros(25), "shape"),
        (np.full((5, 5), 1.0), "diagonal"),
        (np.triu(np.full((5, 5), 1.0), 1), "symmetric"),
        (np.eye(5) - 1.0, "below 0"),
        (np.where(np.eye(5, dtype=bool), 0.0, np.nan), "not finite"),
        (np.where(np.eye(5, dtype=bool), 0.0, np.inf), "not finite"),
    ],
)
def test_a_matrix_that_is_none_of_these_servers_is_refused(half_ms: np.ndarray, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        dataclasses.replace(SWARM, rtt_ms=RttMatrix(half_ms))


def test_a_round_trip_to_somebody_unknown_is_refused() -> None:
    for snapshot in (SWARM, as_matrix(SWARM)):
        with pytest.raises(ConfigError, match="'nobody' is no server"):
            snapshot.rtt("nobody", "b")
        with pytest.raises(ConfigError, match="'client' is no server"):
            snapshot.server(CLIENT)
