"""Whether a change made anything slower: the benchmarks of two checkouts, in turns, in one run.

    git worktree add --detach ../before COMMIT
    (cd ../before && python setup.py build_ext --inplace)
    python benchmarks/before_after.py ../before                 some 40 minutes
    python benchmarks/before_after.py ../before --only engine   one benchmark of them

Each round runs every benchmark below once in either checkout, as processes of their own with this
Python, so that what else the machine does meets both alike. The checkout that comes first changes
from round to round. A ratio is after over before of the medians over the rounds; its range is that
of the ratios of the rounds. Lower is better for everything listed. A change is a loss where even
the best round has a ratio above 1, and "noise" otherwise.

Results go to `benchmarks/results/before_after.json`; a table goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import environment, load, median, table, write_result

NAME = "before_after_part"
"""Result files that the benchmarks write on the way; removed when they have been read."""

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark's flags, and what of its result is compared: all of it better when lower."""

    flags: tuple[str, ...]
    metrics: Callable[[Mapping[str, Any]], Metrics]
    result: str = NAME


def engine_metrics(result: Mapping[str, Any]) -> Metrics:
    """Times of the swarm, and of local transformers over the swarm's in the same process."""
    found: Metrics = {}
    for case in result["cases"]:
        if case["target"] == "local":
            continue
        kind = f"{case['dtype']}, {case['sessions']} sessions"
        if case["dtype"] == "float32" and case["equal_tokens"] != case["tokens"]:
            raise SystemExit(f"engine, {kind}: tokens differ from local ones")
        found[f"{kind}: time per token over local"] = 1 / case["ratio"]
        found[f"{kind}: first token over local"] = case["first_token_ratio"]
        found[f"{kind}: CPU ms per token"] = case["cpu_ms_per_token"]
    return found


def failover_metrics(result: Mapping[str, Any]) -> Metrics:
    found: Metrics = {}
    for row in result["summary"]:
        if row["texts_equal"] != row["texts"]:
            raise SystemExit(f"failover, {row['signal']}: texts differ from local ones")
    for signal in sorted({row["signal"] for row in result["summary"]}):
        rows = [row for row in result["summary"] if row["signal"] == signal]
        found[f"{signal}: stall, s"] = median(row["stall_s_median"] for row in rows)
    return found


def crypto_metrics(result: Mapping[str, Any]) -> Metrics:
    sealed = "sealed"
    return {
        "decode step, ms": result["decode_step_ms"][sealed],
        "CPU ms per token": result["cpu_ms_per_token"][sealed],
        "hop beyond arithmetic, ms": result["hop_beyond_arithmetic_ms"][sealed]["p50"],
    }


def startup_metrics(result: Mapping[str, Any]) -> Metrics:
    times = {f"{name}, s": seconds for name, seconds in result["seconds"].items()}
    memory = {
        f"{name}: peak memory over weights": sizes["peak_growth_bytes"] / sizes["weights_bytes"]
        for name, sizes in result["memory"].items()
    }
    return times | memory


BENCHMARKS: Mapping[str, Benchmark] = {
    "engine": Benchmark(
        (*"--dtypes float32 bfloat16 --chains 1 --sessions 1 8 --rounds 1".split(),
         *"--new_tokens 64 --name".split(), NAME),
        engine_metrics,
    ),
    "failover": Benchmark(("--kills", "3", "--stops", "1", "--name", NAME), failover_metrics),
    "crypto_cost": Benchmark(("--rounds", "4", "--name", NAME), crypto_metrics),
    "startup": Benchmark(("--repeat", "3"), startup_metrics, result="startup"),
}  # fmt: skip


def measure(checkout: Path, name: str) -> Metrics:
    """Run one benchmark of one checkout.

    Raises:
        SystemExit: the benchmark failed; its last lines say why.
    """
    benchmark = BENCHMARKS[name]
    path = checkout / "benchmarks" / "results" / f"{benchmark.result}.json"
    kept = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    variables = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, f"benchmarks/{name}.py", *benchmark.flags]
    try:
        done = subprocess.run(
            command, cwd=checkout, env=variables, capture_output=True, text=True, check=False
        )
        if done.returncode or not path.exists():
            last = "\n".join((done.stdout + done.stderr).splitlines()[-8:])
            raise SystemExit(f"{checkout}: {' '.join(command[1:])} failed:\n{last}")
        return benchmark.metrics(json.loads(path.read_text()))
    finally:
        path.unlink(missing_ok=True)
        if kept is not None:
            path.write_bytes(kept)


def compare(before: Sequence[Metrics], after: Sequence[Metrics]) -> list[dict[str, Any]]:
    """A row for every metric that both checkouts have."""
    rows = []
    for name in after[0].keys() & before[0].keys():
        ratios = [new[name] / old[name] for old, new in zip(before, after, strict=True)]
        middle = [median(m[name] for m in metrics) for metrics in (before, after)]
        rows.append(
            {
                "metric": name,
                "before": middle[0],
                "after": middle[1],
                "ratio": middle[1] / middle[0],
                "ratios_of_rounds": [round(ratio, 4) for ratio in ratios],
                "verdict": "loss" if min(ratios) > 1 else "gain" if max(ratios) < 1 else "noise",
            }
        )
    order = list(after[0])
    return sorted(rows, key=lambda row: order.index(row["metric"]))


def check_kernels(checkouts: Mapping[str, Path]) -> None:
    """Refuse to compare a checkout that has its native kernels with one that lacks them."""
    folder = Path("src/planetserve/native")
    without = [path for path in checkouts.values() if not any((path / folder).glob("_kernels*.so"))]
    if 0 < len(without) < len(checkouts):
        raise SystemExit(
            f"{without[0]} has no native kernels: run setup.py build_ext --inplace there"
        )


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{checkout} is no git checkout")
    return done.stdout.strip()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="before_after", help="of the result file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    checkouts = {"before": options.before.resolve(), "after": Path(__file__).parents[1]}
    commits = {name: commit_of(path) for name, path in checkouts.items()}
    check_kernels(checkouts)
    result: dict[str, Any] = {
        "benchmark": "before_after",
        "environment": environment(),
        "commits": commits,
        "rounds": options.rounds,
        "flags": {name: list(BENCHMARKS[name].flags) for name in options.only},
        "results": {},
    }
    lines: list[list[object]] = []
    for name in options.only:
        found: dict[str, list[Metrics]] = {"before": [], "after": []}
        for number in range(options.rounds):
            for side in list(checkouts)[:: 1 if number % 2 == 0 else -1]:
                began_s = time.monotonic()
                found[side].append(measure(checkouts[side], name))
                took_s = time.monotonic() - began_s
                print(f"{name} {side}, round {number + 1}: {took_s:.0f} s", file=sys.stderr)
        rows = result["results"][name] = compare(found["before"], found["after"])
        for row in rows:
            spread = f"{min(row['ratios_of_rounds']):.2f} to {max(row['ratios_of_rounds']):.2f}"
            lines.append(
                [f"{name}, {row['metric']}", row["before"], row["after"], row["ratio"], spread,
                 row["verdict"]]
            )  # fmt: skip
        result["load_after"] = load()
        path = write_result(options.name, result)  # after each, so that none is lost
    print(table(["", "before", "after", "ratio", "of rounds", ""], lines))
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
