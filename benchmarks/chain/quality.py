"""Section `quality`: how good the chains are, against the exact front and against each other.

- `optimizers`: every optimiser on the same swarms; latency as a multiple of the least there is,
  throughput as a part of the most there is.
- `nsga2`: the part of the exact front's hypervolume that evolution reaches, in two objectives, with
  the good first population it has by default and from a random one.
- `four`: in four objectives, the random chains that its front leaves undominated, and whether the
  greedy chain dominates a member of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from common import median, percentile

from chain.output import markdown, new_figure, say
from chain.swarms import SWARMS
from planetserve.routing.cost import price, reputation
from planetserve.routing.front import hypervolume
from planetserve.routing.optimizers import OPTIMIZERS
from planetserve.routing.optimizers.nsga2 import Nsga2
from planetserve.routing.optimizers.pareto_exact import ParetoExact
from planetserve.routing.optimizers.random_chain import RandomChain
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import Chain

NUM_SERVERS, NUM_BLOCKS = 30, 32
SWARM_COUNT = 50
RANDOM_CHAINS = 20
SPAN_SHARES = (0.33, 1.0)


def measure(quick: bool) -> dict[str, Any]:
    swarms = [
        {"swarm": kind, "seed": seed, "span_share": SPAN_SHARES[seed % len(SPAN_SHARES)]}
        for kind in SWARMS
        for seed in range(2 if quick else SWARM_COUNT)
    ]
    ParetoExact().front(SWARMS["scattered"](5, 5, 0, 1.0), ChainRequest())  # imports, caches
    Nsga2(population=4, generations=1).front(SWARMS["scattered"](5, 5, 0, 1.0), ChainRequest())
    rows = []
    for number, swarm in enumerate(swarms, start=1):
        if number % 10 == 0:
            say(f"  swarm {number} of {len(swarms)}")
        snapshot = SWARMS[swarm["swarm"]](
            NUM_SERVERS, NUM_BLOCKS, swarm["seed"], swarm["span_share"]
        )
        rows.append({**swarm, **_measure_one(snapshot)})
    return {"num_servers": NUM_SERVERS, "num_blocks": NUM_BLOCKS, "swarms": rows}


def _measure_one(snapshot: SwarmSnapshot) -> dict[str, Any]:
    request = ChainRequest()
    proven = ParetoExact().solve(snapshot, request)
    started = time.perf_counter()
    warm = Nsga2().front(snapshot, request)
    warm_s = time.perf_counter() - started
    cold = Nsga2(warm_start=False).front(snapshot, request)
    four = Nsga2(objectives=4).front(snapshot, request)
    chosen = {
        name: _point(OPTIMIZERS.create(name, **({"seed": 0} if "random" in name else {})).plan(
            snapshot, request
        ))
        for name in OPTIMIZERS.names()
    }  # fmt: skip
    worst_ms = 1.1 * max(chain.latency_ms for chain in proven.chains)
    exact_area = _area(proven.chains, worst_ms)
    randoms = [RandomChain(seed).plan(snapshot, request) for seed in range(RANDOM_CHAINS)]
    greedy = OPTIMIZERS.create("greedy").plan(snapshot, request)
    return {
        "front": [_point(chain) for chain in proven.chains],
        "front_proven": proven.exact,
        "chosen": chosen,
        "nsga2_hypervolume": _area(warm, worst_ms) / exact_area,
        "nsga2_s": warm_s,
        "nsga2_cold_hypervolume": _area(cold, worst_ms) / exact_area,
        "four_undominated_random": sum(
            not any(_covers(snapshot, member, chain) for member in four) for chain in randoms
        ),
        "four_dominated_by_greedy": sum(
            _covers(snapshot, greedy, member) and not _covers(snapshot, member, greedy)
            for member in four
        ),
        "four_front": len(four),
    }


def _point(chain: Chain) -> list[float]:
    return [chain.latency_ms, chain.throughput_tokens_per_s]


def _area(chains: Sequence[Chain], worst_ms: float) -> float:
    points = np.array([[c.latency_ms, -c.throughput_tokens_per_s] for c in chains])
    return hypervolume(points, (worst_ms, 0.0))


def _covers(snapshot: SwarmSnapshot, one: Chain, other: Chain) -> bool:
    """Whether `one` is at least as good as `other` in all four objectives."""
    a, b = _four(snapshot, one), _four(snapshot, other)
    return bool((a <= b + 1e-9 * np.abs(b)).all())


def _four(snapshot: SwarmSnapshot, chain: Chain) -> np.ndarray:
    return np.array(
        [
            chain.latency_ms,
            -chain.throughput_tokens_per_s,
            -reputation(snapshot, chain),
            price(snapshot, chain),
        ]
    )


def tables(result: dict[str, Any]) -> dict[str, str]:
    rows = result["swarms"]
    chosen = []
    for name in rows[0]["chosen"]:
        slower = [r["chosen"][name][0] / r["front"][0][0] for r in rows]
        faster = [r["chosen"][name][1] / r["front"][-1][1] for r in rows]
        chosen.append([f"`{name}`", median(slower), max(slower), median(faster), min(faster)])
    ratio = [r["nsga2_hypervolume"] for r in rows]
    cold = [r["nsga2_cold_hypervolume"] for r in rows]
    seconds = [r["nsga2_s"] for r in rows]
    nsga2 = [
        ["swarms", len(rows), None],
        ["fronts that `pareto_exact` proved whole", sum(r["front_proven"] for r in rows), None],
        ["least hypervolume, part of the exact front's", min(ratio), "0.99"],
        ["median, from a random first population", median(cold), None],
        ["least, from a random first population", min(cold), None],
        ["longest plan, s", max(seconds), "2"],
        ["plan of the 95th percentile, s", percentile(seconds, 95), None],
    ]
    four = [
        ["random chains", RANDOM_CHAINS * len(rows), None],
        ["of them not covered by the front", _sum(rows, "four_undominated_random"), 0],
        ["members of a front that the greedy chain dominates",
         _sum(rows, "four_dominated_by_greedy"), 0],
        ["members of a front, median", median(r["four_front"] for r in rows), None],
    ]  # fmt: skip
    header = ["optimiser", "latency / least, median", "worst", "throughput / most, median", "worst"]
    return {
        "optimizers": markdown(header, chosen),
        "nsga2": markdown(["two objectives", "measured", "target"], nsga2),
        "four": markdown(["four objectives", "measured", "target"], four),
    }


def _sum(rows: list[dict[str, Any]], key: str) -> int:
    return sum(row[key] for row in rows)


def figures(result: dict[str, Any]) -> dict[str, Any]:
    figure, axes = new_figure(2)
    for axis, kind in zip(axes, SWARMS, strict=True):
        row = max(
            (r for r in result["swarms"] if r["swarm"] == kind), key=lambda r: len(r["front"])
        )
        axis.plot(*zip(*row["front"], strict=True), "k.-", lw=1, label="exact front")
        for name, point in row["chosen"].items():
            axis.plot(*point, "o", label=name, alpha=0.8)
        axis.set(xlabel="ms per token", ylabel="tokens/s", title=f"{kind}, seed {row['seed']}")
        axis.set(xscale="log")
    axes[1].legend(fontsize="x-small")
    return {"fronts": figure}
