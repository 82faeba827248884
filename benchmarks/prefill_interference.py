"""What a long prompt does to the texts of others on the same server, and they to it.

    python benchmarks/prefill_interference.py            three rounds: about 5 minutes
    python benchmarks/prefill_interference.py --quick    one round

One server process with one thread runs all blocks of a random Llama of 134 million parameters;
sessions are threads of one client process on the same machine. In each round 15 sessions start
together ("first token together": how long until the last of them writes, against one prompt of as
many tokens as all theirs) and write on without pause. After a quiet window one session more sends
a prompt of 2,048 tokens, and another quiet window follows. A time per token is the time between two
tokens of one session; it counts as "with" if the second of them came while the long prompt was on
its way, and as "without" if it came in a quiet window. Between rounds the long prompt is sent to
the idle server. Every round must write the same tokens.

Results go to `benchmarks/results/prefill_interference.json`; a table goes to stdout.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import environment, load, median, percentile, table, write_result
from engine import SHAPE, progress
from processes import children, make_checkpoint, prepare
from transformers import StoppingCriteria

from planetserve import AutoDistributedModelForCausalLM
from planetserve.demo import LOOPBACK

TARGET_RATIO = 2.0
_SETTLE_S = 1.0


class Writer(StoppingCriteria):
    """One session in a thread of its own: notes when each token came, until it is told to stop."""

    def __init__(self, model: Any, prompt_1T: torch.Tensor, most_tokens: int):
        self.times_s: list[float] = []
        self.tokens: list[int] = []
        self.is_over = threading.Event()
        self.has_first = threading.Event()
        self._model = model
        self._prompt_1T = prompt_1T
        self._most_tokens = most_tokens
        self._thread = threading.Thread(target=self._run)
        self.started_s = time.perf_counter()
        self._thread.start()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times_s.append(time.perf_counter())
        self.has_first.set()
        return torch.full((input_ids.shape[0],), self.is_over.is_set())

    def _run(self) -> None:
        try:
            output = self._model.generate(
                self._prompt_1T,
                attention_mask=torch.ones_like(self._prompt_1T),
                max_new_tokens=self._most_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=[self],
            )
            self.tokens = output[0, self._prompt_1T.shape[1] :].tolist()
        finally:
            self.has_first.set()

    def join(self) -> None:
        """Wait for the end of the text.

        Raises:
            SystemExit: it failed; the thread has said why.
        """
        self._thread.join()
        if not self.tokens:
            raise SystemExit("a session failed; see above")

    @property
    def first_token_s(self) -> float:
        return self.times_s[0] - self.started_s

    def gaps_s(self, begin_s: float, end_s: float) -> list[float]:
        """Times per token of the tokens that came between two moments."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return [b - a for a, b in pairs if begin_s < b <= end_s]


@dataclass(frozen=True)
class Round:
    """One round, times in seconds."""

    long_alone_s: float
    long_among_others_s: float
    together_first_s: list[float]
    with_s: list[float]
    without_s: list[float]
    long_alone_token: int
    long_token: int
    tokens: list[list[int]]


@contextmanager
def running(checkpoint: Path, options: argparse.Namespace) -> Iterator[Any]:
    """A client of one server."""
    with ExitStack() as stack:
        started = stack.enter_context(children())
        flags = ["--new_swarm", "--host_maddrs", LOOPBACK, "--torch_dtype", options.dtype,
                 "--num_threads", "1", "--attn_cache_tokens", "32768",
                 "--inference_max_length", "4096",
                 "--prefill_slowdown", str(options.prefill_slowdown)]  # fmt: skip
        blocks = f"0:{SHAPE['num_hidden_layers']}"
        server = started.start("server", "planetserve.run_server", str(checkpoint),
                               "--block_indices", blocks, *flags)  # fmt: skip
        client = AutoDistributedModelForCausalLM.from_pretrained(
            str(checkpoint), initial_peers=server.wait_ready()["addresses"],
            torch_dtype=options.dtype, show_route=False,
        )  # fmt: skip
        yield stack.enter_context(client)


