"""How long a text stalls when one of its servers is killed or stopped.

    python benchmarks/failover.py            every hop, 12 kills each: 10 minutes or more
    python benchmarks/failover.py --quick    one kill and one stop for each hop

A bootstrap peer and two servers for each third of the demo model, every server a process of its
own, as `make demo` starts them; the client has its default settings. While a text is written, the
server of one hop is hit at a random moment, its libp2p daemon with it: by SIGKILL, as if the
machine had lost power, or by SIGSTOP, as if it hung. The stall is the time between the last token
before and the first token after the recovery, "detected" the part of it until the client begins to
recover. Every text is compared with what transformers generates alone. A server that was hit is
replaced by a new process before the next text.

Results go to `benchmarks/results/failover.json`; a table goes to stdout.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from common import environment, load, median, table, write_result
from processes import children, prepare, start_bootstrap
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria

from planetserve import AutoDistributedModelForCausalLM
from planetserve.config import ClientConfig
from planetserve.demo import LOOPBACK, Child, Children, split_blocks
from planetserve.model.checkpoint import Checkpoint
from planetserve.model.file_sources import open_source
from planetserve.types import BlockSpan

MODEL = "demo"
NUM_HOPS = 3
REPLICAS = 2
PROMPT = "A list comprehension is"
CLIENT_LOGGER = "planetserve.client.session"
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}
TARGETS_S = {"SIGKILL": (0.5, 1.0)}
"""Median and worst stall that the project promises."""


@dataclass(frozen=True)
class Stall:
    """One text and what hit it."""

    signal: str
    hop: int
    after_token: int
    stall_s: float
    detected_s: float | None
    usual_gap_s: float
    """Median time between two tokens of the text."""
    tokens_equal: bool


class Watch(StoppingCriteria, logging.Handler):
    """Notes when tokens come and when the client begins to recover; strikes after one of them."""

    def __init__(self, strike: Any, after_token: int, delay_s: float):
        logging.Handler.__init__(self, logging.INFO)
        self.tokens_s: list[float] = []
        self.changes_s: list[float] = []
        self.struck_s = float("inf")
        self._after_token = after_token
        self._timer = threading.Timer(delay_s, self._strike, [strike])

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens_s.append(time.perf_counter())
        if len(self.tokens_s) == self._after_token:
            self._timer.start()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def emit(self, record: logging.LogRecord) -> None:
        self.changes_s.append(time.perf_counter())

    def _strike(self, strike: Any) -> None:
        self.struck_s = time.perf_counter()
        strike()

    @property
    def gaps_s(self) -> list[float]:
        """Times between tokens."""
        return [b - a for a, b in zip(self.tokens_s, self.tokens_s[1:], strict=False)]

    @property
    def stall_s(self) -> float:
        """The longest time without a token that ends after the strike."""
        pairs = zip(self.tokens_s, self.tokens_s[1:], strict=False)
        return max(b - a for a, b in pairs if b > self.struck_s)

    @property
    def detected_s(self) -> float | None:
        """From the strike to the client's first move."""
        return next((at - self.struck_s for at in self.changes_s if at > self.struck_s), None)


@dataclass(frozen=True)
class Place:
    """What a server serves, and its key."""

    span: BlockSpan
    key_file: Path


@dataclass
class Swarm:
    """The processes."""

    children: Children
    folder: Path
    peers: list[str]
    servers: dict[str, tuple[Place, Child]] = field(default_factory=dict)
    """By peer id."""

    def start(self, places: Sequence[Place]) -> None:
        """Start a server in each place and wait for all of them."""
        started = [
            (place, self.children.start(
                f"server {place.span}", "planetserve.run_server", MODEL,
                "--block_indices", str(place.span), "--identity_path", str(place.key_file),
                "--initial_peers", *self.peers, "--host_maddrs", LOOPBACK,
                "--torch_dtype", "float32", "--num_threads", "1",
            ))
            for place in places
        ]  # fmt: skip
        for place, child in started:
            self.servers[child.wait_ready()["peer_id"]] = (place, child)

    def hit(self, peer_id: str, number: int) -> None:
        """Signal a server and its libp2p daemon."""
        process = psutil.Process(self.servers[peer_id][1].process.pid)
        for each in (*process.children(), process):
            each.send_signal(number)

    def replace(self, peer_id: str) -> None:
        """Put a new server in the place of one that was hit, under the same peer id."""
        self.hit(peer_id, signal.SIGKILL)
        place, child = self.servers.pop(peer_id)
        child.process.wait()
        self.start([place])


@contextmanager
def running() -> Iterator[Swarm]:
    with children() as started:
        folder = started.folder
        swarm = Swarm(started, folder, start_bootstrap(started))
        spans = split_blocks(Checkpoint.open(MODEL).num_blocks, NUM_HOPS) * REPLICAS
        swarm.start([Place(span, folder / f"{i}.key") for i, span in enumerate(spans)])
        yield swarm


