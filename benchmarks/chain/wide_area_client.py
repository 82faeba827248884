"""The client process of section `wide_area`: for each text a fresh client and one line of JSON.

A process of its own, so that the emulated links wait for nobody's computation. Argument: JSON with
`model`, `peers`, `prompt_tokens`, `new_tokens` and `allowed`, a list with, for each text, the peer
ids that may run it, or null for all.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from planetserve import AutoDistributedModelForCausalLM
from planetserve.types import CLIENT, Chain


class Stopwatch(BaseStreamer):
    """Notes when each token comes; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        return


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    for number, allowed in enumerate(task["allowed"]):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(5, 500, (1, task["prompt_tokens"]), generator=generator)
        with AutoDistributedModelForCausalLM.from_pretrained(
            task["model"],
            initial_peers=task["peers"],
            allowed_servers=allowed,
            chain_cost_jitter=0,
            chain_load_prior=0,
        ) as model:
            snapshot = model.runtime.snapshot()
            watch = Stopwatch()
            count = task["new_tokens"]
            model.generate(
                ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=watch
            )
            # The first token is the prompt's.
            decoding = zip(watch.times[1:], watch.times[2:], strict=False)
            chain = model.chain
            line = {
                "hops": [[hop.peer_id, hop.start, hop.end] for hop in chain],
                "predicted_ms": chain.latency_ms,
                "predicted_parts_ms": _parts(snapshot, chain),
                "token_ms": [1000 * (after - before) for before, after in decoding],
                "snapshot": dataclasses.asdict(snapshot),
            }
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


def _parts(snapshot: Any, chain: Chain) -> dict[str, float]:
    """What the prediction is made of."""
    ring = [CLIENT, *(hop.peer_id for hop in chain), CLIENT]
    servers = {server.id: server for server in snapshot.servers}
    return {
        "links": sum(snapshot.rtt(a, b) / 2 for a, b in zip(ring, ring[1:], strict=False)),
        "blocks": sum(
            (hop.end - hop.start) * servers[hop.peer_id].decode_ms_per_block for hop in chain
        ),
        "visits": sum(snapshot.hop_overhead_ms + servers[hop.peer_id].wait_ms for hop in chain),
        "sending": sum(
            1000 * snapshot.activation_bytes_per_token / servers[hop.peer_id].network_bytes_per_s
            for hop in chain
        ),
    }


if __name__ == "__main__":
    main()
