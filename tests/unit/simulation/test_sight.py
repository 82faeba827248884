"""What simulated clients see of their world: links, speeds, loads, room.

The prices here come from `planetserve.testing.brute_force`, which lists every chain of the world
and shares no code with planners: a client that plans on something else is found out.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("simpy")

from small_swarm import as_table, far_apart, small

from planetserve.routing.optimizers import OPTIMIZERS
from planetserve.routing.request import ChainRequest
from planetserve.simulation import client as client_module
from planetserve.simulation.client import Directory, Policy, SimClient, idle_directory
from planetserve.simulation.events import later
from planetserve.simulation.ring import Ring
from planetserve.simulation.run import RunResult, Simulation
from planetserve.simulation.scenario import load_scenario
from planetserve.simulation.summary import Objective, summarise
from planetserve.simulation.world import Links, Request, World
from planetserve.testing.brute_force import all_chains
from planetserve.types import BlockSpan, Chain

BEST = "shortest_path:cost_jitter=0,load_prior=0"
WORLDS = range(25)


def client_of(world: World, policy: str, directory: Directory | None = None) -> SimClient:
    servers = Simulation(world, Policy.parse(policy)).servers
    client = SimClient(world, 0, Policy.parse(policy), directory or idle_directory(world), servers)
    client.refresh(0.0)
    return client


def choice(client: SimClient, tokens: int = 64) -> Chain:
    return client.plan(client.snapshot(0.0), tokens, seed=1)


def taken(client: SimClient) -> list[str]:
    return [hop.peer_id for hop in choice(client)]


def anybody_taken(client: SimClient) -> set[str]:
    """By one of forty sessions."""
    chains = [client.plan(client.snapshot(0.0), 64, seed) for seed in range(40)]
    return {hop.peer_id for chain in chains for hop in chain}


def hosts(chain: Chain) -> list[str]:
    return [hop.peer_id for hop in chain for _ in range(hop.start, hop.end)]


def price_ms(world: World, client: int, names: list[str]) -> float:
    """Of a chain, given as the server of each block."""
    snapshot = as_table(world, client)
    every, latency, _ = all_chains(snapshot)
    numbers = [snapshot.index[name] for name in names]
    return float(latency[(every == numbers).all(axis=1)][0])


def least_ms(world: World, client: int) -> float:
    return float(all_chains(as_table(world, client))[1].min())


def alone(world: World, output_tokens: int = 12, count: int = 1) -> World:
    """The world with requests of client 0 that never meet each other."""
    world.requests = [Request(1.0 + 1000.0 * i, 0, 20, output_tokens) for i in range(count)]
    return world


def steps_ms(result: RunResult) -> list[float]:
    """The time of each token after a request's first, without what the client takes to send it."""
    gaps = [gap for record in result.records for gap in record.gaps_ms]
    return [gap - 1000.0 * 1000.0 / (1000.0 * 125_000) for gap in gaps]


@pytest.mark.parametrize("seed", WORLDS)
def test_a_client_alone_chooses_the_fastest_chain_of_its_world(seed: int) -> None:
    world = far_apart(seed)
    chain = choice(client_of(world, BEST))
    assert chain.latency_ms == pytest.approx(least_ms(world, 0), rel=1e-9)
    assert price_ms(world, 0, hosts(chain)) == pytest.approx(chain.latency_ms, rel=1e-9)
    usual = choice(client_of(world, "shortest_path"))
    assert usual.latency_ms <= 1.1 * least_ms(world, 0)


