"""Summaries as a table for people and as plain values for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from planetserve.simulation.scenario import LoadedScenario
from planetserve.simulation.summary import Summary, interval

_COLUMNS = (
    ("ms/token", "token_mean_ms", 1.0, ".0f"),
    ("p50", "token_p50_ms", 1.0, ".0f"),
    ("p99", "token_p99_ms", 1.0, ".0f"),
    ("first s", "first_token_mean_s", 1.0, ".1f"),
    ("p99", "first_token_p99_s", 1.0, ".1f"),
    ("SLO %", "slo_share", 100.0, ".0f"),
    ("tokens/s", "tokens_per_s", 1.0, ".0f"),
    ("failed", "failed", 1.0, ".1f"),
    ("jumps", "jumps", 1.0, ".1f"),
    ("moves", "moves", 1.0, ".1f"),
)
"""Heading, field, factor, format."""


def as_text(loaded: LoadedScenario, found: Mapping[str, Sequence[Summary]]) -> str:
    """A table: one optimizer a line, means over seeds with half of the 95 % interval."""
    scenario = loaded.scenario
    requests = interval([s.requests for s in next(iter(found.values()))])[0]
    header = ["", "against first", *(title for title, *_ in _COLUMNS)]
    rows = [header]
    first = next(iter(found))
    for name, runs in found.items():
        against = "" if name == first else _against(runs, found[first])
        cells = [
            _cell([factor * s.values()[key] for s in runs], form)
            for _, key, factor, form in _COLUMNS
        ]
        rows.append([name, against, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    seeds = len(found[first])
    return "\n".join(
        [
            f"{scenario.name}: {scenario.machines.count} servers, "
            f"{scenario.workload.requests_per_s:g} requests/s, {requests:.0f} requests counted, "
            f"{seeds} seed{'s' if seeds > 1 else ''}; "
            f"{interval([s.idle_ms for s in found[first]])[0]:.0f} ms/token on an idle swarm",
            "",
            *lines,
            "",
            "means over seeds ± half of the 95 % confidence interval; against first: mean ms/token",
            "",
        ]
    )


def _against(runs: Sequence[Summary], first: Sequence[Summary]) -> str:
    changes = [
        100 * (one.token_mean_ms / other.token_mean_ms - 1)
        for one, other in zip(runs, first, strict=True)
    ]
    return _cell(changes, "+.0f") + " %"


def _cell(values: Sequence[float], form: str) -> str:
    mean, half = interval(values)
    return f"{mean:{form}}" + ("" if math.isnan(half) else f" ±{half:{form.lstrip('+')}}")


def as_document(
    loaded: LoadedScenario, seeds: Sequence[int], found: Mapping[str, Sequence[Summary]]
) -> dict[str, Any]:
    """Plain values: what was simulated, and for each optimizer mean, interval and every seed."""
    scenario = loaded.scenario
    return {
        "scenario": scenario.name,
        "servers": scenario.machines.count,
        "workload": scenario.workload.model_dump(),
        "seeds": list(seeds),
        "optimizers": {
            name: {
                "mean": _each(runs, lambda values: interval(values)[0]),
                "half_interval_95": _each(runs, lambda values: interval(values)[1]),
                "seeds": [_finite(summary.values()) for summary in runs],
            }
            for name, runs in found.items()
        },
    }


def _each(runs: Sequence[Summary], reduce: Any) -> dict[str, float | None]:
    names = runs[0].values()
    return _finite({name: reduce([run.values()[name] for run in runs]) for name in names})


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
