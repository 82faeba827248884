"""Tokens per second through a swarm on this machine, against transformers alone.

    python benchmarks/engine.py            everything: 20 minutes or more
    python benchmarks/engine.py --quick    one round of a few cases
    python benchmarks/engine.py --profile  where each millisecond of a token goes

Local transformers (single stream, and one static batch of as many rows as there are sessions) and
chains of servers on loopback, each server a process of its own with one thread, take turns within
one invocation. Sessions are threads that call `generate()` on one client model. Every token is
compared with what local transformers generates greedily for that prompt alone. The model is a
random Llama of 134 million parameters made on the fly.

Rates are steady: counted from when the last session has its first token to when the first session
has its last one; "whole" ratios have prompts and ends in them. "CPU ms" is the processor time per
new token of all processes, prompts included. Results go to `benchmarks/results/engine.json`, a
table to stdout, and `engine_plot.py` makes the plot.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import stamps
import token_profile
import torch
from common import cpu_seconds, environment, load, median, percentile, table, write_result
from processes import children, make_checkpoint, prepare, start_bootstrap, start_servers
from transformers import AutoModelForCausalLM, StoppingCriteria

from planetserve import AutoDistributedModelForCausalLM
from planetserve.model.checkpoint import Checkpoint

LOCAL = "local"
SHAPE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Run:
    """One measurement of one case."""

    tokens_per_s: float
    whole_tokens_per_s: float
    first_token_s: float
    gaps_s: list[float]
    cpu_s: float
    num_equal: int
    num_tokens: int
    steady_s: tuple[float, float]
    """From when to when all sessions write, on the monotonic clock."""


@dataclass
class Case:
    """All measurements of `sessions` at once on `target` (local, or a number of servers)."""

    dtype: str
    target: str
    sessions: int
    runs: list[Run] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        gaps = [gap for run in self.runs for gap in run.gaps_s]
        return {
            "dtype": self.dtype,
            "target": self.target,
            "sessions": self.sessions,
            "tokens_per_s": median(run.tokens_per_s for run in self.runs),
            "tokens_per_s_of_each_run": [round(run.tokens_per_s, 2) for run in self.runs],
            "whole_tokens_per_s": median(run.whole_tokens_per_s for run in self.runs),
            "first_token_s": median(run.first_token_s for run in self.runs),
            "token_ms_p50": 1000 * median(gaps),
            "token_ms_p95": 1000 * percentile(gaps, 95),
            "cpu_ms_per_token": 1000 * median(run.cpu_s / run.num_tokens for run in self.runs),
            "equal_tokens": sum(run.num_equal for run in self.runs),
            "tokens": sum(run.num_tokens for run in self.runs),
        }


class Stopwatch(StoppingCriteria):
    """Notes when each token of a `generate()` call is there; never stops it."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        input_ids[0, -1].item()  # waits for the device, if it is not the CPU
        self.times_s.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Bench:
    """The prompts, what they must become, and one way to run them."""

    def __init__(self, options: argparse.Namespace, checkpoint: Path):
        self.options = options
        generator = torch.Generator().manual_seed(1)
        shape = (max(options.sessions), options.prompt_tokens)
        vocab_size = Checkpoint.open(str(checkpoint)).config.vocab_size
        self.prompts_BT = torch.randint(3, vocab_size, shape, generator=generator)
        self.expected: list[list[int]] = []

    def timed(self, run: Callable[[Any, int], Run], model: Any, sessions: int) -> Run:
        """`run`, with the processor time that this process and all it started spent on it."""
        before_s = cpu_seconds()
        measured = run(model, sessions)
        return replace(measured, cpu_s=cpu_seconds() - before_s)

    def expect(self, local: Any) -> None:
        """Generate what every session must produce, prompt by prompt."""
        self.expected = []
        for index in range(len(self.prompts_BT)):
            progress(f"reference tokens {index + 1}/{len(self.prompts_BT)}")
            self.expected += self.generate(local, self.prompts_BT[[index]])[0]

    def run_local(self, model: Any, sessions: int) -> Run:
        """One static batch."""
        started_s = time.perf_counter()
        rows, times_s = self.generate(model, self.prompts_BT[:sessions])
        return self._run(started_s, rows, [times_s] * sessions)

    def run_swarm(self, model: Any, sessions: int) -> Run:
        """Threads that start at the same time."""
        results: list[tuple[list[list[int]], list[float]] | None] = [None] * sessions

        def session(index: int) -> None:
            results[index] = self.generate(model, self.prompts_BT[[index]])

        threads = [threading.Thread(target=session, args=(i,)) for i in range(sessions)]
        started_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done = [result for result in results if result is not None]
        if len(done) < sessions:
            raise SystemExit(f"{sessions - len(done)} of {sessions} sessions failed; see above")
        return self._run(started_s, [rows[0] for rows, _ in done], [times for _, times in done])

    def generate(self, model: Any, prompts_BT: torch.Tensor) -> tuple[list[list[int]], list[float]]:
        watch = Stopwatch()
        prompts_BT = prompts_BT.to(model.device)
        output = model.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            max_new_tokens=self.options.new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[watch],
        )
        return output[:, prompts_BT.shape[1] :].tolist(), watch.times_s

    def _run(self, started_s: float, rows: list[list[int]], times_s: list[list[float]]) -> Run:
        begin_s = max(times[0] for times in times_s)
        end_s = max(begin_s, min(times[-1] for times in times_s))
        steady = sum(begin_s < moment <= end_s for times in times_s for moment in times)
        elapsed_s = max(times[-1] for times in times_s) - started_s
        pairs = [
            (token, wanted)
            for row, expected in zip(rows, self.expected, strict=False)
            for token, wanted in zip(row, expected, strict=True)
        ]
        return Run(
            tokens_per_s=steady / (end_s - begin_s) if end_s > begin_s else float("nan"),
            whole_tokens_per_s=sum(map(len, times_s)) / elapsed_s,
            first_token_s=median(times[0] - started_s for times in times_s),
            gaps_s=[b - a for times in times_s for a, b in zip(times, times[1:], strict=False)],
            cpu_s=0.0,
            num_equal=sum(token == wanted for token, wanted in pairs),
            num_tokens=len(pairs),
            steady_s=(begin_s, end_s),
        )


def progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


@dataclass(frozen=True)
class Swarm:
    """A client's model, the process ids of its servers, and a folder for what these write."""

    client: Any
    pids: list[int]
    folder: Path


@contextmanager
def swarms(checkpoint: Path, dtype: str, options: argparse.Namespace) -> Iterator[dict[str, Swarm]]:
    """Swarms by number of servers; they run for as long as the block does."""
    module = "stamps" if options.profile else "planetserve.run_server"
    num_blocks = Checkpoint.open(str(checkpoint)).num_blocks
    with ExitStack() as stack:
        started = stack.enter_context(children())
        if options.profile:
            os.environ.update(token_profile.server_environment(started.folder))
        peers = start_bootstrap(started)
        found = {}
        for num_servers in options.chains:
            progress(f"{dtype}: starting {num_servers} servers")
            prefix = f"bench-{num_servers}"
            servers = start_servers(
                started, checkpoint, num_blocks, num_servers,
                "--initial_peers", *peers, "--torch_dtype", dtype,
                "--device", options.device, "--dht_prefix", prefix,
                "--linear_backend", options.linear_backend,
                "--attn_cache_tokens", str(options.cache_tokens),
                "--inference_max_length", str(options.cache_tokens), module=module,
            )  # fmt: skip
            client = AutoDistributedModelForCausalLM.from_pretrained(
                str(checkpoint), initial_peers=peers, dht_prefix=prefix, torch_dtype=dtype,
                show_route=False,
            )  # fmt: skip
            pids = [server.process.pid for server in servers]
            found[str(num_servers)] = Swarm(stack.enter_context(client), pids, started.folder)
        yield found


def measure(
    checkpoint: Path, dtype: str, options: argparse.Namespace, local_folder: Path | None = None
) -> list[Case]:
    """All cases of one dtype, in alternating rounds.

    `local_folder`: what transformers loads, where it cannot read the checkpoint as it is stored.
    """
    bench = Bench(options, checkpoint)
    folder = local_folder or checkpoint
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    local = local.to(options.device).eval()
    bench.expect(local)
    with swarms(checkpoint, dtype, options) as found:
        cases = [
            Case(dtype, target, sessions)
            for sessions in options.sessions
            for target in (LOCAL, *found)
        ]
        for swarm in found.values():
            bench.run_swarm(swarm.client, 1)
        for number in range(options.rounds):
            for case in cases:
                if case.target == LOCAL:
                    run = bench.timed(bench.run_local, local, case.sessions)
                else:
                    run = bench.timed(bench.run_swarm, found[case.target].client, case.sessions)
                case.runs.append(run)
                progress(
                    f"round {number + 1}/{options.rounds} {dtype} {case.target} "
                    f"x{case.sessions}: {run.tokens_per_s:.1f} tokens/s"
                )
    return cases