def measure(options: argparse.Namespace) -> list[Stall]:
    """Every text, in an order that is random and the same each time."""
    path, revision = open_source(MODEL).location
    inputs = AutoTokenizer.from_pretrained(path, revision=revision)(PROMPT, return_tensors="pt")
    settings = {
        **inputs, "max_new_tokens": options.new_tokens, "min_new_tokens": options.new_tokens,
        "do_sample": False, "pad_token_id": 0,
    }  # fmt: skip
    local = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=torch.float32)
    expected = local.generate(**settings)
    choose = random.Random(1)
    texts = [("SIGKILL", hop) for hop in range(NUM_HOPS) for _ in range(options.kills)]
    texts += [("SIGSTOP", hop) for hop in range(NUM_HOPS) for _ in range(options.stops)]
    choose.shuffle(texts)
    stalls = []
    with running() as swarm:
        for number, (name, hop) in enumerate(texts, 1):
            after_token = choose.randrange(2, options.new_tokens - 4)
            # A client of its own each time: nobody remembers the servers of earlier texts.
            with AutoDistributedModelForCausalLM.from_pretrained(
                MODEL, initial_peers=swarm.peers, torch_dtype="float32", show_route=False
            ) as model:
                model.generate(**{**settings, "max_new_tokens": 2, "min_new_tokens": 2})
                stalls.append(
                    one_text(model, swarm, settings, expected, name, hop, after_token, choose)
                )
            progress(f"text {number}/{len(texts)}: {name} hop {hop}: {stalls[-1].stall_s:.3f} s")
    return stalls


def one_text(
    model: Any, swarm: Swarm, settings: dict[str, Any], expected: torch.Tensor, name: str,
    hop: int, after_token: int, choose: random.Random,
) -> Stall:  # fmt: skip
    victims: list[str] = []

    def strike() -> None:
        victims.append(model.chain.hops[hop].peer_id)
        swarm.hit(victims[0], SIGNALS[name])

    watch = Watch(strike, after_token, choose.uniform(0.0, 0.02))
    logger = logging.getLogger(CLIENT_LOGGER)
    logger.setLevel(logging.INFO)
    logger.addHandler(watch)
    try:
        tokens = model.generate(**settings, stopping_criteria=[watch])
    finally:
        logger.removeHandler(watch)
    swarm.replace(victims[0])
    return Stall(
        name, hop, after_token, watch.stall_s, watch.detected_s, median(watch.gaps_s),
        torch.equal(tokens, expected),
    )  # fmt: skip


def progress(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def summary(stalls: list[Stall]) -> list[dict[str, Any]]:
    """One row for each signal and hop, and one for all hops of a signal."""
    rows = []
    for name in SIGNALS:
        for hop in (*range(NUM_HOPS), None):
            of_hop = [s for s in stalls if s.signal == name and hop in (s.hop, None)]
            if not of_hop:
                continue
            noticed = [s.detected_s for s in of_hop if s.detected_s is not None]
            row: dict[str, Any] = {
                "signal": name,
                "hop": "all" if hop is None else ("first", "middle", "last")[hop],
                "texts": len(of_hop),
                "stall_s_median": median(s.stall_s for s in of_hop),
                "stall_s_worst": max(s.stall_s for s in of_hop),
                "detected_s_median": median(noticed),
                "detected_s_worst": max(noticed, default=None),
                "texts_equal": sum(s.tokens_equal for s in of_hop),
            }
            if hop is None and name in TARGETS_S:
                row["target_s_median"], row["target_s_worst"] = TARGETS_S[name]
            rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one kill and one stop for each hop")
    parser.add_argument("--kills", type=int, default=12, help="SIGKILLs for each hop")
    parser.add_argument("--stops", type=int, default=3, help="SIGSTOPs for each hop")
    parser.add_argument("--new_tokens", type=int, default=64, help="length of a text")
    parser.add_argument("--name", default="failover", help="of the result file")
    options = parser.parse_args(argv)
    if options.quick:
        options.kills = options.stops = 1
    prepare()
    result: dict[str, Any] = {
        "benchmark": "failover",
        "environment": environment(),
        "settings": vars(options),
        "client": {k: getattr(ClientConfig(), k) for k in ("probe_after", "ping_timeout",
                                                           "step_timeout", "max_retries")},
    }  # fmt: skip
    stalls = measure(options)
    rows = summary(stalls)
    columns = ("stall_s_median", "stall_s_worst", "detected_s_median", "detected_s_worst")
    lines = [
        [f"{row['signal']} {row['hop']}", row["texts"], *(row[name] for name in columns),
         f"{row['texts_equal']}/{row['texts']}"]
        for row in rows
    ]  # fmt: skip
    header = ["seconds", "texts", "stall", "worst", "detected", "worst", "equal"]
    print(table(header, lines))
    result |= {"load_after": load(), "summary": rows, "texts": [asdict(s) for s in stalls]}
    print(f"load before {result['environment']['load_before']}, after {result['load_after']}")
    print(f"written to {write_result(options.name, result)}")
    if not all(stall.tokens_equal for stall in stalls):
        sys.exit("a text changed")


if __name__ == "__main__":
    main()
