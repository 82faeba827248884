"""What the gateway costs and gains, against `generate()` over the same servers in the same run.

    python benchmarks/gateway.py [--streams 16] [--tokens 128] [--repeat 5]

Two servers of the demo model, a gateway and a client with `generate()`, each a process of its own
on this machine. In turns: one text by each way, time per token after the first; then so many texts
at once, as `generate()` threads and as HTTP streams, tokens per second and processor time per token
of the client and of the gateway, libp2p daemons included. The processor time of what reads the HTTP
streams is stated apart: users have it on their own machine. Float32, temperature 0, whole length.
Results go to `benchmarks/results/gateway.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from common import environment, load, median, table, write_result

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PROMPT = list(range(300, 332))

CLIENT = """
import json, sys, threading, time
import torch
from planetserve import AutoDistributedModelForCausalLM
model = AutoDistributedModelForCausalLM.from_pretrained(
    "demo", initial_peers=json.loads(sys.argv[1]), torch_dtype=torch.float32)
prompt = json.loads(sys.argv[2])
def times(tokens):
    found = []
    class Streamer:
        def put(self, value): found.append(time.perf_counter())
        def end(self): pass
    model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=tokens,
                   min_new_tokens=tokens, eos_token_id=None, streamer=Streamer())
    return found[1:]
print("ready", flush=True)
for line in sys.stdin:
    tokens, streams = json.loads(line)
    began = time.perf_counter()
    if streams == 1:
        laps = times(tokens)
        print(json.dumps([time.perf_counter() - began, laps[-1] - laps[0]]), flush=True)
        continue
    threads = [threading.Thread(target=times, args=[tokens]) for _ in range(streams)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    print(json.dumps([time.perf_counter() - began, 0]), flush=True)
model.close()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=16, help="texts at once (default: 16)")
    parser.add_argument("--tokens", type=int, default=128, help="of each text (default: 128)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default: 5)")
    options = parser.parse_args()
    settings = environment()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rounds = measure(stack, folder, options)
    summary = {way: summarise(rounds[way]) for way in ("generate", "gateway")}
    one, many = "ms per token, one text", f"tokens per second, {options.streams} texts"
    cpu = f"CPU ms per token, {options.streams} texts"
    rows = []
    for name, key in ((one, "one_ms"), (many, "tokens_per_s"), (cpu, "cpu_ms")):
        without, with_it = summary["generate"][key], summary["gateway"][key]
        rows.append([name, without, with_it, with_it / without])
    sys.stdout.write(table(["median", *summary, "gateway / generate"], rows) + "\n")
    result = {
        "environment": settings,
        "options": vars(options),
        "median": summary,
        "reader_cpu_ms": median(rounds["reader_cpu_ms"]),
        "rounds": rounds,
        "load_after": load(),
    }
    sys.stdout.write(f"written to {write_result('gateway', result).name}\n")


def summarise(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each number."""
    return {key: median(one[key] for one in rounds) for key in rounds[0]}


def measure(
    stack: contextlib.ExitStack, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Both ways in turns, so that what else the machine does meets both."""
    first = start(stack, folder, "run_server", "demo", "--block_indices", "0:4", "--new_swarm",
                  "--host_maddrs", LOOPBACK, "--torch_dtype", "float32")[1]  # fmt: skip
    peers = first["addresses"]
    start(stack, folder, "run_server", "demo", "--block_indices", "4:8", "--initial_peers", *peers,
          "--host_maddrs", LOOPBACK, "--torch_dtype", "float32")  # fmt: skip
    gateway, address = start(stack, folder, "run_gateway", "demo", "--initial_peers", *peers,
                             "--port", "0", "--dtype", "float32")  # fmt: skip
    client = stack.enter_context(client_process(peers))
    rounds: dict[str, Any] = {"generate": [], "gateway": [], "reader_cpu_ms": []}
    for number in range(options.repeat + 1):  # the first one warms up
        for way in ("generate", "gateway") if number % 2 else ("gateway", "generate"):
            process = psutil.Process(client.pid if way == "generate" else gateway.pid)
            ask = ask_client if way == "generate" else ask_gateway
            target: Any = client if way == "generate" else address["url"]
            between_s = ask(target, options.tokens, 1)[1]
            before_s, reader_s = cpu_of(process), time.process_time()
            whole_s, _ = ask(target, options.tokens, options.streams)
            cpu_s, reader_s = cpu_of(process) - before_s, time.process_time() - reader_s
            num_tokens = options.tokens * options.streams
            if not number:
                continue
            rounds[way].append(
                {
                    "one_ms": 1000 * between_s / (options.tokens - 1),
                    "tokens_per_s": num_tokens / whole_s,
                    "cpu_ms": 1000 * cpu_s / num_tokens,
                }
            )
            if way == "gateway":
                rounds["reader_cpu_ms"].append(1000 * reader_s / num_tokens)
        sys.stdout.write(f"round {number} of {options.repeat}\n")
        sys.stdout.flush()
    return rounds


def start(
    stack: contextlib.ExitStack, folder: Path, name: str, *arguments: str
) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    """A command that runs until the stack ends, and its ready file."""
    ready_file = folder / f"{len(list(folder.iterdir()))}.json"
    process = subprocess.Popen(
        [sys.executable, "-m", f"planetserve.{name}", *arguments, "--log_level", "error",
         "--ready_file", str(ready_file)],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    stack.callback(process.wait)
    stack.callback(process.terminate)
    while not ready_file.exists():
        if process.poll() is not None:
            raise SystemExit(f"{name} has ended; run its command to see why")
        time.sleep(0.02)
    return process, json.loads(ready_file.read_text())


@contextlib.contextmanager
def client_process(peers: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that runs `generate()` when told to."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLIENT, json.dumps(peers), json.dumps(PROMPT)],
        env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise SystemExit("the client did not start")
        yield process
    finally:
        process.stdin.close()
        process.wait()


def ask_client(client: subprocess.Popen[str], tokens: int, streams: int) -> tuple[float, float]:
    """Seconds in all, and from the first token to the last of a single text."""
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write(json.dumps([tokens, streams]) + "\n")
    client.stdin.flush()
    whole_s, between_s = json.loads(client.stdout.readline())
    return whole_s, between_s


def ask_gateway(url: str, tokens: int, streams: int) -> tuple[float, float]:
    """The same over HTTP."""
    return asyncio.run(ask_gateway_many(url, tokens, streams))


async def ask_gateway_many(url: str, tokens: int, streams: int) -> tuple[float, float]:
    body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "temperature": 0,
            "stream": True}  # fmt: skip
    began_s = time.perf_counter()
    spans = await asyncio.gather(*(read(url, json.dumps(body).encode()) for _ in range(streams)))
    return time.perf_counter() - began_s, spans[0]


async def read(url: str, body: bytes) -> float:
    """Seconds between the first and the last event of one stream.

    By hand: an HTTP library would take as much processor time as the gateway, on the same cores.
    """
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    status = await reader.readuntil(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 200"), status
    first_s = last_s = 0.0
    events = b""
    while part := await reader.read(65536):
        events = events[-32:] + part
        last_s = time.perf_counter()
        first_s = first_s or last_s
    assert b"data: [DONE]" in events, events
    writer.close()
    return last_s - first_s


def cpu_of(process: psutil.Process) -> float:
    """Processor seconds so far of a process and of those that it has started."""
    total = 0.0
    for each in (process, *process.children(recursive=True)):
        times = each.cpu_times()
        total += times.user + times.system
    return total


if __name__ == "__main__":
    main()