def measure_profile(
    checkpoint: Path, dtype: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Where the time of one session's tokens goes, for every chain."""
    bench = Bench(options, checkpoint)
    noted: stamps.Stamps = []
    stamps.note_client(noted)
    rows = []
    with swarms(checkpoint, dtype, options) as found:
        for target, swarm in found.items():
            bench.generate(swarm.client, bench.prompts_BT[[0]])
            token_profile.collect(swarm.folder, swarm.pids)
            noted.clear()
            bench.generate(swarm.client, bench.prompts_BT[[0]])
            servers = token_profile.collect(swarm.folder, swarm.pids)
            row = {"dtype": dtype, "target": target, **token_profile.profile(noted, servers)}
            row["idle_shares"] = {
                sessions: run_and_idle_shares(bench, swarm, sessions)[1]
                for sessions in options.sessions
                if sessions > 1
            }
            rows.append(row)
    return rows


def run_and_idle_shares(bench: Bench, swarm: Swarm, sessions: int) -> tuple[Run, list[float]]:
    """Sessions write at once; how much of the time each server of the chain has nothing to run."""
    token_profile.collect(swarm.folder, swarm.pids)
    run = bench.run_swarm(swarm.client, sessions)
    begin_s, end_s = run.steady_s
    if end_s <= begin_s:
        raise SystemExit("some sessions ended before others began; give more --new_tokens")
    servers = token_profile.collect(swarm.folder, swarm.pids)
    return run, [token_profile.idle_share(stamps, begin_s, end_s) for stamps in servers]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one round of a few cases")
    add("--profile", action="store_true", help="stamps along a token's way instead of rates")
    add("--dtypes", nargs="+", default=["float32", "bfloat16"])
    add("--chains", nargs="+", type=int, default=[1, 2, 3], help="numbers of servers")
    add("--sessions", nargs="+", type=int, default=[1, 4, 8, 16])
    add("--prompt_tokens", type=int, default=128)
    add("--new_tokens", type=int, default=128)
    add("--rounds", type=int, default=3)
    add("--device", default="cpu", help="of the servers and of local transformers")
    add("--linear_backend", default="auto")
    add("--cache_tokens", type=int, default=8192)
    add("--model", type=Path, help="a folder with a checkpoint, instead of making one")
    add("--name", help="of the result file; default: engine or engine_profile")
    options = parser.parse_args(argv)
    options.name = options.name or ("engine_profile" if options.profile else "engine")
    if options.quick:
        options.dtypes, options.chains, options.sessions = ["float32"], [1], [1, 4]
        options.rounds, options.new_tokens = 1, 16
    return options


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Ratios to local transformers with as many sessions, in the same run."""
    local = {(row["dtype"], row["sessions"]): row for row in rows if row["target"] == LOCAL}
    for row in rows:
        base = local[row["dtype"], row["sessions"]]
        row["ratio"] = row["tokens_per_s"] / base["tokens_per_s"]
        row["whole_ratio"] = row["whole_tokens_per_s"] / base["whole_tokens_per_s"]
        row["first_token_ratio"] = row["first_token_s"] / base["first_token_s"]


def report(rows: list[dict[str, Any]]) -> str:
    """The table."""
    add_ratios(rows)
    lines = []
    for row in rows:
        target = LOCAL if row["target"] == LOCAL else f"{row['target']} servers"
        equal = f"{row['equal_tokens']}/{row['tokens']}"
        lines.append(
            [f"{row['dtype']} {target}", row["sessions"], row["tokens_per_s"], row["ratio"],
             row["whole_ratio"], row["token_ms_p50"], row["token_ms_p95"], row["first_token_s"],
             row["first_token_ratio"], row["cpu_ms_per_token"], equal]
        )  # fmt: skip
    header = ["", "sessions", "tokens/s", "ratio", "whole", "p50 ms", "p95 ms", "first s", "ratio",
              "CPU ms", "equal"]  # fmt: skip
    return table(header, lines)


def profile_report(rows: list[dict[str, Any]]) -> str:
    """The tables of `--profile`: milliseconds of a token, and how idle servers are."""
    names = [f"{row['dtype']} {row['target']} servers" for row in rows]
    header = ["ms of a token", *token_profile.KINDS, "all", "tokens"]
    parts = table(
        header,
        [
            [name, *row["ms"].values(), row["token_ms"], row["tokens"]]
            for name, row in zip(names, rows, strict=True)
        ],
    )
    idle = [
        [name, sessions, ", ".join(f"{share:.0%}" for share in shares)]
        for name, row in zip(names, rows, strict=True)
        for sessions, shares in row["idle_shares"].items()
    ]
    return f"{parts}\n\n{table(['', 'sessions', 'servers without a step to run'], idle)}"


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    prepare()
    result: dict[str, Any] = {
        "benchmark": "engine",
        "environment": environment(),
        "settings": {key: str(v) if key == "model" else v for key, v in vars(options).items()},
        "model": SHAPE,
        "threads_per_process": 1,
    }
    if options.device.startswith("cuda"):
        result["gpu"] = torch.cuda.get_device_name(options.device)
    cases: list[Case] = []
    profiles: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="planetserve-bench-model-") as folder:
        checkpoint = options.model or make_checkpoint(Path(folder), SHAPE)
        for dtype in options.dtypes:
            if options.profile:
                profiles += measure_profile(checkpoint, dtype, options)
            else:
                cases += measure(checkpoint, dtype, options)
            gc.collect()
    result["load_after"] = load()
    if options.profile:
        result["profiles"] = profiles
        print(profile_report(profiles))
    else:
        result["cases"] = rows = [case.summary() for case in cases]
        print(report(rows))
    print(f"load before {result['environment']['load_before']}, after {result['load_after']}")
    print(f"written to {write_result(options.name, result)}")


if __name__ == "__main__":
    main()
