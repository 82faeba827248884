"""Peak resident memory of a server, in both of its processes, against what it must hold.

    python benchmarks/server_memory.py [--dtype float32] [--sessions 4]

A server of all blocks of a random Llama of 134 million parameters is started, and sessions send it
prompts and write a few tokens. The peak (VmHWM) of the node and of its libp2p daemon is read when
the server is ready and at the end. It should be at most the weights of the span, the keys and
values of the tokens that were held at once, and 550 MB; of these, importing torch, transformers and
hivemind takes most.

Results go to `benchmarks/results/server_memory.json`; a table goes to stdout. Linux only.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from common import environment, load, table, write_result
from engine import SHAPE
from processes import children, make_checkpoint, prepare

from planetserve import AutoDistributedModelForCausalLM
from planetserve.demo import LOOPBACK
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.span_blocks import SpanBlocks
from planetserve.types import BlockSpan

ALLOWANCE_MB = 550
MB = 1e6


def peaks_mb(process: psutil.Process) -> dict[str, float]:
    """Peak resident memory of a process and of its children, by name."""
    found = {}
    for each in (process, *process.children(recursive=True)):
        text = Path(f"/proc/{each.pid}/status").read_text()
        peak = re.search(r"VmHWM:\s+(\d+)", text)
        found[each.name()] = int(peak.group(1)) * 1024 / MB if peak else 0.0
    return found


def span_mb(folder: Path, dtype: torch.dtype) -> float:
    """Weights of all blocks."""
    span = BlockSpan(0, int(SHAPE["num_hidden_layers"]))
    blocks = SpanBlocks.load(Checkpoint.open(str(folder)), span, dtype)
    return sum(item.nbytes for item in blocks.layers.parameters()) / MB


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Serve, and read the peaks."""
    blocks = int(SHAPE["num_hidden_layers"])
    with ExitStack() as stack:
        server = stack.enter_context(children()).start(
            "server", "planetserve.run_server", str(folder), "--block_indices", f"0:{blocks}",
            "--new_swarm", "--host_maddrs", LOOPBACK, "--torch_dtype", options.dtype,
            "--num_threads", "1",
        )  # fmt: skip
        peers = server.wait_ready()["addresses"]
        process = psutil.Process(server.process.pid)
        ready = peaks_mb(process)
        client = AutoDistributedModelForCausalLM.from_pretrained(
            str(folder), initial_peers=peers, torch_dtype=options.dtype, show_route=False
        )
        model = stack.enter_context(client)
        generator = torch.Generator().manual_seed(1)
        size = (options.sessions, options.prompt_tokens)
        prompts = torch.randint(3, SHAPE["vocab_size"], size, generator=generator)

        def write(prompt: torch.Tensor) -> None:
            model.generate(
                prompt[None], attention_mask=torch.ones_like(prompt[None]), do_sample=False,
                max_new_tokens=options.new_tokens, pad_token_id=0,
            )  # fmt: skip

        with ThreadPoolExecutor(options.sessions) as pool:
            list(pool.map(write, prompts))
        return {"ready": ready, "served": peaks_mb(process)}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--prompt_tokens", type=int, default=512)
    parser.add_argument("--new_tokens", type=int, default=16)
    parser.add_argument("--name", default="server_memory", help="of the result file")
    options = parser.parse_args(argv)
    prepare()
    settings = environment()
    dtype = getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory(prefix="planetserve-bench-model-") as name:
        folder = make_checkpoint(Path(name), SHAPE)
        weights = span_mb(folder, dtype)
        peaks = measure(folder, options)
    tokens = options.sessions * (options.prompt_tokens + options.new_tokens)
    per_token = 2 * SHAPE["num_hidden_layers"] * SHAPE["hidden_size"] * dtype.itemsize
    summary = {
        "weights_mb": weights,
        "kv_mb": tokens * per_token / MB,
        "peak_when_ready_mb": sum(peaks["ready"].values()),
        "peak_mb": sum(peaks["served"].values()),
    }
    summary["besides_weights_and_kv_mb"] = (
        summary["peak_mb"] - summary["weights_mb"] - summary["kv_mb"]
    )
    summary["besides_weights_and_kv_mb_target"] = ALLOWANCE_MB
    print(table(["MB", "value"], summary.items()))
    result = {
        "benchmark": "server_memory",
        "environment": settings,
        "settings": vars(options),
        "model": SHAPE,
        "peaks_mb": peaks,
        "summary": summary,
        "load_after": load(),
    }
    print(f"written to {write_result(options.name, result)}")


if __name__ == "__main__":
    main()
