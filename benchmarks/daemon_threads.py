"""What a frame's way through two libp2p daemons takes, by the threads that each daemon may use.

    python benchmarks/daemon_threads.py            under a minute
    python benchmarks/daemon_threads.py --quick    few round trips

Two nodes on loopback, each with its daemon, echo frames on one stream. Pairs whose daemons have the
threads that nodes give them by default, and pairs whose daemons have as many as there are cores
(`GOMAXPROCS`), take turns within one invocation. Before each round trip of a small frame 64 MiB are
written, as a pass through a model would do, so that caches are as cold as in a real step.

Results go to `benchmarks/results/daemon_threads.json`; a table goes to stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import environment, load, median, percentile, table, write_result

from planetserve.demo import LOOPBACK
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode
from planetserve.swarm.libp2p.streams import FrameStream
from planetserve.wire.frame import FrameHeader, FrameType

PROTOCOL = "/benchmark/echo/1"
VARIABLE = "GOMAXPROCS"
SIZES = {"decode step, 3 KiB": 3 << 10, "1 MiB": 1 << 20, "7 MiB": 7 << 20}
_COLD_BYTES = 64 << 20
_COLD_BELOW = 64 << 10


async def echo(stream: FrameStream) -> None:
    """Send back whatever comes."""
    while True:
        header, payload = await stream.receive()
        await stream.send(header, payload)


async def started(stack: AsyncExitStack, threads: str | None) -> FrameStream:
    """An echo stream between two new nodes."""
    os.environ.pop(VARIABLE, None)
    if threads is not None:
        os.environ[VARIABLE] = threads
    server = await stack.enter_async_context(
        await SwarmNode.start(NodeConfig(host_maddrs=(LOOPBACK,)))
    )
    await server.serve_streams(PROTOCOL, echo)
    config = NodeConfig(client_mode=True, initial_peers=server.addresses())
    client = await stack.enter_async_context(await SwarmNode.start(config))
    return await client.open_stream(server.peer_id, server.addresses(), PROTOCOL, 10.0)


async def round_trips(stream: FrameStream, size: int, count: int) -> list[float]:
    """Seconds of each."""
    header, payload = FrameHeader(FrameType.STEP), bytes(size)
    cold = torch.empty(_COLD_BYTES, dtype=torch.uint8)
    found = []
    for number in range(count + 1):
        if size < _COLD_BELOW:
            cold.fill_(number % 256)
        started_s = time.perf_counter()
        await stream.send(header, payload)
        await stream.receive()
        if number:  # the first one finds buffers small
            found.append(time.perf_counter() - started_s)
    return found


async def measure(rounds: int, counts: dict[str, int]) -> list[dict[str, Any]]:
    """Both kinds of daemons, by size of frame."""
    kinds = {"default": os.environ.get(VARIABLE), "all cores": str(os.cpu_count())}
    times: dict[tuple[str, str], list[float]] = {}
    async with AsyncExitStack() as stack:
        streams = {kind: await started(stack, threads) for kind, threads in kinds.items()}
        for _ in range(rounds):
            for name, size in SIZES.items():
                for kind, stream in streams.items():
                    found = await round_trips(stream, size, counts[name])
                    times.setdefault((name, kind), []).extend(found)
    return [
        {
            "frame": name,
            **{
                f"{kind} {label}": 1000 * pick(times[name, kind])
                for kind in kinds
                for label, pick in (("p50 ms", median), ("p95 ms", lambda v: percentile(v, 95)))
            },
            "ratio": median(times[name, "all cores"]) / median(times[name, "default"]),
        }
        for name in SIZES
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few round trips")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="daemon_threads", help="of the result file")
    options = parser.parse_args(argv)
    small, large = (20, 3) if options.quick else (100, 10)
    counts = {name: small if size < _COLD_BELOW else large for name, size in SIZES.items()}
    torch.set_num_threads(1)
    result = {
        "benchmark": "daemon_threads",
        "environment": environment(),
        "settings": vars(options),
    }
    rows = asyncio.run(measure(options.rounds, counts))
    result |= {"load_after": load(), "frames": rows}
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    print(f"written to {write_result(options.name, result)}")


if __name__ == "__main__":
    main()
