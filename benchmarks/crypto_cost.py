"""What encryption and framing cost of a decode step, and what a hop costs besides arithmetic.

    python benchmarks/crypto_cost.py            10 minutes
    python benchmarks/crypto_cost.py --quick    two short rounds

A random float32 Llama of 150 million parameters on three servers on loopback, each a process with
one thread. Rounds take turns: edges sealed as always, and plain edges (`plain_edges.py`, which no
setting of the product leads to), in the same processes. Two ways to the same number:

- *whole*: the difference of the two kinds of rounds. It is a small difference of large numbers,
  so it comes with the spread of the rounds.
- *parts*: sealing, opening, packing, unpacking and copying one decode step's frame, timed alone,
  times the edges of the ring.

The time of a hop beyond arithmetic is what a step takes between leaving the client's first layers
and coming back, minus the passes through the blocks that the servers timed, by the number of hops.

Results go to `benchmarks/results/crypto_cost.json`; a table goes to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import plain_edges
import torch
from common import cpu_seconds, environment, load, median, percentile, table, write_result
from plain_edges import KINDS
from processes import children, make_checkpoint, prepare, start_bootstrap, start_servers
from switchable_server import FOLDER_VARIABLE

from planetserve import AutoDistributedModelForCausalLM
from planetserve.client.session import InferenceSession
from planetserve.crypto.secrets import new_edge_secret
from planetserve.demo import Child
from planetserve.tensors import tensor_bytes, tensor_from_payload
from planetserve.wire.frame import Direction, FrameHeader, FrameType, WireDtype
from planetserve.wire.step import RowSlice, StepTable

NUM_SERVERS = 3
TARGET_SHARE = 0.03
TARGET_HOP_MS = 1.0
SHAPE = {
    "hidden_size": 768,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 2112,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


@dataclass
class Round:
    """The decode steps of one text."""

    kind: str
    tokens: list[int]
    steps_s: list[float]
    """In the client: from the ring's input to its output."""
    tokens_s: list[float]
    """Whole tokens, with the client's own part of the model."""
    passes_s: list[float]
    """Arithmetic of all servers, by step."""
    cpu_s: float

    @property
    def hops_ms(self) -> list[float]:
        """Per hop and step, what is not arithmetic."""
        pairs = zip(self.steps_s, self.passes_s, strict=True)
        return [1000 * (step - passes) / NUM_SERVERS for step, passes in pairs]


@dataclass
class Swarm:
    """Three servers that switch together."""

    folder: Path
    servers: list[Child]
    kind: str = "sealed"

    def switch_to(self, kind: str) -> None:
        """Sessions from now on are of this kind, at servers and client."""
        if kind != self.kind:
            for server in self.servers:
                server.process.send_signal(signal.SIGUSR1)
        self.kind = kind
        plain_edges.use(kind)
        self.passes_s()  # whoever has written has switched before

    def passes_s(self) -> list[list[float]]:
        """Times of the passes since the last call, by server."""
        found = []
        for server in self.servers:
            server.process.send_signal(signal.SIGUSR2)
        for server in self.servers:
            path = self.folder / f"{server.process.pid}.json"
            while not path.exists():
                time.sleep(0.005)
            found.append(json.loads(path.read_text()))
            path.unlink()
        return found


@contextmanager
def running(checkpoint: Path) -> Iterator[tuple[Swarm, Any]]:
    with children() as started:
        os.environ[FOLDER_VARIABLE] = str(started.folder)
        here = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(here)
        peers = start_bootstrap(started)
        servers = start_servers(
            started, checkpoint, SHAPE["num_hidden_layers"], NUM_SERVERS,
            "--initial_peers", *peers, "--torch_dtype", "float32", module="switchable_server",
        )  # fmt: skip
        with AutoDistributedModelForCausalLM.from_pretrained(
            str(checkpoint), initial_peers=peers, torch_dtype="float32", show_route=False
        ) as model:
            yield Swarm(started.folder, servers), model


