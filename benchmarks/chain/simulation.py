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

SCENARIOS = ("home_4", "city_14", "continent_100", "planet_1000", "planet_10000")
OURS = "shortest_path+moves"
"""What a client does by default."""
STAYING = "shortest_path"
NO_MOVES = ("planet_1000", "planet_10000")
"""Where answers end before a session may move: it looks every 10 s, and must find a better chain
three times in a row."""
POLICIES = {
    "random": "random chains",
    "petals_min_latency": "Petals",
    "petals_min_latency+folded": "Petals, knowing loads",
    STAYING: "ours, staying",
    OURS: "ours",
}
SEEDS = 5


def measure(quick: bool) -> dict[str, Any]:
    runs = []
    for name in SCENARIOS[:1] if quick else SCENARIOS:
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
        policies = [text for text in POLICIES if text != OURS or name not in NO_MOVES]
        found = simulate(loaded, policies, seeds, progress)
        document = as_document(loaded, seeds, found)
        runs.append({**document, "cpu_s": round(time.process_time() - started_s, 1)})
    return {"scenarios": runs}


def tables(result: dict[str, Any]) -> dict[str, str]:
    rows, targets = [], []
    for run in result["scenarios"]:
        for policy, found in run["optimizers"].items():
            title = POLICIES[policy] if OURS in run["optimizers"] else _WITHOUT_MOVES[policy]
            rows.append(
                [
                    f"{run['scenario']}, {title}",
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
                _slo_ratio(run),
            ]
        )
    targets.append(["target", "-50 %", "-25 %", None, "1.5"])
    first = result["scenarios"][0]
    seeds = len(first["seeds"])
    header = ["scenario, policy", "ms per token", "p50", "p99", "first token, s", "p99",
              "SLO, %", "tokens/s", "failed", "jumps", "moves"]  # fmt: skip
    swarms = [
        [
            run["scenario"],
            run["servers"],
            run["workload"]["requests_per_s"],
            round(_mean(run, _ours(run), "requests")),
            run["workload"]["prompt_tokens"],
            run["workload"]["output_tokens"],
            100.0 * _mean(run, _ours(run), "busy_share"),
            _mean(run, _ours(run), "tokens_per_tick"),
            _mean(run, _ours(run), "departures"),
            run["cpu_s"] / seeds / len(run["optimizers"]),
        ]
        for run in result["scenarios"]
    ]
    return {
        "swarms": markdown(
            ["scenario", "servers", "requests/s", "requests counted per seed", "prompt tokens",
             "output tokens", "servers busy, %", "tokens per pass", "departures",
             "CPU s per run"], swarms),
        "results": markdown(header, rows),
        "targets": markdown(
            ["ours against", "random: ms per token", "Petals: ms per token",
             "Petals, knowing loads", "SLO attainment, times random's"], targets),
    }  # fmt: skip


_WITHOUT_MOVES = {**POLICIES, STAYING: POLICIES[OURS]}


def _ours(run: dict[str, Any]) -> str:
    return OURS if OURS in run["optimizers"] else STAYING


def _mean(run: dict[str, Any], policy: str, key: str) -> float:
    value: float = run["optimizers"][policy]["mean"][key]
    return value


def _with_half(found: dict[str, Any], key: str, factor: float = 1.0, digits: int = 0) -> str:
    mean, half = factor * found["mean"][key], factor * (found["half_interval_95"][key] or 0.0)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def _percent(run: dict[str, Any], other: str) -> str:
    """How much less or more ours takes per token than the other policy, seed by seed."""
    pairs = zip(
        run["optimizers"][_ours(run)]["seeds"], run["optimizers"][other]["seeds"], strict=True
    )
    changes = [100.0 * (ours["token_mean_ms"] / o["token_mean_ms"] - 1) for ours, o in pairs]
    mean, half = interval(changes)
    return f"{mean:+.0f} ± {half:.0f} %"


def _slo_ratio(run: dict[str, Any]) -> str:
    random = _mean(run, "random", "slo_share")
    return f"{_mean(run, _ours(run), 'slo_share') / random:.2f}" if random else "random has none"


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
