"""How much of the KV memory that sessions take holds tokens, and what forks of a text add to it.

    python benchmarks/kv_memory.py            a few minutes
    python benchmarks/kv_memory.py --quick    fewer texts
    python benchmarks/kv_memory.py --overcommit --name kv_overcommit    only the last part

Two servers and a client in one process serve a small random Llama; how pages are used does not
depend on the width of a model. Threads write texts of mixed lengths, each the next one as soon as
its last one is finished: chats, long documents, beam searches, several answers to one prompt. All
the while the servers' own statistics are read. The useful share is that of tokens among the slots
of all pages in use, over all readings; slots that several texts share count once. Then a prompt of
1,000 tokens is continued in eight ways, by a beam search and as eight answers. Last, servers with a
small cache serve texts that use a part of what they ask for, with and without overcommitment.

Results go to `benchmarks/results/kv_memory.json`; a table goes to stdout.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import environment, load, percentile, table, write_result
from processes import make_checkpoint, prepare

from planetserve import AutoDistributedModelForCausalLM
from planetserve.errors import CapacityError, NoChainAvailable
from planetserve.testing.swarm import LocalSwarm

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
}
SPANS = ("0:2", "2:4")
PAGE_SIZE = 16
TARGET_SHARE = 0.96
FORKS = 8
FORKED_TOKENS = 1000
OVERCOMMITS = (1.0, 2.0, 4.0)
SMALL_CACHE_TOKENS = 4096
ASKED_TOKENS = 1024
_ASK_AGAIN_S = 0.1
_READ_PERIOD_S = 0.02


@dataclass(frozen=True)
class Kind:
    """Texts of one kind: the range of prompt lengths and of new tokens, and options."""

    weight: int
    prompt: tuple[int, int]
    new: tuple[int, int]
    options: dict[str, Any]


KINDS = {
    "chat": Kind(6, (16, 512), (16, 256), {"do_sample": False}),
    "document": Kind(2, (1024, 3072), (16, 128), {"do_sample": False}),
    "beams": Kind(1, (64, 512), (16, 64), {"do_sample": False, "num_beams": 4}),
    "answers": Kind(1, (64, 512), (16, 128), {"do_sample": True, "num_return_sequences": 4}),
}

ASKED = Kind(1, (64, 256), (64, 192), {"do_sample": False})
"""Texts that use a part of `ASKED_TOKENS`."""


class PackedCounts:
    """Reads the statistics of all servers again and again, until it is stopped."""

    def __init__(self, swarm: LocalSwarm):
        self.readings: list[tuple[int, int]] = []
        """Live tokens and slots of used pages, over all servers."""
        self.sessions: list[int] = []
        """Open sessions of the server that has most."""
        self._swarm = swarm
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> PackedCounts:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def share(self) -> float:
        """Useful share over all readings."""
        return sum(live for live, _ in self.readings) / sum(slots for _, slots in self.readings)

    def _run(self) -> None:
        while not self._is_over.wait(_READ_PERIOD_S):
            stats = self._swarm.call(_stats(self._swarm))
            slots = sum(item.pages_used for item in stats) * PAGE_SIZE
            if slots:
                self.sessions.append(max(item.num_sessions for item in stats))
                self.readings.append((sum(item.live_tokens for item in stats), slots))


async def _stats(swarm: LocalSwarm) -> list[Any]:
    return [server.engine.stats() for server in swarm.servers]


def write_text(model: Any, kind: Kind, choose: random.Random) -> None:
    """One text with a random prompt; short ones are likelier than long ones."""
    low, high = kind.prompt
    num_prompt = round(low * (high / low) ** choose.random())
    num_new = choose.randint(*kind.new)
    ids = torch.tensor([choose.choices(range(3, SHAPE["vocab_size"]), k=num_prompt)])
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, min_new_tokens=num_new,
        pad_token_id=0, **kind.options,
    )  # fmt: skip


def workload(
    swarm: LocalSwarm, model: Any, names: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Texts of these kinds, a fixed number of them at once."""
    choose = random.Random(1)
    weights = [KINDS[name].weight for name in names]
    chosen = choose.choices(names, weights, k=options.texts)
    seeds = [choose.randrange(1 << 30) for _ in chosen]
    with PackedCounts(swarm) as packed_counts, ThreadPoolExecutor(options.threads) as pool:
        list(pool.map(lambda name, seed: write_text(model, KINDS[name], random.Random(seed)),
                      chosen, seeds))  # fmt: skip
    slots = [slots for _, slots in packed_counts.readings]
    shares = [live / slots for live, slots in packed_counts.readings]
    return {
        "kinds": dict(Counter(chosen)),
        "useful_share": packed_counts.share,
        "useful_share_target": TARGET_SHARE,
        "useful_share_p5": percentile(shares, 5),
        "pages_used_mean": sum(slots) / len(slots) / PAGE_SIZE,
        "readings": len(slots),
    }


