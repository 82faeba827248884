"""The simulated swarm against what can be worked out by hand, and what must hold in every run."""

from __future__ import annotations

import dataclasses
import functools

import pytest

pytest.importorskip("simpy")

from small_swarm import small

from planetserve.errors import ConfigError
from planetserve.routing.cost import latency_ms
from planetserve.routing.optimizers import OPTIMIZERS
from planetserve.routing.request import ChainRequest
from planetserve.simulation.client import Policy, idle_directory, idle_snapshot
from planetserve.simulation.run import RunResult, Simulation
from planetserve.simulation.scenario import LoadedScenario, Scenario
from planetserve.simulation.server import passed
from planetserve.simulation.session import Outcome
from planetserve.simulation.summary import Objective, interval, summarise
from planetserve.simulation.world import World

CHURN = {"mean_up_s": 15.0, "mean_down_s": 5.0, "load_s": 2.0, "drain_s": 3.0}
CROWDED = {
    "requests_per_s": 20.0,
    "output_tokens": 25.0,
    "cache_tokens": 256,
    "duration_s": 12.0,
}


def run(loaded: LoadedScenario, policy: str = "shortest_path", seed: int = 0) -> RunResult:
    return Simulation(World(loaded, seed), Policy.parse(policy)).run()


def numbers(loaded: LoadedScenario, seed: int, policy: str = "shortest_path") -> dict[str, float]:
    world = World(loaded, seed)
    result = Simulation(world, Policy.parse(policy)).run()
    return summarise(world, Objective(world), result).values()


def test_a_session_alone_takes_what_the_planner_predicts() -> None:
    loaded = small(clients=1, requests_per_s=0.2, duration_s=60.0)
    world = World(loaded, 1)
    # Far apart, so that nobody meets anybody.
    requests = [
        dataclasses.replace(request, arrival_s=100.0 * number)
        for number, request in enumerate(world.requests)
    ]
    world.requests = requests
    snapshot = idle_snapshot(world, 0, idle_directory(world))
    chain = OPTIMIZERS.create("shortest_path").plan(snapshot, ChainRequest())
    client_sends_ms = 1000.0 * 1000.0 / (1000.0 * 125_000)
    expected_ms = latency_ms(snapshot, chain) + client_sends_ms
    result = Simulation(world, Policy.parse("shortest_path:cost_jitter=0")).run()
    gaps_ms = [gap for record in result.records for gap in record.gaps_ms]
    assert len(gaps_ms) > 20
    assert gaps_ms == pytest.approx([expected_ms] * len(gaps_ms), rel=1e-9)


@pytest.mark.parametrize("policy", ["random", "petals_min_latency+folded", "shortest_path+moves"])
@pytest.mark.parametrize("trouble", [{}, {"churn": CHURN}, {**CROWDED, "churn": CHURN}])
def test_every_request_ends_once_with_all_its_tokens_or_counts_as_failed(
    policy: str, trouble: dict[str, object]
) -> None:
    loaded = small(**trouble)
    world = World(loaded, 3)
    simulation = Simulation(world, Policy.parse(policy))
    result = simulation.run()
    assert sorted(r.request.arrival_s for r in result.records) == [
        request.arrival_s for request in world.requests
    ]
    for record in result.records:
        if record.outcome is Outcome.DONE:
            assert len(record.gaps_ms) == record.request.output_tokens - 1
            assert all(gap > 0 for gap in record.gaps_ms)
            lasted_ms = 1000.0 * record.first_token_s + sum(record.gaps_ms)
            by_token_ms = lasted_ms / record.request.output_tokens
            assert record.normalised_ms == pytest.approx(by_token_ms)
        else:
            assert record.outcome is Outcome.NO_CHAIN
    for server in simulation.servers:
        assert not server.rings
        assert server.free_tokens == loaded.scenario.machines.cache_tokens
    if not trouble:
        assert all(record.outcome is Outcome.DONE for record in result.records)


def test_too_many_requests_are_refused_and_some_fail() -> None:
    result = run(small(**CROWDED))
    assert sum(record.num_refusals for record in result.records) > 0
    assert any(record.outcome is Outcome.NO_CHAIN for record in result.records)


def test_sessions_survive_departures_by_replaying() -> None:
    result = run(small(churn=CHURN, output_tokens=25.0, requests_per_s=3.0))
    jumped = [record for record in result.records if record.num_jumps]
    assert result.departures > 3
    assert jumped
    assert sum(record.num_replayed for record in jumped) > 0
    assert sum(record.outcome is Outcome.DONE for record in jumped) > len(jumped) / 2


