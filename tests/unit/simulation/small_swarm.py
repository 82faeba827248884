"""Scenarios small enough to reason about."""

from __future__ import annotations

from typing import Any

from planetserve.simulation.scenario import GpuTable, LoadedScenario, Scenario

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
                "count": len(spans), "gpus": "-", "mix": "both", "exact_mix": True,
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
