"""Scenarios small enough to reason about, and what their worlds are when no planner is asked."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.simulation.scenario import CityTable, GpuTable, LoadedScenario, Scenario
from planetserve.simulation.world import World
from planetserve.types import CLIENT

GPUS = GpuTable(
    bandwidth_efficiency=0.5,
    batching_gain=10.0,
    gpus={
        "fast": {"gb_per_s": 400.0, "vram_gib": 8.0},
        "slow": {"gb_per_s": 100.0, "vram_gib": 8.0},
    },
    mixes={"both": {"fast": 3.0, "slow": 3.0}},
)  # fmt: skip


def small(
    spans: tuple[str, ...] = ("0:4", "4:8", "0:8", "0:4", "4:8", "0:8"),
    churn: dict[str, float] | None = None,
    cache_tokens: int = 4096,
    **workload: Any,
) -> LoadedScenario:
    """Six servers, three fast and three slow, of eight blocks of 0.1 GB: 0.5 ms or 2 ms each."""
    load = {
        "clients": 3, "requests_per_s": 1.0, "warmup_s": 0.0, "duration_s": 30.0,
        "prompt_tokens": 20.0, "output_tokens": 10.0, "patience_s": 5.0,
        "max_prompt_tokens": 64, "max_output_tokens": 32,
    }  # fmt: skip
    scenario = Scenario.model_validate(
        {
            "name": "small",
            "description": "for tests",
            "model": {
                "name": "tiny", "num_blocks": 8, "block_gb": 0.1, "kv_bytes_per_token": 100.0,
                "activation_bytes_per_token": 1000.0,
            },
            "machines": {
                "count": len(spans), "gpus": "-", "mix": "both", "exact_mix": len(spans) == 6,
                "placement": "fixed", "spans": spans, "cache_tokens": cache_tokens,
            },
            "network": {
                "last_mile_ms": (2.0, 20.0), "bandwidth_mbit_s": (100.0, 1000.0),
                "client_mbit_s": 1000.0, "hop_overhead_ms": 1.0,
            },
            "workload": {**load, **workload},
            "churn": churn,
        }
    )  # fmt: skip
    return LoadedScenario(scenario, GPUS, None)


def far_apart(seed: int) -> World:
    """Six servers and three clients in four cities, links and machines all unequal: what is best on
    the links and what is best on the machines are seldom the same."""
    rng = np.random.default_rng(seed)
    cuts = [sorted(rng.choice(9, size=2, replace=False).tolist()) for _ in range(4)]
    spans = ("0:8", "0:5", *(f"{start}:{end}" for start, end in cuts))
    rows = {f"city {i}": rng.uniform(1.0, 60.0, size=i + 1).round(2).tolist() for i in range(4)}
    world = World(dataclasses.replace(small(spans), cities=CityTable(rtt_ms=rows)), seed)
    world.machines = [
        dataclasses.replace(machine, decode_ms_per_block=float(rng.uniform(0.5, 6.0)))
        for machine in world.machines
    ]
    return world


def as_table(world: World, client: int) -> SwarmSnapshot:
    """The idle world as `client` finds it, from what simulated sessions pay: pair by pair, by name,
    for `planetserve.testing.brute_force`."""
    nodes = {machine.id: number for number, machine in enumerate(world.machines)}
    nodes[CLIENT] = world.client_node(client)
    rtt_ms: dict[str, dict[str, float]] = {}
    for one, other in itertools.combinations(nodes, 2):
        rtt_ms.setdefault(one, {})[other] = 2 * world.links.half_ms(nodes[one], nodes[other])
    scenario = world.scenario
    return SwarmSnapshot(
        num_blocks=scenario.model.num_blocks,
        activation_bytes_per_token=scenario.model.activation_bytes_per_token,
        hop_overhead_ms=scenario.network.hop_overhead_ms,
        default_rtt_ms=1e6,
        servers=tuple(
            ServerPoint(
                id=machine.id,
                start=span.start,
                end=span.end,
                decode_ms_per_block=machine.decode_ms_per_block,
                tokens_per_s_per_block=machine.tokens_per_s_per_block,
                network_bytes_per_s=machine.network_bytes_per_s,
                free_cache_tokens=scenario.machines.cache_tokens,
            )
            for machine, span in zip(world.machines, world.spans, strict=True)
        ),
        rtt_ms=rtt_ms,
    )
