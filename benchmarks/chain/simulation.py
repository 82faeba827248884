"""Section `simulation`: what users of whole swarms would see, in simulated time.

Every scenario of `configs/scenarios/`, every policy, several seeds; a seed gives all policies the
same machines, requests and departures. Four of them also under several loads and with other
settings of ours. Times are simulated: the machine that this runs on decides nothing but how long it
takes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import environment

from chain.output import markdown, new_figure, say
from planetserve.simulation.command import simulate
from planetserve.simulation.report import as_document
from planetserve.simulation.scenario import LoadedScenario, load_scenario
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
    "city_14": tuple(POLICIES),
    "continent_100": tuple(POLICIES)[:4],
    "planet_1000": tuple(POLICIES)[:4],
    "planet_10000": _THREE,
}
"""Policies of each: the larger, the fewer."""
LOADS = {
    "home_4": (0.05, 0.2, 0.4, 0.8),
    "city_14": (0.1, 0.2, 0.5),
    "continent_100": (0.3, 1.2),
    "planet_1000": (10.0,),
}
"""Requests per second, besides the scenario's own; at home and in the city up to more than the
swarm can serve."""
SETTINGS = {
    "as by default": OURS,
    "load prior 0.25": "shortest_path:load_prior=0.25",
    "load prior 0.5": "shortest_path:load_prior=0.5",
    "jitter 0": "shortest_path:cost_jitter=0",
    "jitter 5 %": "shortest_path:cost_jitter=0.05",
    "moving": "shortest_path+moves",
    "informed": "shortest_path+informed",
}
"""Of ours. Informed clients know every load of the moment."""
_SET = {"home_4": 0.4, "city_14": 0.4, "continent_100": 0.6, "planet_1000": 20.0}
"""Where they are compared, and at which rate."""
SEEDS = 5
_FEWER_SEEDS = 3
"""On the planets, under other loads and for settings."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What is measured in one go."""

    scenario: str
    policies: tuple[str, ...]
    requests_per_s: float | None = None
    """None leaves the scenario's own."""
    seeds: int = _FEWER_SEEDS


PARTS = {
    **{
        name: _Part(name, policies, seeds=_FEWER_SEEDS if name.startswith("planet") else SEEDS)
        for name, policies in SCENARIOS.items()
    },
    **{
        f"{name}_at_{rate:g}": _Part(name, _THREE, rate)
        for name, rates in LOADS.items()
        for rate in rates
    },
    **{
        f"{name}_settings": _Part(name, tuple(SETTINGS.values()), rate)
        for name, rate in _SET.items()
    },
}


def measure(quick: bool, parts: Sequence[str] = tuple(PARTS)) -> dict[str, Any]:
    """The run of each part."""
    return {name: _measured(PARTS[name], quick) for name in (parts[:1] if quick else parts)}


def _measured(part: _Part, quick: bool) -> dict[str, Any]:
    changes = {} if part.requests_per_s is None else {"requests_per_s": part.requests_per_s}
    if quick:
        changes |= {"warmup_s": 0.0, "duration_s": 60.0}
    loaded = load_scenario(part.scenario).with_workload(**changes)
    settings = environment()
    started_s = time.process_time()
    run = _run(loaded, part.policies, range(2 if quick else part.seeds))
    cpu_s = round(time.process_time() - started_s, 1)
    return {"date": settings["date"], "commit": settings["commit"], "cpu_s": cpu_s, **run}


