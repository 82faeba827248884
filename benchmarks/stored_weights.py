"""Decoding with weights in the 4 or 8 bits that a checkpoint stores, on the CPU.

    python benchmarks/stored_weights.py                 eight minutes
    python benchmarks/stored_weights.py int4_of_128     one format

For each format, a random model of about 150 million parameters is stored in it. Local transformers
with the dequantised weights in bfloat16, a server that keeps the stored numbers, and one that
dequantises them while it loads take turns within one invocation, one stream each, one thread per
process. "Equal" counts tokens that are local transformers' own, which computes in bfloat16
throughout; that kept weights compute the same is tested in float32. "Memory" is what the server's
process holds privately beyond one that serves a single block, over the stored bytes of the blocks
that it serves more. Results go to `benchmarks/results/stored_weights.json`, a table to stdout.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine
import psutil
import torch
from common import environment, load, table, write_result
from processes import LOOPBACK, Child, Children, children, prepare, start_bootstrap
from transformers import AutoModelForCausalLM

from planetserve import AutoDistributedModelForCausalLM
from planetserve.model.checkpoint import Checkpoint
from planetserve.testing.stored_weights import make_stored_checkpoint

_SHAPE = {**engine.SHAPE, "head_dim": 64}

FORMATS = {
    "int4_of_128": ("llama", _SHAPE),
    "fp8_of_128": ("llama", _SHAPE),
    "compressed_w8a8": ("llama", _SHAPE),
    "mxfp4": (
        "gpt_oss",
        {**_SHAPE, "num_hidden_layers": 8, "num_key_value_heads": 4,
         "intermediate_size": 768, "num_local_experts": 8, "num_experts_per_tok": 4},
    ),
}  # fmt: skip
"""Family and sizes for each format."""
WAYS = ("stored", "none")


def start_server(
    started: Children, checkpoint: Path, way: str, span: str, peers: Sequence[str]
) -> Child:
    server = started.start(
        f"server {way}", "planetserve.run_server", str(checkpoint), "--block_indices", span,
        "--host_maddrs", LOOPBACK, "--num_threads", "1", "--initial_peers", *peers,
        "--torch_dtype", "bfloat16", "--quant_type", way, "--dht_prefix", prefix(way, span),
    )  # fmt: skip
    server.wait_ready()
    return server


def prefix(way: str, span: str) -> str:
    """Servers of one way meet under it."""
    return f"bench-{way}-{span.replace(':', '-')}"


def private_bytes(server: Child) -> int:
    return int(psutil.Process(server.process.pid).memory_full_info().uss)


def stored_bytes(checkpoint: Path, blocks: range) -> int:
    """Bytes of these blocks' tensors in the checkpoint."""
    opened = Checkpoint.open(str(checkpoint))
    wanted = tuple(f"model.layers.{block}." for block in blocks)
    return opened.tensor_bytes(n for n in opened.tensor_names() if n.startswith(wanted))


def measure(method: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    family, shape = FORMATS[method]
    with tempfile.TemporaryDirectory(prefix="planetserve-bench-model-") as folder:
        quantised, plain = make_stored_checkpoint(Path(folder), method, family, **shape)
        num_blocks = int(shape["num_hidden_layers"])
        bench = engine.Bench(options, plain)
        local = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).eval()
        local.generation_config.eos_token_id = None
        bench.expect(local)
        cases = [engine.Case("bfloat16", target, 1) for target in (engine.LOCAL, *WAYS)]
        memory = {}
        with children() as started:
            peers = start_bootstrap(started)
            clients = {}
            for way in WAYS:
                one = start_server(started, quantised, way, "0:1", peers)
                least = private_bytes(one)
                one.process.terminate()
                one.process.wait()
                server = start_server(started, quantised, way, f"0:{num_blocks}", peers)
                more = stored_bytes(quantised, range(1, num_blocks))
                memory[way] = (private_bytes(server) - least) / more
                clients[way] = AutoDistributedModelForCausalLM.from_pretrained(
                    str(quantised), initial_peers=peers, dht_prefix=prefix(way, f"0:{num_blocks}"),
                    torch_dtype="bfloat16", show_route=False,
                )  # fmt: skip
                clients[way].generation_config.eos_token_id = None
                bench.run_swarm(clients[way], 1)
            for number in range(options.rounds):
                for case in cases:
                    if case.target == engine.LOCAL:
                        run = bench.timed(bench.run_local, local, 1)
                    else:
                        run = bench.timed(bench.run_swarm, clients[case.target], 1)
                    case.runs.append(run)
                    engine.progress(
                        f"round {number + 1}/{options.rounds} {method} {case.target}: "
                        f"{run.tokens_per_s:.1f} tokens/s"
                    )
            for client in clients.values():
                client.close()
    rows = [case.summary() for case in cases]
    engine.add_ratios(rows)
    return [
        {"format": method, "family": family, "memory_over_stored": memory.get(row["target"]), **row}
        for row in rows
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("formats", nargs="*", metavar="FORMAT", help=f"of {', '.join(FORMATS)}; default: all")
    add("--rounds", type=int, default=3)
    add("--new_tokens", type=int, default=96)
    add("--prompt_tokens", type=int, default=64)
    options = parser.parse_args(argv)
    unknown = set(options.formats) - set(FORMATS)
    if unknown:
        parser.error(f"no such format here: {', '.join(sorted(unknown))}")
    prepare()
    engine_options = engine.parse(
        ["--sessions", "1", "--rounds", str(options.rounds),
         "--prompt_tokens", str(options.prompt_tokens), "--new_tokens", str(options.new_tokens)]
    )  # fmt: skip
    found: list[dict[str, Any]] = []
    for method in options.formats or FORMATS:
        found += measure(method, engine_options)
        gc.collect()
    result = {
        "benchmark": "stored_weights",
        "environment": environment(),
        "settings": vars(options),
        "threads_per_process": 1,
        "cases": found,
        "load_after": load(),
    }
    header = ["format", "target", "tokens/s", "ratio", "first token", "memory", "equal"]
    lines = [
        [case["format"], case["target"], case["tokens_per_s"], case.get("ratio", ""),
         case.get("first_token_ratio", ""), case["memory_over_stored"] or "",
         f"{case['equal_tokens']}/{case['tokens']}"]
        for case in found
    ]  # fmt: skip
    print(table(header, lines))
    print(f"written to {write_result('stored_weights', result)}")


if __name__ == "__main__":
    main()