def one_round(model: Any, prompts: torch.Tensor, long: torch.Tensor, quiet_s: float) -> Round:
    """The long prompt alone, then among sessions that write."""
    alone = Writer(model, long, 1)
    alone.join()
    writers = [Writer(model, prompt[None], 1500) for prompt in prompts]
    try:
        for writer in writers:
            writer.has_first.wait()
        time.sleep(_SETTLE_S)
        begin_s = time.perf_counter()
        time.sleep(quiet_s)
        late = Writer(model, long, 1)
        late.join()
        done_s = late.started_s + late.first_token_s
        time.sleep(_SETTLE_S)
        again_s = time.perf_counter()
        time.sleep(quiet_s)
        end_s = time.perf_counter()
    finally:
        for writer in writers:
            writer.is_over.set()
        for writer in writers:
            writer.join()
    return Round(
        long_alone_s=alone.first_token_s,
        long_among_others_s=late.first_token_s,
        together_first_s=[writer.first_token_s for writer in writers],
        with_s=[gap for w in writers for gap in w.gaps_s(late.started_s, done_s)],
        without_s=[
            gap for w in writers
            for gap in w.gaps_s(begin_s, late.started_s) + w.gaps_s(again_s, end_s)
        ],
        long_alone_token=alone.tokens[0],
        long_token=late.tokens[0],
        tokens=[writer.tokens for writer in writers],
    )  # fmt: skip


def same_tokens(rounds: Sequence[Round]) -> bool:
    """Whether all rounds wrote the same, as far as they went."""
    firsts = {token for r in rounds for token in (r.long_alone_token, r.long_token)}
    pairs = [
        pair
        for r in rounds
        for known, text in zip(rounds[0].tokens, r.tokens, strict=True)
        for pair in zip(known, text, strict=False)
    ]
    return len(firsts) == 1 and all(known == token for known, token in pairs)


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians over rounds; percentiles over all tokens."""
    with_s = [gap for r in rounds for gap in r.with_s]
    without_s = [gap for r in rounds for gap in r.without_s]
    alone_s = median(r.long_alone_s for r in rounds)
    among_s = median(r.long_among_others_s for r in rounds)
    last_s = median(max(r.together_first_s) for r in rounds)
    ratios = [percentile(r.with_s, 95) / percentile(r.without_s, 95) for r in rounds]
    return {
        "token_ms_p50_without": 1000 * median(without_s),
        "token_ms_p95_without": 1000 * percentile(without_s, 95),
        "token_ms_p50_with": 1000 * median(with_s),
        "token_ms_p95_with": 1000 * percentile(with_s, 95),
        "p95_ratio": percentile(with_s, 95) / percentile(without_s, 95),
        "p95_ratio_of_each_round": ratios,
        "p95_ratio_target": TARGET_RATIO,
        "long_prompt_first_token_s_alone": alone_s,
        "long_prompt_first_token_s_among_others": among_s,
        "long_prompt_ratio": among_s / alone_s,
        "together_first_token_s_median": median(median(r.together_first_s) for r in rounds),
        "together_first_token_s_last": last_s,
        "together_ratio": last_s / alone_s,
        "tokens_measured_with": len(with_s),
        "tokens_measured_without": len(without_s),
        "tokens_equal": same_tokens(rounds),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one round")
    add("--rounds", type=int, default=3)
    add("--sessions", type=int, default=15, help="sessions that write")
    add("--prompt_tokens", type=int, default=128, help="prompt of each of them")
    add("--long_tokens", type=int, default=2048, help="the long prompt")
    add("--quiet_s", type=float, default=8.0, help="length of a quiet window")
    add("--dtype", default="float32")
    add("--prefill_slowdown", type=float, default=1.7, help="setting of the server")
    add("--name", default="prefill_interference", help="of the result file")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds = 1
    prepare()
    result: dict[str, Any] = {
        "benchmark": "prefill_interference",
        "environment": environment(),
        "settings": vars(options),
        "model": SHAPE,
        "threads_per_process": 1,
    }
    generator = torch.Generator().manual_seed(1)
    size = (options.sessions, options.prompt_tokens)
    prompts = torch.randint(3, SHAPE["vocab_size"], size, generator=generator)
    long = torch.randint(3, SHAPE["vocab_size"], (1, options.long_tokens), generator=generator)
    rounds = []
    with tempfile.TemporaryDirectory(prefix="planetserve-bench-model-") as folder:
        checkpoint = make_checkpoint(Path(folder), SHAPE)
        with running(checkpoint, options) as model:
            Writer(model, prompts[:1], 8).join()
            for number in range(options.rounds):
                rounds.append(one_round(model, prompts, long, options.quiet_s))
                ratio = summary(rounds[-1:])["p95_ratio"]
                progress(f"round {number + 1}/{options.rounds}: p95 ratio {ratio:.2f}")
    found = summary(rounds)
    print(table(["what", "value"], [[key, value] for key, value in found.items()]))
    for entry in (asdict(r) for r in rounds):
        del entry["tokens"], entry["with_s"], entry["without_s"]
        result.setdefault("rounds", []).append(entry)
    result |= {"load_after": load(), "summary": found}
    print(f"load before {result['environment']['load_before']}, after {result['load_after']}")
    print(f"written to {write_result(options.name, result)}")
    if not found["tokens_equal"]:
        sys.exit("a text changed")


if __name__ == "__main__":
    main()
