"""How long a server and a client of the demo model take to start, and what a span costs in memory.

    python benchmarks/startup.py [--repeat 5]

Times, medians over fresh processes: importing torch, transformers and hivemind and nothing else;
`run_server` from the command to its ready file; its exit after SIGTERM; in a client process, the
imports, `from_pretrained`, the first generated token and `close`. Memory: how far the resident
memory of a process rises at its highest (VmHWM) while it loads one of eight blocks, and all of
them, of a random float32 Llama. Results go to `benchmarks/results/startup.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import environment, load, median, table, write_result

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

CLIENT = """
import json, sys, time
started = time.perf_counter()
import torch
from planetserve import AutoDistributedModelForCausalLM
AutoDistributedModelForCausalLM.from_pretrained
times = {}
def lap(name):
    global started
    now = time.perf_counter()
    times[name], started = now - started, now
lap("client: imports")
peers = json.loads(sys.argv[1])
model = AutoDistributedModelForCausalLM.from_pretrained("demo", initial_peers=peers)
lap("client: from_pretrained")
model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1, do_sample=False)
lap("client: first token")
model.close()
lap("client: close")
print(json.dumps(times))
"""

SPAN = """
import json, re, sys
import torch
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.span_blocks import SpanBlocks
from planetserve.types import BlockSpan
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024
checkpoint = Checkpoint.open(sys.argv[1])
before = peak()
blocks = SpanBlocks.load(checkpoint, BlockSpan(int(sys.argv[2]), int(sys.argv[3])), torch.float32)
weights = sum(p.numel() * p.element_size() for p in blocks.layers.parameters())
print(json.dumps({"weights_bytes": weights, "peak_growth_bytes": peak() - before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="processes of each kind (default: 5)")
    repeat = parser.parse_args().repeat
    settings = environment()
    laps: dict[str, list[float]] = {}
    for number in range(repeat):
        sys.stdout.write(f"round {number + 1} of {repeat}\n")
        sys.stdout.flush()
        for name, seconds in measure_times().items():
            laps.setdefault(name, []).append(seconds)
    seconds = {name: median(values) for name, values in laps.items()}
    memory = measure_memory()
    rows = [[name, f"{value:.2f} s"] for name, value in seconds.items()]
    rows += [
        [f"memory: {name}", f"{entry['peak_growth_bytes'] / 2**20:.0f} MiB for "
         f"{entry['weights_bytes'] / 2**20:.0f} MiB of weights"]
        for name, entry in memory.items()
    ]  # fmt: skip
    sys.stdout.write(table(["what", "median"], rows) + "\n")
    result = {"seconds": seconds, "rounds": laps, "memory": memory, "load_after": load()}
    path = write_result("startup", {"environment": settings, **result})
    sys.stdout.write(f"written to {path.name}\n")


def measure_times() -> dict[str, float]:
    """One server and one client, in fresh processes."""
    found = {}
    started = time.perf_counter()
    run("import torch, transformers, hivemind")
    found["imports alone"] = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        ready_file = Path(folder) / "ready.json"
        command = [sys.executable, "-m", "planetserve.run_server", "demo", "--block_indices", "0:8",
                   "--new_swarm", "--host_maddrs", LOOPBACK, "--ready_file", str(ready_file),
                   "--log_level", "error"]  # fmt: skip
        started = time.perf_counter()
        server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        try:
            while not ready_file.exists():
                if server.poll() is not None:
                    raise SystemExit("the server has ended; run its command to see why")
                time.sleep(0.01)
            found["server: command to ready"] = time.perf_counter() - started
            peers = json.loads(ready_file.read_text())["addresses"]
            found |= json.loads(run(CLIENT, json.dumps(peers)))
            started = time.perf_counter()
            server.send_signal(signal.SIGTERM)
            server.wait()
            found["server: SIGTERM to exit"] = time.perf_counter() - started
        finally:
            server.kill()
            server.wait()
    return found


def measure_memory() -> dict[str, Any]:
    """Loading one block, and all eight, of a random model of about 400 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
        vocab_size=1000,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        return {
            f"blocks {start}:{end} of 8": json.loads(run(SPAN, folder, str(start), str(end)))
            for start, end in ((3, 4), (0, 8))
        }


def run(code: str, *arguments: str) -> str:
    """The last line that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip().rpartition("\n")[2]


if __name__ == "__main__":
    main()
