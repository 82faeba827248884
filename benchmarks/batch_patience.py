"""What it brings that a server's passes wait for decode steps that are about to come back.

    python benchmarks/batch_patience.py            a few minutes
    python benchmarks/batch_patience.py --quick    fewer cases, one round

An engine of one thread runs all blocks of a random Llama of 134 million parameters. Each session
hands in its next decode step a fixed time after its last result, as a client does that needs so
long for the rest of a token and for the way there and back. Rates without waiting and with it are
taken in turn within one invocation; every output must be the same.

Results go to `benchmarks/results/batch_patience.json`; a table goes to stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import environment, load, median, table, write_result
from engine import SHAPE, progress
from processes import make_checkpoint

from planetserve.clock import SystemClock
from planetserve.engine.config import EngineConfig
from planetserve.engine.engine import Engine
from planetserve.engine.span_runner import SpanRunner
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.linear import convert_span
from planetserve.model.span_blocks import SpanBlocks
from planetserve.types import BlockSpan
from planetserve.wire.step import RowSlice, StepTable

PAGE_SIZE = 16
CACHE_TOKENS = 16384
_STAGGER_S = 0.007
"""Between the beginnings of sessions."""
_WARM_STEPS = 16
"""Steps of each session that are not timed: what is waited for must be known first."""


async def write(
    engine: Engine, key: bytes, options: argparse.Namespace, away_s: float
) -> tuple[torch.Tensor, list[float]]:
    """One session: its outputs, and when each decode step was done."""
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    engine.open_session(key, "peer", 1, options.prompt_tokens + _WARM_STEPS + options.steps)
    # Together they would share passes by chance, and go on so whatever the engine does.
    await asyncio.sleep(generator.initial_seed() * _STAGGER_S)
    outputs, times_s = [], []
    start = 0
    for count in [options.prompt_tokens, *[1] * (_WARM_STEPS + options.steps)]:
        hidden_TD = torch.randn(count, SHAPE["hidden_size"], generator=generator)
        done = engine.submit(key, StepTable((RowSlice(0, start, count),)), hidden_TD)
        outputs.append((await done)[-1])
        times_s.append(time.perf_counter())
        start += count
        await asyncio.sleep(away_s)
    engine.close_session(key)
    return torch.stack(outputs), times_s[1 + _WARM_STEPS :]


async def run(
    runner: SpanRunner, options: argparse.Namespace, patience: float, sessions: int, away_ms: float
) -> tuple[float, torch.Tensor]:
    """Steady tokens per second of all sessions, and their outputs."""
    config = EngineConfig(CACHE_TOKENS, PAGE_SIZE, batch_delay_factor=patience, num_threads=1)
    engine = Engine(runner, config, SystemClock())
    engine.start()
    try:
        keys = [index.to_bytes(8, "big") for index in range(sessions)]
        texts = await asyncio.gather(*(write(engine, key, options, away_ms / 1000) for key in keys))
    finally:
        engine.close()
    begin_s = max(times_s[0] for _, times_s in texts)
    end_s = min(times_s[-1] for _, times_s in texts)
    done = sum(begin_s < at_s <= end_s for _, times_s in texts for at_s in times_s)
    return done / (end_s - begin_s), torch.stack([outputs for outputs, _ in texts])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer cases, one round")
    add("--rounds", type=int, default=3, help="runs of each case")
    add("--sessions", type=int, nargs="+", default=[1, 2, 4, 8], help="at once")
    add("--away_ms", type=float, nargs="+", default=[1, 3, 10], help="from a result to a step")
    add("--prompt_tokens", type=int, default=64, help="of each session")
    add("--patience", type=float, default=0.5, help="setting of the engine, compared with 0")
    add("--steps", type=int, default=60, help="decode steps of each session")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.sessions, options.away_ms = 1, [2, 8], [3]
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "benchmark": "batch_patience",
        "environment": environment(),
        "settings": vars(options),
        "model": SHAPE,
        "cases": [],
    }
    with tempfile.TemporaryDirectory(prefix="planetserve-bench-model-") as folder:
        make_checkpoint(Path(folder), SHAPE)
        span = BlockSpan(0, SHAPE["num_hidden_layers"])
        blocks = SpanBlocks.load(Checkpoint.open(folder), span, torch.float32)
    convert_span(blocks, "auto")
    runner = SpanRunner(blocks, CACHE_TOKENS // PAGE_SIZE, PAGE_SIZE)
    for sessions in options.sessions:
        for away_ms in options.away_ms:
            rates: dict[float, list[float]] = {0.0: [], options.patience: []}
            outputs = []
            for index in range(options.rounds):
                for patience, found in rates.items():
                    progress(f"{sessions} sessions, {away_ms:g} ms away, round {index + 1}")
                    rate, texts = asyncio.run(run(runner, options, patience, sessions, away_ms))
                    found.append(rate)
                    outputs.append(texts)
            result["cases"].append({
                "sessions": sessions,
                "away_ms": away_ms,
                "tokens_per_s_at_once": median(rates[0.0]),
                "tokens_per_s_waiting": median(rates[options.patience]),
                "ratio": median(b / a for a, b in zip(*rates.values(), strict=True)),
                "largest_difference": max((outputs[0] - x).abs().max().item() for x in outputs),
            })  # fmt: skip
    print(table(list(result["cases"][0]), [list(case.values()) for case in result["cases"]]))
    result["load_after"] = load()
    print(f"written to {write_result('batch_patience', result)}")
    if any(case["largest_difference"] > 1e-4 for case in result["cases"]):
        sys.exit("waiting has changed results")


if __name__ == "__main__":
    main()