@pytest.mark.parametrize("policy", ["random", "shortest_path+moves"])
def test_a_seed_fixes_everything(policy: str) -> None:
    loaded = small(churn=CHURN, requests_per_s=4.0)
    assert numbers(loaded, 5, policy) == numbers(loaded, 5, policy)
    assert numbers(loaded, 5, policy) != numbers(loaded, 6, policy)


def test_every_policy_gets_the_same_machines_requests_and_departures() -> None:
    loaded = small(churn=CHURN)
    one, other = World(loaded, 2), World(loaded, 2)
    assert one.machines == other.machines
    assert one.requests == other.requests
    up_to_s = [run(loaded, policy, seed=2).departures for policy in ("random", "greedy")]
    assert abs(up_to_s[0] - up_to_s[1]) <= 2  # a run that lasts longer sees more


def test_choosing_chains_beats_chance_on_unequal_machines() -> None:
    def mean_ms(policy: str) -> float:
        world = World(small(requests_per_s=2.0), 0)
        result = Simulation(world, Policy.parse(policy)).run()
        return summarise(world, Objective(world), result).token_mean_ms

    assert mean_ms("shortest_path") < 0.8 * mean_ms("random")


def test_tokens_share_a_pass_where_their_spans_overlap() -> None:
    assert passed([(0, 4, 1)]) == (4, 4)
    assert passed([(0, 4, 1), (0, 4, 1)]) == (4, 8)
    # Blocks 0:2 once, 2:4 together, 4:6 once.
    assert passed([(0, 4, 1), (2, 6, 1)]) == (6, 8)
    # Nobody needs 2:4.
    assert passed([(0, 2, 3), (4, 6, 1)]) == (4, 8)


def test_policies_are_read_from_text() -> None:
    assert Policy.parse("shortest_path:cost_jitter=0.2+moves") == Policy(
        "shortest_path:cost_jitter=0.2", True
    )
    assert str(Policy.parse("petals_min_latency+folded")) == "petals_min_latency+folded"
    with pytest.raises(ConfigError, match="choose one of"):
        Policy.parse("shortest")
    with pytest.raises(ConfigError, match=r"\+moves or \+folded or \+informed, not \+fast"):
        Policy.parse("random+fast")


def test_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-3)


BASE = small(churn=CHURN, requests_per_s=2.0)
# Another value for what a scenario says in numbers. Sizes of machines matter where they are placed,
# and patience in a crowd.
OTHER_VALUES = {
    "model": {"num_blocks": 7, "block_gb": 0.2, "activation_bytes_per_token": 1e5},
    "machines": {"cache_tokens": 128},
    "network": {
        "last_mile_ms": (2.0, 40.0), "bandwidth_mbit_s": (1.0, 10.0), "client_mbit_s": 1.0,
        "hop_overhead_ms": 3.0,
    },
    "workload": {
        "clients": 2, "requests_per_s": 4.0, "warmup_s": 5.0, "duration_s": 20.0,
        "prompt_tokens": 40.0, "output_tokens": 20.0, "sigma": 0.1, "max_prompt_tokens": 16,
        "max_output_tokens": 8,
    },
    "churn": {
        "mean_up_s": 30.0, "mean_down_s": 1.0, "load_s": 9.0, "graceful": 1.0, "drain_s": 0.01,
    },
    "slo": {"token_scale": 1.01, "first_token_s": 0.07},
}  # fmt: skip


def with_value(loaded: LoadedScenario, part: str, key: str, value: object) -> LoadedScenario:
    document = loaded.scenario.model_dump()
    document[part][key] = value
    if (part, key) == ("model", "num_blocks"):
        document["machines"]["spans"] = ["0:4", "4:7", "0:7", "0:4", "4:7", "0:7"]
    return dataclasses.replace(loaded, scenario=Scenario.model_validate(document))


@pytest.mark.parametrize(
    ("part", "key"), [(part, key) for part, keys in OTHER_VALUES.items() for key in keys]
)
def test_what_a_scenario_says_matters(part: str, key: str) -> None:
    changed = with_value(BASE, part, key, OTHER_VALUES[part][key])
    assert numbers(changed, seed=1) != base_numbers()


@functools.cache
def base_numbers() -> dict[str, float]:
    return numbers(BASE, seed=1)