def forks(swarm: LocalSwarm, model: Any) -> dict[str, Any]:
    """Pages beyond those of the prompt, on the server that has most."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, SHAPE["vocab_size"], (1, FORKED_TOKENS), generator=generator)
    found: dict[str, Any] = {"tokens": FORKED_TOKENS, "ways": FORKS, "extra_pages_target": FORKS}
    for name, options in {
        "beams": {"num_beams": FORKS, "do_sample": False},
        "answers": {"num_return_sequences": FORKS, "do_sample": True},
    }.items():
        with model.inference_session(max_length=FORKED_TOKENS + 4):
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2,
                pad_token_id=0, **options,
            )  # fmt: skip
            used = max(item.pages_used for item in swarm.call(_stats(swarm)))
        found[f"extra_pages_{name}"] = used - -(-FORKED_TOKENS // PAGE_SIZE)
        while any(item.pages_used for item in swarm.call(_stats(swarm))):
            time.sleep(_READ_PERIOD_S)
    return found


def overcommit(folder: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The same texts, each asking for `ASKED_TOKENS`, on servers that promise more or less."""
    found = []
    for factor in OVERCOMMITS:
        choose = random.Random(3)
        seeds = [choose.randrange(1 << 30) for _ in range(options.texts)]
        num_tokens = sum(_num_new(ASKED, random.Random(seed)) for seed in seeds)
        settings = {
            "attn_cache_tokens": SMALL_CACHE_TOKENS, "page_size": PAGE_SIZE,
            "kv_overcommit": factor, "max_peer_kv_share": 1.0,
        }  # fmt: skip
        with (
            LocalSwarm(folder, SPANS, settings) as swarm,
            AutoDistributedModelForCausalLM.from_pretrained(
                folder, initial_peers=swarm.initial_peers, show_route=False,
                wait_for_blocks_timeout=0.5,
            ) as model,
            ThreadPoolExecutor(options.threads) as pool,
        ):  # fmt: skip

            def write(seed: int, model: Any = model) -> None:
                while True:
                    try:
                        with model.inference_session(max_length=ASKED_TOKENS):
                            return write_text(model, ASKED, random.Random(seed))
                    except (NoChainAvailable, CapacityError):  # everything is promised to others
                        time.sleep(_ASK_AGAIN_S)

            started_s = time.monotonic()
            with PackedCounts(swarm) as packed_counts:
                list(pool.map(write, seeds))
            took_s = time.monotonic() - started_s
            stats = swarm.call(_stats(swarm))
            refused = sum(
                server.handler.counters["open.cache_exhausted"] for server in swarm.servers
            )
        slots = [slots for _, slots in packed_counts.readings]
        found.append({
            "kv_overcommit": factor,
            "tokens_per_s": num_tokens / took_s,
            "seconds": took_s,
            "sessions_mean": sum(packed_counts.sessions) / len(packed_counts.sessions),
            "sessions_most": max(packed_counts.sessions),
            "pages_used_share": sum(slots) / len(slots) / SMALL_CACHE_TOKENS / len(SPANS),
            "refused_opens": refused,
            "preemptions": sum(item.preemptions for item in stats),
            "recomputed_tokens": sum(item.recomputed_tokens for item in stats),
        })  # fmt: skip
    return found


def _num_new(kind: Kind, choose: random.Random) -> int:
    """New tokens of the text that `write_text` writes with the same randomness."""
    choose.random()
    return choose.randint(*kind.new)


def _measure_use(folder: str, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Useful shares and forks, into `result`."""
    settings = {"attn_cache_tokens": 1 << 17, "page_size": PAGE_SIZE}
    with (
        LocalSwarm(folder, SPANS, settings) as swarm,
        AutoDistributedModelForCausalLM.from_pretrained(
            folder, initial_peers=swarm.initial_peers, show_route=False
        ) as model,
    ):
        result["workloads"] = {
            "mixed": workload(swarm, model, list(KINDS), options),
            "chats alone": workload(swarm, model, ["chat"], options),
        }
        result["forks"] = forks(swarm, model)
    rows = [
        [name, 100 * item["useful_share"], 100 * item["useful_share_p5"], item["pages_used_mean"]]
        for name, item in result["workloads"].items()
    ]
    print(table(["workload", "useful %", "5th percentile", "pages"], rows))
    print(table(["forks", "value"], result["forks"].items()))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer texts")
    parser.add_argument("--texts", type=int, default=120, help="texts of each workload")
    parser.add_argument("--threads", type=int, default=16, help="texts at once")
    parser.add_argument("--overcommit", action="store_true", help="only the last part")
    parser.add_argument("--name", default="kv_memory", help="of the result file")
    options = parser.parse_args(argv)
    if options.quick:
        options.texts = 30
    prepare()
    result: dict[str, Any] = {
        "benchmark": "kv_memory",
        "environment": environment(),
        "settings": vars(options),
        "model": SHAPE,
        "page_size": PAGE_SIZE,
    }
    with tempfile.TemporaryDirectory(prefix="planetserve-bench-model-") as folder:
        make_checkpoint(Path(folder), SHAPE)
        if not options.overcommit:
            _measure_use(folder, options, result)
        result["overcommit"] = overcommit(folder, options)
    rows = [list(item.values()) for item in result["overcommit"]]
    print(table(list(result["overcommit"][0]), rows))
    result["load_after"] = load()
    print(f"written to {write_result(options.name, result)}")
    if not options.overcommit and result["workloads"]["mixed"]["useful_share"] < TARGET_SHARE:
        sys.exit("too much of the memory is empty")


if __name__ == "__main__":
    main()