def _run(loaded: LoadedScenario, policies: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    shown: set[str] = set()

    def progress(what: str, _share: float) -> None:
        if what not in shown:
            shown.add(what)
            say(f"  {what}")

    return as_document(loaded, seeds, simulate(loaded, policies, seeds, progress))


def tables(result: dict[str, Any]) -> dict[str, str]:
    runs = _scenarios(result)
    header = ["scenario, policy", "ms per token", "p50", "p99", "normalised", "first token, s",
              "p99", "SLO, %", "tokens/s", "failed", "jumps", "moves"]  # fmt: skip
    rows = [
        [
            f"{run['scenario']}, {POLICIES[policy]}",
            _with_half(found, "token_mean_ms"),
            found["mean"]["token_p50_ms"],
            found["mean"]["token_p99_ms"],
            _with_half(found, "normalised_mean_ms"),
            _with_half(found, "first_token_mean_s", digits=1),
            found["mean"]["first_token_p99_s"],
            _with_half(found, "slo_share", 100.0),
            _with_half(found, "tokens_per_s"),
            found["mean"]["failed"],
            found["mean"]["jumps"],
            found["mean"]["moves"],
        ]
        for run in runs
        for policy, found in run["optimizers"].items()
    ]
    targets = [
        [
            run["scenario"],
            _change(run, "random", "token_mean_ms"),
            _at_best(run, "random"),
            _change(run, "random", "normalised_mean_ms"),
            _change(run, "petals_min_latency", "token_mean_ms"),
            _at_best(run, "petals_min_latency"),
            _change(run, "petals_min_latency", "normalised_mean_ms"),
            _slo_ratio(run),
        ]
        for run in runs
    ]
    targets.append(["target", "-50 %", None, None, "-25 %", None, None, "1.5"])
    return {
        "swarms": markdown(
            ["scenario", "servers", "requests/s", "seeds", "requests counted per seed",
             "prompt tokens", "output tokens", "servers busy, %", "tokens per pass", "departures",
             "ms per token, idle swarm", "CPU s per run"],
            [_swarm(run) for run in runs]),
        "results": markdown(header, rows),
        "targets": markdown(
            ["ours against", "random: ms per token", "the same at best", "normalised",
             "Petals: ms per token", "the same at best", "normalised",
             "SLO attainment, times random's"], targets),
        "loads": markdown(
            ["scenario, requests/s", *(f"{POLICIES[policy]}, normalised" for policy in _THREE),
             "ours against Petals, normalised", "the same, ms per token",
             "failed, %: random / Petals / ours", "SLO, %: the same"],
            [_load(run) for name in LOADS for run in _loads(result, name)]),
        "settings": markdown(
            ["scenario, requests/s", *SETTINGS],
            [_settings(result[f"{name}_settings"], row) for row in _SETTING_ROWS for name in _SET
             if f"{name}_settings" in result]),
    }  # fmt: skip


def _scenarios(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of whole scenarios, as far as there are any."""
    return [result[name] for name in SCENARIOS if name in result]


def _loads(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A scenario's runs under every load, ascending."""
    parts = (name, *(f"{name}_at_{rate:g}" for rate in LOADS[name]))
    return sorted((result[part] for part in parts if part in result), key=_rate)


def _rate(run: dict[str, Any]) -> float:
    rate: float = run["workload"]["requests_per_s"]
    return rate


def _swarm(run: dict[str, Any]) -> list[object]:
    return [
        run["scenario"],
        run["servers"],
        _rate(run),
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


def _load(run: dict[str, Any]) -> list[object]:
    failed = [100 * _mean(run, name, "failed") / _mean(run, name, "requests") for name in _THREE]
    attained = [100 * _mean(run, name, "slo_share") for name in _THREE]
    return [
        f"{run['scenario']}, {_rate(run):g}",
        *(_with_half(run["optimizers"][name], "normalised_mean_ms") for name in _THREE),
        _change(run, "petals_min_latency", "normalised_mean_ms"),
        _change(run, "petals_min_latency", "token_mean_ms"),
        " / ".join(f"{share:.0f}" for share in failed),
        " / ".join(f"{share:.0f}" for share in attained),
    ]


_SETTING_ROWS = (
    ("ms per token", "token_mean_ms", 1.0),
    ("normalised", "normalised_mean_ms", 1.0),
    ("SLO, %", "slo_share", 100.0),
)


def _settings(run: dict[str, Any], row: tuple[str, str, float]) -> list[object]:
    what, key, factor = row
    return [
        f"{run['scenario']}, {_rate(run):g}: {what}",
        *(_with_half(run["optimizers"][policy], key, factor) for policy in SETTINGS.values()),
    ]


def _mean(run: dict[str, Any], policy: str, key: str) -> float:
    value: float = run["optimizers"][policy]["mean"][key]
    return value


def _with_half(found: dict[str, Any], key: str, factor: float = 1.0, digits: int = 0) -> str:
    mean, half = found["mean"][key], found["half_interval_95"][key]
    text = f"{factor * mean:.{digits}f}"
    return text if half is None else f"{text} ± {factor * half:.{digits}f}"


def _change(run: dict[str, Any], other: str, key: str) -> str:
    """How much less or more ours has of `key` than the other policy, seed by seed."""
    pairs = zip(run["optimizers"][OURS]["seeds"], run["optimizers"][other]["seeds"], strict=True)
    return _percent([100.0 * (ours[key] / theirs[key] - 1) for ours, theirs in pairs])


def _at_best(run: dict[str, Any], other: str) -> str:
    """How much less per token any policy could take, were the swarm idle for everybody."""
    seeds = run["optimizers"][other]["seeds"]
    mean, _ = interval([100.0 * (one["idle_ms"] / one["token_mean_ms"] - 1) for one in seeds])
    return f"{mean:+.0f} %"


def _percent(changes: Sequence[float]) -> str:
    mean, half = interval(changes)
    return f"{mean:+.0f} %" if len(changes) < 2 else f"{mean:+.0f} ± {half:.0f} %"


def _slo_ratio(run: dict[str, Any]) -> str:
    random = _mean(run, "random", "slo_share")
    return f"{_mean(run, OURS, 'slo_share') / random:.2f}" if random else "random has none"


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {"policies": _by_policy(_scenarios(result)), "loads": _by_load(result)}


def _by_policy(runs: list[dict[str, Any]]) -> Any:
    figure, axes = new_figure(3)
    width = 0.8 / len(POLICIES)
    panels = (
        ("token_mean_ms", 1.0, "ms per token"),
        ("normalised_mean_ms", 1.0, "normalised latency, ms per token"),
        ("slo_share", 100.0, "SLO attainment, %"),
    )
    for axis, (key, factor, title) in zip(axes, panels, strict=True):
        for place, (policy, label) in enumerate(POLICIES.items()):
            has = [(i, run["optimizers"]) for i, run in enumerate(runs)]
            found = [(i, one[policy]) for i, one in has if policy in one]
            axis.bar(
                [i + (place - (len(POLICIES) - 1) / 2) * width for i, _ in found],
                [factor * one["mean"][key] for _, one in found],
                width,
                yerr=[factor * (one["half_interval_95"][key] or 0.0) for _, one in found],
                label=label,
                capsize=2,
            )
        names = [run["scenario"] for run in runs]
        axis.set_xticks(range(len(names)), names, rotation=20, fontsize="small")
        axis.set(title=title)
    axes[0].legend(fontsize="x-small")
    return figure


def _by_load(result: dict[str, Any]) -> Any:
    shown = [name for name in LOADS if len(_loads(result, name)) > 1]
    figure, axes = new_figure(max(1, len(shown)))
    for axis, name in zip(axes, shown, strict=False):
        runs = _loads(result, name)
        for policy in _THREE:
            found = [run["optimizers"][policy] for run in runs]
            axis.errorbar(
                [_rate(run) for run in runs],
                [one["mean"]["normalised_mean_ms"] for one in found],
                yerr=[one["half_interval_95"]["normalised_mean_ms"] or 0.0 for one in found],
                label=POLICIES[policy],
                marker="o",
                capsize=2,
            )
        axis.set(
            title=name,
            xlabel="requests per second",
            ylabel="normalised latency, ms per token",
            xlim=(0, None),
            ylim=(0, None),
        )
        axis.legend(fontsize="small")
    return figure
