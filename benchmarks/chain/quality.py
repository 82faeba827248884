"""Section `quality`: how good the chains are, against the exact front and against each other.

- `exact`: `planetserve plan` against every chain of small swarms, listed by brute force.
- `optimizers`: every optimiser on the same swarms; latency as a multiple of the least there is,
  throughput as a part of the most there is.
- `nsga2`: in two objectives, the part of a front's hypervolume that evolution reaches, with the
  good first population it has by default and from a random one. The front is that of the exact
  method at five times its effort, proven or not, which the rows tell apart.
- `four`: in four objectives, the random chains that its front leaves undominated, and whether the
  greedy chain dominates a member of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import median

from chain.output import markdown, new_figure, say
from chain.swarms import SWARMS
from planetserve.plan import main as plan_command
from planetserve.routing.cost import price, reputation
from planetserve.routing.exact import DEFAULT_EFFORT
from planetserve.routing.front import hypervolume, pick_chain
from planetserve.routing.optimizers import OPTIMIZERS
from planetserve.routing.optimizers.nsga2 import Nsga2
from planetserve.routing.optimizers.pareto_exact import ParetoExact
from planetserve.routing.optimizers.random_chain import RandomChain
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.testing.brute_force import all_chains, random_snapshot
from planetserve.types import Chain

NUM_SERVERS, NUM_BLOCKS = 30, 32
SWARM_COUNT = 25
"""Of each kind."""
SMALL_SWARMS = 500
RANDOM_CHAINS = 20
SPAN_SHARES = (0.33, 1.0)
REFERENCE_EFFORT = 5 * DEFAULT_EFFORT
"""Of the front that others are measured against. NSGA-II starts with what the default effort finds,
so that front would say nothing about it."""


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
    small = _against_brute_force(15 if quick else SMALL_SWARMS)
    return {"num_servers": NUM_SERVERS, "num_blocks": NUM_BLOCKS, "small": small, "swarms": rows}


def _against_brute_force(count: int) -> dict[str, int]:
    """How often the command's chains differ from the best ones of swarms of up to 6 servers."""
    say(f"  {count} small swarms against brute force")
    rng = np.random.default_rng(20261121)
    found = {"swarms": count, "shortest_path": 0, "pareto_exact": 0, "unproven": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "swarm.json"
        for number in range(count):
            size, blocks = int(rng.integers(1, 7)), int(rng.integers(1, 9))
            snapshot = random_snapshot(rng, size, blocks, (1.0, 0.1, 0.01)[number % 3])
            snapshot.save(path)
            _, latency, throughput = all_chains(snapshot)
            front: list[tuple[float, float]] = []
            for i in np.lexsort((-throughput, latency)):
                if not front or throughput[i] > front[-1][1] * (1 + 1e-12):
                    front.append((latency[i], throughput[i]))
            plan = _planned(path, "shortest_path")
            best_ms = plan["chains"][0]["latency_ms"]
            found["shortest_path"] += not np.isclose(best_ms, front[0][0], rtol=1e-9)
            plan = _planned(path, "pareto_exact")
            got = [(c["latency_ms"], c["throughput_tokens_per_s"]) for c in plan["chains"]]
            same = len(got) == len(front) and np.allclose(got, front, rtol=1e-9)
            found["pareto_exact"] += not same
            found["unproven"] += not plan["exact"]
    return found


def _planned(path: Path, optimizer: str) -> dict[str, Any]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        plan_command(["--snapshot", str(path), "--optimizer", optimizer, "--json"])
    planned: dict[str, Any] = json.loads(output.getvalue())
    return planned


def _measure_one(snapshot: SwarmSnapshot) -> dict[str, Any]:
    request = ChainRequest()
    default = ParetoExact().solve(snapshot, request)
    proven = ParetoExact(REFERENCE_EFFORT).solve(snapshot, request)
    # Without a time limit, so that the outcome is the same on a busy machine.
    started = time.process_time()
    warm = Nsga2(time_limit_s=0).front(snapshot, request)
    warm_cpu_s = time.process_time() - started
    cold = Nsga2(warm_start=False, time_limit_s=0).front(snapshot, request)
    four = Nsga2(objectives=4, time_limit_s=0).front(snapshot, request)
    # Two optimisers' picks come from fronts that are there already.
    chosen = {"pareto_exact": _point(pick_chain(default.chains, request))}
    chosen["nsga2"] = _point(pick_chain(warm, request))
    for name in OPTIMIZERS.names():
        if name not in (*chosen, "latency_throughput_tradeoff"):
            optimizer = OPTIMIZERS.create_from(name, seed=0)
            chosen[name] = _point(optimizer.plan(snapshot, request))
    worst_ms = 1.1 * max(chain.latency_ms for chain in proven.chains)
    exact_area = _area(proven.chains, worst_ms)
    randoms = [RandomChain(seed).plan(snapshot, request) for seed in range(RANDOM_CHAINS)]
    greedy = OPTIMIZERS.create("greedy").plan(snapshot, request)
    return {
        "front": [_point(chain) for chain in proven.chains],
        "front_proven": proven.exact,
        "default_proven": default.exact,
        "default_hypervolume": _area(default.chains, worst_ms) / exact_area,
        "chosen": chosen,
        "nsga2_hypervolume": _area(warm, worst_ms) / exact_area,
        "nsga2_cpu_s": warm_cpu_s,
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
    proven = [r for r in rows if r["front_proven"]]
    others = [r for r in rows if not r["front_proven"]]
    nsga2 = [
        ["swarms", len(rows), None],
        ["with a front proven at the default effort", sum(r["default_proven"] for r in rows), None],
        ["with a front proven at five times the effort", len(proven), None],
        ["least hypervolume where it is proven", _least(proven, "nsga2_hypervolume"), "0.99"],
        ["swarms with a proven front below 0.99",
         sum(r["nsga2_hypervolume"] < 0.99 for r in proven), 0],
        ["least hypervolume where it is not", _least(others, "nsga2_hypervolume"), None],
        ["the same of `pareto_exact` at the default effort, proven",
         _least(proven, "default_hypervolume"), None],
        ["the same, not proven", _least(others, "default_hypervolume"), None],
        ["median of `nsga2` from a random first population",
         median(r["nsga2_cold_hypervolume"] for r in rows), None],
        ["least of it", _least(rows, "nsga2_cold_hypervolume"), None],
        ["longest plan, s of CPU time", max(r["nsga2_cpu_s"] for r in rows), "2"],
        ["median plan, s of CPU time", median(r["nsga2_cpu_s"] for r in rows), None],
    ]  # fmt: skip
    four = [
        ["random chains", RANDOM_CHAINS * len(rows), None],
        ["of them not covered by the front", _sum(rows, "four_undominated_random"), 0],
        ["members of a front that the greedy chain dominates",
         _sum(rows, "four_dominated_by_greedy"), 0],
        ["members of a front, median", median(r["four_front"] for r in rows), None],
    ]  # fmt: skip
    header = ["optimiser", "latency / least, median", "worst", "throughput / most, median", "worst"]
    small = result["small"]
    exact = [
        ["swarms of up to 6 servers and 8 blocks", small["swarms"], None],
        ["chains of `shortest_path` that are not the best", small["shortest_path"], 0],
        ["fronts of `pareto_exact` that are not the front", small["pareto_exact"], 0],
        ["fronts not proven whole", small["unproven"], None],
    ]
    return {
        "exact": markdown(["`planetserve plan` against brute force", "measured", "target"], exact),
        "optimizers": markdown(header, chosen),
        "nsga2": markdown(["two objectives", "measured", "target"], nsga2),
        "four": markdown(["four objectives", "measured", "target"], four),
    }


def _least(rows: list[dict[str, Any]], key: str) -> float | None:
    return min((row[key] for row in rows), default=None)


def _sum(rows: list[dict[str, Any]], key: str) -> int:
    return sum(row[key] for row in rows)


def figures(result: dict[str, Any]) -> dict[str, Any]:
    figure, axes = new_figure(2)
    for axis, kind in zip(axes, SWARMS, strict=True):
        row = max(
            (r for r in result["swarms"] if r["swarm"] == kind), key=lambda r: len(r["front"])
        )
        axis.plot(*zip(*row["front"], strict=True), "k.-", lw=1, label="front")
        for name, point in row["chosen"].items():
            axis.plot(*point, "o", label=name, alpha=0.8)
        axis.set(xlabel="ms per token", ylabel="tokens/s", title=f"{kind}, seed {row['seed']}")
    axes[1].legend(fontsize="x-small")
    return {"fronts": figure}
