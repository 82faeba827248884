"""Section `simulation`: what users of whole swarms would see, in simulated time.

Every scenario of `configs/scenarios/`, every policy, several seeds; a seed gives all policies the
same machines, requests and departures. Times are simulated: the machine that this runs on decides
nothing but how long it takes.
"""

from __future__ import annotations

import time
from typing import Any

from chain.output import markdown, new_figure, say
from planetserve.simulation.command import simulate
from planetserve.simulation.report import as_document
from planetserve.simulation.scenario import load_scenario
from planetserve.simulation.summary import interval

POLICIES = {
    "random": "random chains",
    "petals_min_latency": "Petals",
    "petals_min_latency+folded": "Petals, knowing loads",
    "shortest_path": "ours",
    "shortest_path+moves": "ours, moving",
}
OURS = "shortest_path"
_THREE = ("random", "petals_min_latency", OURS)
SCENARIOS = {
    "home_4": tuple(POLICIES),
    "city_14": tuple(POLICIES)[:4],
    "continent_100": _THREE,
    "planet_1000": _THREE,
    "planet_10000": _THREE,
}
"""Policies of each: the larger, the fewer, since all runs together take a quarter of an hour."""
SEEDS = 5


def measure(quick: bool) -> dict[str, Any]:
    runs = []
    for name in list(SCENARIOS)[:1] if quick else SCENARIOS:
        loaded = load_scenario(name)
        if quick:
            loaded = loaded.with_workload(warmup_s=0, duration_s=60)
        seeds = range(2 if quick else SEEDS)
        shown: set[str] = set()

        def progress(what: str, _share: float, shown: set[str] = shown) -> None:
            if what not in shown:
                shown.add(what)
                say(f"  {what}")

        started_s = time.process_time()
        found = simulate(loaded, SCENARIOS[name], seeds, progress)
        document = as_document(loaded, seeds, found)
        runs.append({**document, "cpu_s": round(time.process_time() - started_s, 1)})
    return {"scenarios": runs}


def tables(result: dict[str, Any]) -> dict[str, str]:
    rows, targets = [], []
    for run in result["scenarios"]:
        for policy, found in run["optimizers"].items():
            rows.append(
                [
                    f"{run['scenario']}, {POLICIES[policy]}",
                    _with_half(found, "token_mean_ms"),
                    found["mean"]["token_p50_ms"],
                    found["mean"]["token_p99_ms"],
                    _with_half(found, "first_token_mean_s", digits=1),
                    found["mean"]["first_token_p99_s"],
                    _with_half(found, "slo_share", 100.0),
                    _with_half(found, "tokens_per_s"),
                    found["mean"]["failed"],
                    found["mean"]["jumps"],
                    found["mean"]["moves"],
                ]
            )
        targets.append(
            [
                run["scenario"],
                _percent(run, "random"),
                _percent(run, "petals_min_latency"),
                _percent(run, "petals_min_latency+folded"),
                _at_best(run),
                _slo_ratio(run),
            ]
        )
    targets.append(["target", "-50 %", "-25 %", None, None, "1.5"])
    header = ["scenario, policy", "ms per token", "p50", "p99", "first token, s", "p99",
              "SLO, %", "tokens/s", "failed", "jumps", "moves"]  # fmt: skip
    swarms = [
        [
            run["scenario"],
            run["servers"],
            run["workload"]["requests_per_s"],
            len(run["seeds"]),
            round(_mean(run, OURS, "requests")),
            run["workload"]["prompt_tokens"],
            run["workload"]["output_tokens"],
            100.0 * _mean(run, OURS, "busy_share"),
            _mean(run, OURS, "tokens_per_tick"),
            _mean(run, OURS, "departures"),
            _mean(run, OURS, "idle_ms"),
            run["cpu_s"] / len(run["seeds"]) / len(run["optimizers"]),
        ]
        for run in result["scenarios"]
    ]
    return {
        "swarms": markdown(
            ["scenario", "servers", "requests/s", "seeds", "requests counted per seed",
             "prompt tokens", "output tokens", "servers busy, %", "tokens per pass", "departures",
             "ms per token, idle swarm", "CPU s per run"], swarms),
        "results": markdown(header, rows),
        "targets": markdown(
            ["ours against", "random: ms per token", "Petals: ms per token",
             "Petals, knowing loads", "random, at best", "SLO attainment, times random's"],
            targets),
    }  # fmt: skip


def _mean(run: dict[str, Any], policy: str, key: str) -> float:
    value: float = run["optimizers"][policy]["mean"][key]
    return value


def _with_half(found: dict[str, Any], key: str, factor: float = 1.0, digits: int = 0) -> str:
    mean, half = found["mean"][key], found["half_interval_95"][key]
    text = f"{factor * mean:.{digits}f}"
    return text if half is None else f"{text} ± {factor * half:.{digits}f}"


def _percent(run: dict[str, Any], other: str) -> str | None:
    """How much less or more ours takes per token than the other policy, seed by seed."""
    if other not in run["optimizers"]:
        return None
    pairs = zip(run["optimizers"][OURS]["seeds"], run["optimizers"][other]["seeds"], strict=True)
    changes = [100.0 * (ours["token_mean_ms"] / o["token_mean_ms"] - 1) for ours, o in pairs]
    mean, half = interval(changes)
    return f"{mean:+.0f} %" if len(changes) < 2 else f"{mean:+.0f} ± {half:.0f} %"


def _at_best(run: dict[str, Any]) -> str:
    """How much less than random's any policy could take, were the swarm idle for everybody."""
    seeds = run["optimizers"]["random"]["seeds"]
    mean, _ = interval([100.0 * (one["idle_ms"] / one["token_mean_ms"] - 1) for one in seeds])
    return f"{mean:+.0f} %"


def _slo_ratio(run: dict[str, Any]) -> str:
    random = _mean(run, "random", "slo_share")
    return f"{_mean(run, OURS, 'slo_share') / random:.2f}" if random else "random has none"


def figures(result: dict[str, Any]) -> dict[str, Any]:
    figure, axes = new_figure(2)
    width = 0.8 / len(POLICIES)
    names = [run["scenario"] for run in result["scenarios"]]
    panels = (("token_mean_ms", 1.0, "ms per token"), ("slo_share", 100.0, "SLO attainment, %"))
    for axis, (key, factor, title) in zip(axes, panels, strict=True):
        for place, (policy, label) in enumerate(POLICIES.items()):
            runs = [
                (i, run["optimizers"][policy])
                for i, run in enumerate(result["scenarios"])
                if policy in run["optimizers"]
            ]
            found = [one for _, one in runs]
            axis.bar(
                [i + (place - (len(POLICIES) - 1) / 2) * width for i, _ in runs],
                [factor * one["mean"][key] for one in found],
                width,
                yerr=[factor * (one["half_interval_95"][key] or 0.0) for one in found],
                label=label,
                capsize=2,
            )
        axis.set_xticks(range(len(names)), names, rotation=20, fontsize="small")
        axis.set(title=title)
    axes[0].legend(fontsize="x-small")
    return {"policies": figure}
