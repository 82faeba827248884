"""Section `solvers`: how long a plan takes, from 10 to 10,000 servers, 80 blocks.

Every time is of `plan` on a snapshot that nothing has been computed on yet, which includes what is
made of its round-trip times. Tables and pictures show CPU time: optimisers run on one thread, and
CPU time depends less than wall time, which is kept beside it, on what else a machine does. Up to
1,000 servers all pairs have a time of their own; beyond, every server knows 32 others, as many as a
directory record holds; all other pairs have the default. Fronts are refused where spans are so long
that the links between holders of neighbouring blocks would take gigabytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import time
from typing import Any

from common import median

from chain.output import markdown, new_figure, say
from chain.swarms import SWARMS
from planetserve.errors import ConfigError
from planetserve.routing.cost import check_chain, latency_ms
from planetserve.routing.optimizers import OPTIMIZERS, ChainOptimizer
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot

NUM_BLOCKS = 80
SIZES = (10, 30, 100, 300, 1000, 3000, 10_000)
FULL_TABLE_UP_TO = 1000
KNOWN_PER_SERVER = 32
TIMED = ("shortest_path", "pareto_exact", "nsga2", "greedy", "petals_min_latency", "random")
TARGETS_S = {("shortest_path", 100): 0.05, ("shortest_path", 1000): 0.5, ("pareto_exact", 100): 1.0}
SPAN_SHARES = (0.1, 0.33, 1.0)
"""Longest span of a server, as a part of the model."""


def measure(quick: bool) -> dict[str, Any]:
    sizes = (30, 100) if quick else SIZES
    points = []
    for kind in SWARMS:
        for size in sizes:
            for share in SPAN_SHARES if size > 10 else SPAN_SHARES[1:]:
                say(f"  {kind}, {size} servers of up to {share:.0%} of the model")
                seeds = range(1 if quick or size > 100 else 2)
                points += _time_all(kind, size, share, seeds)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"num_blocks": NUM_BLOCKS, "points": points, "peak_mib": round(peak_mib)}


def _time_all(kind: str, size: int, share: float, seeds: range) -> list[dict[str, Any]]:
    known = 1.0 if size <= FULL_TABLE_UP_TO else KNOWN_PER_SERVER / size
    times: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        snapshot = SWARMS[kind](size, NUM_BLOCKS, seed, share, known)
        for name in TIMED:
            with contextlib.suppress(ConfigError):  # too many links for a front of chains
                times.setdefault(name, []).append(_time(OPTIMIZERS.create(name), snapshot))
    return [
        {
            "optimizer": name,
            "swarm": kind,
            "servers": size,
            "span_share": share,
            "wall_s": median(wall for wall, _ in found),
            "worst_wall_s": max(wall for wall, _ in found),
            "cpu_s": median(cpu for _, cpu in found),
            "worst_cpu_s": max(cpu for _, cpu in found),
        }
        for name, found in times.items()
        if found
    ]


def _time(optimizer: ChainOptimizer, snapshot: SwarmSnapshot) -> tuple[float, float]:
    """Wall and CPU seconds of one plan on a fresh copy of the snapshot."""
    fresh = dataclasses.replace(snapshot)
    wall, cpu = time.perf_counter(), time.process_time()
    chain = optimizer.plan(fresh, ChainRequest())
    took = time.perf_counter() - wall, time.process_time() - cpu
    check_chain(fresh, chain)
    if chain.latency_ms != latency_ms(fresh, chain):
        raise SystemExit("a plan has another price than its chain")
    return took


def tables(result: dict[str, Any]) -> dict[str, str]:
    sizes = sorted({point["servers"] for point in result["points"]})
    rows = []
    for name in TIMED:
        worst = [_worst(result, name, size) for size in sizes]
        rows.append([f"`{name}`", *(None if w is None else w * 1000 for w in worst)])
    targets = []
    for (name, size), limit in TARGETS_S.items():
        worst_s = _worst(result, name, size)
        if worst_s is not None:
            met = worst_s <= limit
            targets.append([f"`{name}`, {size:,} servers", limit * 1000, worst_s * 1000, met])
    return {
        "times": markdown(["worst plan, ms of CPU time", *map("{:,}".format, sizes)], rows),
        "targets": markdown(["solve time, 80 blocks", "target, ms", "worst, ms", "met"], targets),
    }


def _worst(result: dict[str, Any], name: str, size: int) -> float | None:
    found = [
        point["worst_cpu_s"]
        for point in result["points"]
        if point["optimizer"] == name and point["servers"] == size
    ]
    return max(found, default=None)


def figures(result: dict[str, Any]) -> dict[str, Any]:
    figure, axes = new_figure(2)
    for axis, kind in zip(axes, SWARMS, strict=True):
        for name in TIMED:
            mine = [p for p in result["points"] if p["optimizer"] == name and p["swarm"] == kind]
            sizes = sorted({point["servers"] for point in mine})
            walls = [[p["cpu_s"] * 1000 for p in mine if p["servers"] == n] for n in sizes]
            (line,) = axis.plot(sizes, [median(w) for w in walls], marker="o", label=name)
            low, high = [min(w) for w in walls], [max(w) for w in walls]
            axis.fill_between(sizes, low, high, color=line.get_color(), alpha=0.15)
        axis.set(xscale="log", yscale="log", xlabel="servers", ylabel="ms of CPU time")
        axis.set_title(kind)
    axes[0].legend(fontsize="small")
    return {"growth": figure}
