"""Tables and plot of `docs/engine.md` from the results of the engine's benchmarks.

python benchmarks/engine_plot.py
"""

from __future__ import annotations

import json
from typing import Any

from chain.output import fill_in, markdown, new_figure, save, say
from common import RESULTS, median

DOCS = RESULTS.parents[1] / "docs"
LOCAL = "local"


def main() -> None:
    rates = _read("engine")
    save(_plot(rates["cases"]), DOCS / "images" / "engine.png")
    tables = {
        "machine": _machine(rates),
        "rates": _rates([rates]),
        "prompts": _rates([_read("engine_512"), _read("engine_2048")], whole=True),
        "profile": _profile(_read("engine_profile")["profiles"]),
        "families": _families(_read("families")["cases"]),
        "patience": _patience(_read("batch_patience")["cases"]),
        "idle": _idle(_read("engine_profile")["profiles"]),
        "shares": _shares(_read("stage_idle")),
    }
    fill_in(DOCS / "engine.md", "engine", tables)
    for table in tables.values():
        say(f"\n{table}")


def _read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def _machine(result: dict[str, Any]) -> str:
    found = result["environment"]
    processor = f"{found['cpu']}, {found['cores']} cores, {found['memory_gib']} GiB"
    software = f"Python {found['python']}, torch {found['torch']}, "
    rows = [
        ["machine", processor],
        ["threads", f"{result['threads_per_process']} per process"],
        ["software", f"{software}transformers {found['transformers']}"],
        ["commit", f"`{found['commit'][:10]}`"],
        ["load before and after", f"{found['load_before'][0]}, {result['load_after'][0]}"],
    ]
    return markdown(["of the first table", ""], rows)


def _rates(results: list[dict[str, Any]], *, whole: bool = False) -> str:
    """A row for each dtype, prompt and number of sessions; chains as ratios to local.

    `whole` takes rates with prompts and ends in them instead of steady ones.
    """
    prefix = "whole_" if whole else ""
    rows, targets = [], sorted({c["target"] for r in results for c in r["cases"]} - {LOCAL})
    for result in results:
        cases = {(c["dtype"], c["sessions"], c["target"]): c for c in result["cases"]}
        for dtype, sessions in dict.fromkeys((dtype, count) for dtype, count, _ in cases):
            local = cases[dtype, sessions, LOCAL]
            own = [cases[dtype, sessions, target] for target in targets]
            equal, tokens = (sum(c[key] for c in own) for key in ("equal_tokens", "tokens"))
            row = [
                dtype,
                result["settings"]["prompt_tokens"],
                sessions,
                local[f"{prefix}tokens_per_s"],
                *(case[f"{prefix}ratio"] for case in own),
                local["first_token_s"],
                *(case["first_token_ratio"] for case in own),
                f"{100 * equal / tokens:.1f} %",
            ]
            rows.append(row)
    chains = [f"{t} server{'s' * (t != '1')}" for t in targets]
    header = ["dtype", "prompt", "sessions", "local tokens/s", *chains, "local first token, s",
              *chains, "tokens equal"]  # fmt: skip
    return markdown(header, rows)


def _profile(profiles: list[dict[str, Any]]) -> str:
    header = ["ms of a token", *profiles[0]["ms"], "all"]
    rows = [
        [f"{row['dtype']}, {row['target']} servers", *row["ms"].values(), row["token_ms"]]
        for row in profiles
    ]
    return markdown(header, rows)


def _idle(profiles: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{row['dtype']}, {row['target']} servers",
            int(sessions),
            ", ".join(f"{share:.0%}" for share in shares),
        ]
        for row in profiles
        for sessions, shares in row["idle_shares"].items()
    ]
    return markdown(["time without a step to run, by server", "sessions", "share"], rows)


def _shares(result: dict[str, Any]) -> str:
    """A row for each way of sharing cores: medians over the rounds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in result["runs"]:
        runs.setdefault(run["cores"], []).append(run)
    rows = []
    for name, own in runs.items():
        rates = [median(run[key] for run in own) for key in ("single_tokens_per_s", "tokens_per_s")]
        ratio = median(run["ratio"] for run in own)
        idle = zip(*(run["idle_shares"] for run in own), strict=True)
        used = zip(*(run["cores_used"] for run in own), strict=True)
        rows.append(
            [name, *rates, ratio, ", ".join(f"{median(each):.0%}" for each in idle),
             ", ".join(f"{median(each):.2f}" for each in used)]
        )  # fmt: skip
    settings = result["settings"]
    header = [f"{settings['servers']} servers", "1 session, tokens/s",
              f"{settings['sessions']} sessions", "ratio", "servers without a step to run",
              "cores used: client, servers"]  # fmt: skip
    return markdown(header, rows)


def _families(cases: list[dict[str, Any]]) -> str:
    """A row for each family; columns by number of sessions."""
    rows: dict[str, list[Any]] = {}
    for case in cases:
        name, equal = case["family"], 100 * case["equal_tokens"] / case["tokens"]
        row = rows.setdefault(name, [name, round(case["parameters"] / 1e6)])
        row += [case["ratio"], case["first_token_ratio"], f"{equal:.1f} %"]
    counts = sorted({case["sessions"] for case in cases})
    header = ["family", "million parameters"]
    for count in counts:
        sessions = f"{count} session{'s' * (count > 1)}"
        header += [f"{sessions}: tokens/s", "first token", "tokens equal"]
    return markdown(header, list(rows.values()))


def _patience(cases: list[dict[str, Any]]) -> str:
    away = list(dict.fromkeys(case["away_ms"] for case in cases))
    ratios: dict[int, list[float]] = {}
    for case in cases:
        ratios.setdefault(case["sessions"], []).append(case["ratio"])
    header = ["sessions", *(f"{ms:g} ms away" for ms in away)]
    return markdown(header, [[sessions, *found] for sessions, found in ratios.items()])


def _plot(cases: list[dict[str, Any]]) -> Any:
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    figure, axes = new_figure(len(dtypes))
    for axis, dtype in zip(axes, dtypes, strict=True):
        own = [case for case in cases if case["dtype"] == dtype]
        for target in dict.fromkeys(case["target"] for case in own):
            line = [case for case in own if case["target"] == target]
            is_local = target == LOCAL
            axis.plot(
                [case["sessions"] for case in line],
                [case["tokens_per_s"] for case in line],
                label="local, one static batch" if is_local else f"servers: {target}",
                color="black" if is_local else None,
                linestyle="--" if is_local else "-",
                marker="o",
            )
        axis.set(title=dtype, xlabel="sessions", ylabel="tokens/s, steady", ylim=(0, None))
        axis.set_xticks(sorted({case["sessions"] for case in own}))
        axis.legend()
    return figure


if __name__ == "__main__":
    main()