def one_round(swarm: Swarm, model: Any, kind: str, options: argparse.Namespace) -> Round:
    swarm.switch_to(kind)
    steps_s: list[float] = []
    run = InferenceSession.run

    def timed(session: InferenceSession, *args: Any, **kwargs: Any) -> torch.Tensor:
        started_s = time.perf_counter()
        output = run(session, *args, **kwargs)
        steps_s.append(time.perf_counter() - started_s)
        return output

    tokens_s: list[float] = []

    def watch(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tokens_s.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    prompt = torch.randint(
        3,
        SHAPE["vocab_size"],
        (1, options.prompt_tokens),
        generator=torch.Generator().manual_seed(1),
    )
    InferenceSession.run = timed  # type: ignore[method-assign]
    before_s = cpu_seconds()
    try:
        output = model.generate(
            prompt, max_new_tokens=options.new_tokens, do_sample=False, pad_token_id=0,
            attention_mask=torch.ones_like(prompt), stopping_criteria=[watch],
        )  # fmt: skip
    finally:
        InferenceSession.run = run  # type: ignore[method-assign]
    cpu_s = cpu_seconds() - before_s
    by_server = swarm.passes_s()
    assert all(len(passes) == len(steps_s) for passes in by_server)
    # The first step is the prompt.
    passes_s = [sum(passes) for passes in zip(*by_server, strict=True)][1:]
    gaps_s = [b - a for a, b in zip(tokens_s, tokens_s[1:], strict=False)]
    return Round(kind, output[0].tolist(), steps_s[1:], gaps_s, passes_s, cpu_s)


def parts_us(repeats: int = 20_000) -> dict[str, float]:
    """Microseconds of each thing that is done to a decode step's frame on one edge."""
    hidden, session = SHAPE["hidden_size"], bytes(16)
    output_TD = torch.randn(1, hidden)
    table_ = StepTable((RowSlice(0, 200, 1),))
    header = FrameHeader(
        FrameType.STEP, session=session, edge=1, step=9, position=200, num_tokens=1, span_start=5,
        span_end=10, dtype=WireDtype.FLOAT32, shape=(1, hidden),
    )  # fmt: skip
    secret = new_edge_secret()
    name = (session, 1, 0, Direction.FORWARD)
    found: dict[str, float] = {}

    def timed(what: str, work: Callable[[], Any]) -> Any:
        samples = []
        for _ in range(5):
            started_s = time.perf_counter()
            for _ in range(repeats // 5):
                result = work()
            samples.append((time.perf_counter() - started_s) / (repeats // 5))
        found[what] = 1e6 * min(samples)
        return result

    body = timed("tensor to bytes", lambda: tensor_bytes(output_TD))
    packed = timed("pack table", table_.pack)
    size = len(packed) + body.nbytes
    # The stream fills in the payload's length before it packs.
    raw = timed("pack header", lambda: dataclasses.replace(header, payload_bytes=size).pack())
    timed("unpack header", lambda: FrameHeader.unpack(raw))
    for kind, (sealer_type, opener_type) in KINDS.items():
        sealer = sealer_type(secret, *name, 0.0)
        frames: list[Any] = []
        timed(
            f"{kind}: seal",
            lambda s=sealer, f=frames: f.append(s.seal(header, [packed, body], 0.0)),
        )
        opener = opener_type(secret, *name)
        payloads = iter(
            [(h, bytearray(p if isinstance(p, bytes) else b"".join(p))) for h, p in frames]
        )
        plaintext = timed(f"{kind}: open", lambda o=opener, p=payloads: o.open(*next(p)))
    timed("unpack table", lambda: StepTable.unpack(plaintext, 1, 1))
    _, offset = StepTable.unpack(plaintext, 1, 1)
    shape = (1, hidden)
    timed(
        "bytes to tensor", lambda: tensor_from_payload(plaintext, offset, WireDtype.FLOAT32, shape)
    )
    return found


def report(rounds: list[Round], parts: dict[str, float]) -> dict[str, Any]:
    """Everything that is concluded from the measurements."""
    by_kind = {kind: [r for r in rounds if r.kind == kind] for kind in KINDS}
    step_ms = {k: 1000 * median(s for r in rs for s in r.steps_s) for k, rs in by_kind.items()}
    token_ms = {k: 1000 * median(s for r in rs for s in r.tokens_s) for k, rs in by_kind.items()}
    hop_ms = {k: [ms for r in rs for ms in r.hops_ms] for k, rs in by_kind.items()}
    cpu_ms = {k: 1000 * median(r.cpu_s / len(r.steps_s) for r in rs) for k, rs in by_kind.items()}
    # Neighbours in time, so that what else the machine does hits both.
    pairs = list(zip(by_kind["sealed"], by_kind["plain"], strict=True))
    shares = [(median(a.tokens_s) - median(b.tokens_s)) / median(a.tokens_s) for a, b in pairs]
    num_edges = NUM_SERVERS + 1
    crypto_us = sum(parts[f"sealed: {w}"] - parts[f"plain: {w}"] for w in ("seal", "open"))
    framing_us = sum(us for name, us in parts.items() if not name.startswith("sealed: "))
    return {
        "decode_step_ms": token_ms,
        "ring_ms": step_ms,
        "cpu_ms_per_token": cpu_ms,
        "hop_beyond_arithmetic_ms": {
            k: {"p50": median(ms), "p95": percentile(ms, 95)} for k, ms in hop_ms.items()
        },
        "arithmetic_ms": 1000 * median(s for r in rounds for s in r.passes_s),
        "whole": {
            "crypto_share": median(shares),
            "crypto_share_of_each_pair": [round(share, 4) for share in shares],
            "crypto_cpu_share": 1 - cpu_ms["plain"] / cpu_ms["sealed"],
        },
        "parts": {
            "us_per_edge": parts,
            "crypto_us_per_edge": crypto_us,
            "framing_us_per_edge": framing_us,
            "edges": num_edges,
            "crypto_share": num_edges * crypto_us / 1000 / token_ms["sealed"],
            "framing_share": num_edges * framing_us / 1000 / token_ms["sealed"],
        },
        "targets": {"share": TARGET_SHARE, "hop_ms_p50": TARGET_HOP_MS},
        "equal_tokens": all(r.tokens == rounds[0].tokens for r in rounds),
    }


def show(found: dict[str, Any]) -> str:
    parts, whole, hops = found["parts"], found["whole"], found["hop_beyond_arithmetic_ms"]
    percent = "{:.2f} %".format
    rows = [
        ["decode step, sealed / plain", f"{found['decode_step_ms']['sealed']:.2f} / "
         f"{found['decode_step_ms']['plain']:.2f} ms"],
        ["CPU per token, sealed / plain", f"{found['cpu_ms_per_token']['sealed']:.2f} / "
         f"{found['cpu_ms_per_token']['plain']:.2f} ms"],
        ["crypto, parts", f"{percent(100 * parts['crypto_share'])}, "
         f"{parts['crypto_us_per_edge']:.1f} us an edge"],
        ["framing and copies, parts", f"{percent(100 * parts['framing_share'])}, "
         f"{parts['framing_us_per_edge']:.1f} us an edge"],
        ["both, parts (target 3 %)",
         percent(100 * (parts["crypto_share"] + parts["framing_share"]))],
        ["crypto, whole: time", percent(100 * whole["crypto_share"])],
        ["crypto, whole: CPU", percent(100 * whole["crypto_cpu_share"])],
        ["a hop beyond arithmetic, p50 (target 1.0 ms)", f"{hops['sealed']['p50']:.2f} ms sealed, "
         f"{hops['plain']['p50']:.2f} ms plain"],
        ["a hop beyond arithmetic, p95", f"{hops['sealed']['p95']:.2f} ms sealed, "
         f"{hops['plain']['p95']:.2f} ms plain"],
    ]  # fmt: skip
    return table(["of a decode step", "cost"], rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two short rounds of each kind")
    parser.add_argument("--rounds", type=int, default=12, help="texts of each kind")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=96)
    parser.add_argument("--model", type=Path, help="a checkpoint of the same shape")
    parser.add_argument("--name", default="crypto_cost", help="of the result file")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds, options.new_tokens = 2, 24
    prepare()
    result: dict[str, Any] = {
        "benchmark": "crypto_cost",
        "environment": environment(),
        "settings": {key: str(v) if key == "model" else v for key, v in vars(options).items()},
        "model": SHAPE,
    }
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="planetserve-bench-model-") as folder:
        with running(options.model or make_checkpoint(Path(folder), SHAPE)) as (swarm, model):
            for kind in KINDS:
                one_round(swarm, model, kind, options)
            for number in range(options.rounds):
                for kind in KINDS:
                    rounds.append(one_round(swarm, model, kind, options))
                    print(
                        f"round {number + 1}/{options.rounds} {kind}: "
                        f"{1000 * median(rounds[-1].tokens_s):.2f} ms a token", flush=True,
                    )  # fmt: skip
    found = report(rounds, parts_us())
    print(show(found))
    result |= {"load_after": load(), **found}
    print(f"load before {result['environment']['load_before']}, after {result['load_after']}")
    print(f"written to {write_result(options.name, result)}")
    if not found["equal_tokens"]:
        sys.exit("the tokens of the rounds differ")


if __name__ == "__main__":
    main()