@pytest.mark.parametrize("seed", WORLDS)
def test_the_yardstick_is_the_fastest_chain_of_the_idle_world(seed: int) -> None:
    world = far_apart(seed)
    objective = Objective(world)
    for client in range(world.num_clients):
        assert objective.best_ms(client) == pytest.approx(least_ms(world, client), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_session_alone_takes_the_least_time_there_is(seed: int) -> None:
    world = alone(far_apart(seed))
    result = Simulation(world, Policy.parse(BEST)).run()
    assert steps_ms(result) == pytest.approx([least_ms(world, 0)] * 11, rel=1e-9)
    assert summarise(world, Objective(world), result).idle_ms == pytest.approx(least_ms(world, 0))


@pytest.mark.parametrize("seed", range(5))
def test_a_session_pays_the_links_of_the_chain_it_is_on(seed: int) -> None:
    world = alone(far_apart(seed), count=4)
    _, prices, _ = all_chains(as_table(world, 0))
    result = Simulation(world, Policy.parse("random")).run()
    for record in result.records:
        (took_ms,) = set(np.round(steps_ms(dataclasses.replace(result, records=[record])), 6))
        assert np.isclose(prices, took_ms, rtol=1e-7).any()


@pytest.mark.parametrize("seed", WORLDS)
def test_petals_chooses_the_least_of_its_own_cost(seed: int) -> None:
    """Links, blocks and 18 ms a visit; from where a server is entered to the end of its span."""
    world = far_apart(seed)
    snapshot = as_table(world, 0)
    chain = choice(client_of(world, "petals_min_latency"))

    def cost(names: list[str]) -> float:
        ring = ["client", *names, "client"]
        links = sum(snapshot.rtt(a, b) / 2 for a, b in zip(ring, ring[1:], strict=False))
        at, blocks_ms = 0, 0.0
        for name in names:
            server = snapshot.server(name)
            blocks_ms += (server.end - at) * server.decode_ms_per_block
            at = server.end
        return links + blocks_ms + 18.0 * len(names)

    def walks(at: int) -> list[list[str]]:
        if at == snapshot.num_blocks:
            return [[]]
        here = [server for server in snapshot.servers if server.start <= at < server.end]
        return [[server.id, *rest] for server in here for rest in walks(server.end)]

    assert cost([hop.peer_id for hop in chain]) == pytest.approx(min(map(cost, walks(0))))


@pytest.mark.parametrize("seed", WORLDS)
def test_a_gap_is_filled_with_whom_the_ring_is_fastest(seed: int) -> None:
    """Two servers hold the gap; the links to the hops on both sides decide, and their speed."""
    world = far_apart(seed)
    spans = [BlockSpan(0, 2), BlockSpan(6, 8), *[BlockSpan(2, 6)] * 4]
    world.spans = spans
    client = client_of(world, BEST)
    gap = client.plan_gap(0.0, BlockSpan(2, 6), (0, 1), without={0, 1}, lease=64, seed=1)
    assert len(gap) == 1
    found = price_ms(world, 0, ["s0"] * 2 + [gap.hops[0].peer_id] * 4 + ["s1"] * 2)
    every = [price_ms(world, 0, ["s0"] * 2 + [f"s{i}"] * 4 + ["s1"] * 2) for i in range(2, 6)]
    assert found == pytest.approx(min(every))


# Two servers that hold everything at equal distance, and two with half each. Whoever plans on them
# takes the first one alone, until one input says otherwise.
TWINS = ("0:8", "0:8", "0:4", "4:8")
PLAIN = "petals_min_latency"
FOLDED = "petals_min_latency+folded"

Change = Callable[[World, Directory], None]


def twins() -> World:
    world = World(small(TWINS, max_output_tokens=600), 0)
    speeds = ((4.0, 1e6), (4.2, 1e7), (0.1, 1e6), (0.1, 1e6))
    world.machines = [
        dataclasses.replace(
            world.machines[0],
            id=f"s{number}",
            decode_ms_per_block=decode_ms,
            network_bytes_per_s=rate,
        )
        for number, (decode_ms, rate) in enumerate(speeds)
    ]
    rescale(world, "network", hop_overhead_ms=18.0)
    world.links = links()
    return world


def links(**changed_ms: float) -> Links:
    """Every node is a city, mostly 20 ms from any other. `s0_c=30` is s0 and the client."""
    nodes = ["s0", "s1", "s2", "s3", "c", "c1", "c2"]
    rtt_ms = np.full((7, 7), 20.0)
    np.fill_diagonal(rtt_ms, 0.0)
    for pair, ms in {"s2_s3": 40.0, **changed_ms}.items():
        one, other = (nodes.index(name) for name in pair.split("_"))
        rtt_ms[one, other] = rtt_ms[other, one] = ms
    return Links(rtt_ms, list(range(7)), [0.0] * 7)


def rescale(world: World, part: str, **values: float) -> None:
    section = getattr(world.scenario, part).model_copy(update=values)
    world.scenario = world.scenario.model_copy(update={part: section})


def linked(**pairs_ms: float) -> Change:
    def change(world: World, _: Directory) -> None:
        world.links = links(**pairs_ms)

    return change


def scaled(part: str, **values: float) -> Change:
    return lambda world, _: rescale(world, part, **values)


def announced(**values: float) -> Change:
    """The first server announces something else."""

    def change(_: World, directory: Directory) -> None:
        point = directory.points[0]
        assert point is not None
        directory.announce(0, 0.0, dataclasses.replace(point, **values))

    return change


INPUTS: dict[str, tuple[Change, list[str], tuple[str, ...]]] = {
    "client links": (linked(s0_c=60.0), ["s1"], ()),
    "links between servers": (linked(s2_s3=0.0), ["s2", "s3"], ()),
    "decode time": (announced(decode_ms_per_block=8.0), ["s1"], ()),
    "free cache": (announced(free_cache_tokens=63), ["s1"], ()),
    "wait": (announced(wait_ms=30.0), ["s1"], (PLAIN,)),
    "hop overhead": (scaled("network", hop_overhead_ms=0.0), ["s2", "s3"], (PLAIN, FOLDED)),
    "network rate": (announced(network_bytes_per_s=3e4), ["s1"], (PLAIN, FOLDED)),
    "activation bytes": (
        scaled("model", activation_bytes_per_token=5e4), ["s1"], (PLAIN, FOLDED)
    ),
}  # fmt: skip
"""What changes, what a policy takes then, and whose published cost does not have it."""


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("policy", [BEST, PLAIN, FOLDED])
def test_a_policy_notices_every_input_of_its_plan(policy: str, name: str) -> None:
    change, expected, unaware = INPUTS[name]
    world = twins()
    directory = idle_directory(world)
    assert taken(client_of(world, policy, directory)) == ["s0"]
    change(world, directory)
    after = taken(client_of(world, policy, directory))
    assert after == (["s0"] if policy in unaware else expected)


@pytest.mark.parametrize("name", INPUTS)
def test_clients_that_spread_notice_them_too(name: str) -> None:
    change, _, _ = INPUTS[name]
    world = twins()
    directory = idle_directory(world)
    assert "s0" in anybody_taken(client_of(world, "shortest_path", directory))
    change(world, directory)
    assert "s0" not in anybody_taken(client_of(world, "shortest_path", directory))


@pytest.mark.parametrize("policy", ["random", "petals_max_throughput"])
def test_a_blind_policy_takes_anybody_with_room(policy: str) -> None:
    world = twins()
    directory = idle_directory(world)
    assert anybody_taken(client_of(world, policy, directory)) == {"s0", "s1", "s2", "s3"}
    announced(free_cache_tokens=63)(world, directory)
    assert anybody_taken(client_of(world, policy, directory)) == {"s1", "s2", "s3"}


@pytest.mark.parametrize("away_ms", [20.0, 220.0])
def test_a_running_session_moves_to_a_nearer_chain_when_it_appears(away_ms: float) -> None:
    """But not to one that is as good but for its links."""
    world = alone(twins(), output_tokens=600)
    others = {"s1_c": 240.0 - away_ms, "s2_c": 240.0 - away_ms, "s3_c": 240.0 - away_ms}
    world.links = links(s0_c=away_ms, **others)
    simulation = Simulation(world, Policy.parse(f"{BEST}+moves"))
    later(simulation.env, 0.5, simulation._directory.withdraw, 0)
    later(simulation.env, 8.0, simulation._publish, simulation.servers[0])
    simulation._look = lambda _server: None  # type: ignore[method-assign]
    result = simulation.run()
    assert [record.num_moves for record in result.records] == [away_ms == 20.0]
    assert steps_ms(result)[0] == pytest.approx(price_ms(world, 0, ["s1"] * 8))
    assert steps_ms(result)[-1] == pytest.approx(least_ms(world, 0))


def test_a_client_plans_on_what_the_directory_had_when_it_looked() -> None:
    world = twins()
    directory = Directory(4, lifetime_s=60.0)
    for number, point in enumerate(idle_directory(world).points):
        assert point is not None
        directory.announce(number, 50.0 if number else 0.0, point)
    client = client_of(world, BEST, directory)

    def taken_at(now_s: float) -> list[str]:
        client.refresh(now_s)
        return [hop.peer_id for hop in client.plan(client.snapshot(now_s), 64, seed=1)]

    assert taken_at(59.0) == ["s0"]
    assert taken_at(65.0) == ["s1"]  # the record has run out
    directory.withdraw(1)
    assert taken_at(67.0) == ["s1"]  # it has only just looked
    assert taken_at(71.0) == ["s2", "s3"]


def test_a_client_knows_the_present_load_of_servers_that_it_uses() -> None:
    """Their answers carry it; of others it knows what they have announced."""
    world = twins()
    client = client_of(world, BEST)
    idle = idle_directory(world).points[0]
    assert idle is not None
    loaded = dataclasses.replace(idle, wait_ms=30.0)
    busy: Any = SimpleNamespace(is_up=True, point=lambda: loaded)
    client._servers = [busy, *client._servers[1:]]
    assert hosts(choice(client)) == ["s0"] * 8
    ring = Ring(Any, b"", client.name, client.node, world.links, {"s0": 0})  # type: ignore[arg-type]
    ring.servers = [0]
    client.rings[ring] = None
    assert hosts(choice(client)) == ["s1"] * 8
    informed = client_of(world, f"{BEST}+informed")
    informed._servers = client._servers
    assert hosts(choice(informed)) == ["s1"] * 8


def test_a_session_that_looks_for_a_better_chain_counts_its_own_room_as_free() -> None:
    world = twins()
    directory = idle_directory(world)
    announced(free_cache_tokens=0)(world, directory)
    client = client_of(world, BEST, directory)
    ring: Any = SimpleNamespace(servers=[0])
    assert hosts(choice(client)) == ["s1"] * 8
    chain = client.plan(client.snapshot(0.0, own=ring, lease=64), 64, seed=1)
    assert hosts(chain) == ["s0"] * 8


def test_a_banned_server_is_left_out() -> None:
    client = client_of(twins(), BEST)
    client.ban(0, until_s=5.0)
    assert hosts(choice(client)) == ["s1"] * 8


@pytest.mark.parametrize("what", ["near", "fast", "idle"])
def test_in_a_large_swarm_a_client_plans_on_the_near_fast_and_idle(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "VIEW_SERVERS", 8)
    world = World(small(("0:8",) * 24), 0)
    fast = dataclasses.replace(world.machines[0], decode_ms_per_block=1.0)
    world.machines = [dataclasses.replace(fast, id=f"s{number}") for number in range(24)]
    rtt_ms = np.full((27, 27), 20.0)
    np.fill_diagonal(rtt_ms, 0.0)
    better = set(range(3, 24, 3))
    directory = idle_directory(world)
    for number in set(range(24)) - better:
        point = directory.points[number]
        assert point is not None
        if what == "near":
            rtt_ms[number, 24:] = rtt_ms[24:, number] = 30.0
        elif what == "fast":
            point = dataclasses.replace(point, decode_ms_per_block=2.0)
        else:
            point = dataclasses.replace(point, wait_ms=8.0)
        directory.announce(number, 0.0, point)
    world.links = Links(rtt_ms, list(range(27)), [0.0] * 27)
    seen = {point.id for point in client_of(world, BEST, directory).snapshot(0.0).servers}
    assert len(seen) == 8
    assert {f"s{number}" for number in better} < seen


@pytest.mark.parametrize("client", range(3))
def test_the_best_holders_of_a_large_swarm_hold_its_fastest_chain(client: int) -> None:
    """So the yardstick, which is taken from them, is that of the whole swarm."""
    world = a_planet()
    directory = idle_directory(world)
    everybody = list(range(len(world.machines)))
    points = [point for point in directory.points if point is not None]
    node = world.client_node(client)
    whole = client_module._snapshot(world, points, world.links.matrix([*everybody, node]))
    least = OPTIMIZERS.create("shortest_path").plan(whole, ChainRequest()).latency_ms
    assert Objective(world).best_ms(client) == pytest.approx(least)


@functools.cache
def a_planet() -> World:
    return World(load_scenario("planet_1000"), 0)
