"""How much of a prompt a server reads out of the activations it computes on: the demo model.

    python benchmarks/prompt_recovery.py

For every depth (0: what enters the first block; 8: what leaves the last one) and three attackers
that anybody can write in an afternoon, the share of prompt tokens they name correctly:

- cosine, L2: the token whose embedding lies nearest to the activation. No training.
- probe: a linear map from activation to embedding, fitted on other text (ridge regression), then
  the nearest embedding. The weights of a served model are public, so anybody can fit one.
- search: tries tokens through the public weights, those first that the probe likes, and takes the
  one that gives the activation seen. Works from left to right. After "Hidden No More"
  (arXiv 2505.18332) and SipIt (arXiv 2510.15511).

Prompts are the sentences below and docstrings of a few modules; the probe learns from others. The
model itself has read the standard library, as any attacker has read what a served model has.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from common import environment, write_result
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from planetserve.model.checkpoint import Checkpoint

PROMPTS = (
    "How do I read a large text file line by line without loading all of it into memory?",
    "My colleague Maria wrote a decorator that retries a function three times before giving up.",
    "Please explain the difference between a list and a tuple to somebody who knows only Java.",
    "The invoice number is 48213 and the customer lives in Rotterdam; format both as JSON.",
    "Why does my generator return nothing the second time I loop over it?",
    "Write a function that removes duplicates from a list but keeps the original order.",
    "I am getting a KeyError when I look up the user's password hash in this dictionary.",
    "Can two threads append to the same list safely, or do I need a lock?",
    "Sort these employees by salary, highest first, and then by the date they were hired.",
    "What happens to an open socket when an exception is raised inside the with statement?",
    "Our test suite takes nine minutes; which parts of it could run in parallel?",
    "Convert the temperatures in this table from Fahrenheit to Celsius and plot them by month.",
    "Give me a regular expression that matches a Dutch postal code such as 1012 AB.",
    "The doctor's appointments are stored as strings; parse them and find the ones that overlap.",
    "Is it a bad idea to use a mutable default argument, and what should I write instead?",
    "Summarise this class in two sentences for a reader who has never programmed before.",
)
PROMPT_MODULES = ("statistics", "textwrap", "bisect", "shelve", "fractions", "sched")
PROBE_MODULES = tuple(
    "argparse ast asyncio base64 calendar collections configparser contextlib copy csv datetime "
    "decimal difflib email enum functools glob gzip hashlib heapq html http imaplib inspect io "
    "ipaddress itertools json locale logging mailbox math mimetypes multiprocessing operator os "
    "pathlib pdb pickle platform pprint queue random re sched select shutil signal smtplib socket "
    "sqlite3 ssl string struct subprocess tarfile tempfile threading time timeit tkinter tokenize "
    "traceback types typing unittest urllib uuid warnings weakref xml zipfile zlib".split()
)
MAX_PROMPT_TOKENS = 48
MAX_TEXT_TOKENS = 512
RIDGE = 1e-2
SEARCH_BATCH = 128
SEARCH_TOLERANCE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--search-prompts", type=int, default=8, help="sentences to search")
    options = parser.parse_args()
    torch.manual_seed(0)
    checkpoint = Checkpoint.open("demo")
    folder = checkpoint.pretrained_location[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    machine = environment()
    started_s = time.perf_counter()
    attack = Attack(model)
    used = set(PROMPT_MODULES)
    learned = [text for name in PROBE_MODULES if name not in used for text in docstrings(name)]
    attack.fit_probe([encode(tokenizer, text, MAX_TEXT_TOKENS) for text in learned])
    snippets = [text for name in PROMPT_MODULES for text in docstrings(name)]
    prompts = [encode(tokenizer, text, MAX_PROMPT_TOKENS) for text in (*PROMPTS, *snippets)]
    rows = attack.measure(prompts, prompts[: options.search_prompts])
    report = {
        "environment": machine,
        "model": {"name": "demo", "fingerprint": checkpoint.fingerprint},
        "num_prompts": len(prompts),
        "num_tokens": sum(len(ids) for ids in prompts),
        "num_searched_tokens": sum(len(ids) for ids in prompts[: options.search_prompts]),
        "num_probe_tokens": attack.num_probe_tokens,
        "seconds": round(time.perf_counter() - started_s, 1),
        "recovered_share_by_depth": rows,
    }
    print(markdown(rows))
    print(f"\n{report['num_tokens']} tokens of {len(prompts)} prompts")
    print(write_result("prompt_recovery", report))


class Attack:
    """Attackers that know a model's weights and see its activations."""

    def __init__(self, model: Any):
        self.model = model
        self.embedding_VD: torch.Tensor = model.get_input_embeddings().weight.detach()
        self.num_probe_tokens = 0
        self._maps: list[torch.Tensor] = []
        self._means: list[torch.Tensor] = []

    @torch.no_grad()
    def states(self, ids: Sequence[int]) -> list[torch.Tensor]:
        """Activations `[tokens, hidden]` at every depth."""
        seen: list[torch.Tensor] = []
        # Hugging Face reports the last state after the final norm; the network carries the one
        # before it.
        norm = self.model.model.norm
        handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        try:
            output = self.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        finally:
            handle.remove()
        return [state[0] for state in output.hidden_states[:-1]] + seen

    def fit_probe(self, texts: Sequence[Sequence[int]]) -> None:
        """Fit, per depth, the ridge regression from activation to embedding."""
        by_depth = [torch.cat(states) for states in zip(*map(self.states, texts), strict=True)]
        target = self.embedding_VD[[token for ids in texts for token in ids]].double()
        self.num_probe_tokens = len(target)
        for state in by_depth:
            inputs = scaled(state).double()
            mean = inputs.mean(dim=0)
            centred = inputs - mean
            gram = centred.T @ centred / len(centred)
            gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            cross = centred.T @ (target - self.embedding_VD.double().mean(dim=0)) / len(centred)
            self._maps.append(torch.linalg.solve(gram, cross).float())
            self._means.append(mean.float())

    def measure(
        self, prompts: Sequence[Sequence[int]], searched: Sequence[Sequence[int]]
    ) -> list[dict[str, float]]:
        """The share of tokens that each attacker recovers, one row a depth."""
        by_depth = [torch.cat(states) for states in zip(*map(self.states, prompts), strict=True)]
        truth = torch.tensor([token for ids in prompts for token in ids])
        rows = []
        for depth, state in enumerate(by_depth):
            guesses = {
                "cosine": unit(state) @ unit(self.embedding_VD).T,
                "l2": -torch.cdist(state, self.embedding_VD),
                "probe": self.probe_scores(depth, state),
            }
            row: dict[str, float] = {"depth": depth}
            for name, scores in guesses.items():
                row[name] = share(scores.argmax(dim=1) == truth)
            found = [self.search(depth, ids) for ids in searched]
            row["search"] = share(torch.tensor([hit for hits in found for hit in hits]))
            rows.append(row)
        return rows

    def probe_scores(self, depth: int, state: torch.Tensor) -> torch.Tensor:
        """How well each token of the vocabulary fits, `[tokens, vocabulary]`."""
        predicted = (scaled(state) - self._means[depth]) @ self._maps[depth]
        return unit(predicted) @ unit(self.embedding_VD - self.embedding_VD.mean(dim=0)).T

    @torch.no_grad()
    def search(self, depth: int, ids: Sequence[int]) -> list[bool]:
        """Which tokens of a prompt are found by running candidates through the first blocks."""
        seen = self.states(ids)[depth]
        order = self.probe_scores(depth, seen).argsort(dim=1, descending=True)
        known: list[int] = []
        for position in range(len(ids)):
            known.append(self._match(known, seen[position], order[position], depth))
        return [found == token for found, token in zip(known, ids, strict=True)]

    def _match(
        self, known: Sequence[int], seen: torch.Tensor, order: torch.Tensor, depth: int
    ) -> int:
        best, token = float("inf"), -1
        for candidates in order.split(SEARCH_BATCH):
            state = self._next_states(known, candidates, depth)
            error = (state - seen).norm(dim=1) / seen.norm()
            if float(error.min()) < best:
                best, token = float(error.min()), int(candidates[error.argmin()])
            if best < SEARCH_TOLERANCE:
                break
        return token

    def _next_states(
        self, known: Sequence[int], candidates: torch.Tensor, depth: int
    ) -> torch.Tensor:
        """Activations of each candidate as the token after `known`, `[candidates, hidden]`."""
        base = self.model.model
        layers = base.layers
        base.layers = layers[:depth] if depth else torch.nn.ModuleList()
        kept: list[torch.Tensor] = []
        handle = base.norm.register_forward_pre_hook(lambda _, args: kept.append(args[0][:, -1]))
        try:
            cache = DynamicCache()
            if known:
                base(torch.tensor([known]), past_key_values=cache)
                cache.batch_repeat_interleave(len(candidates))
            base(candidates[:, None], past_key_values=cache)
        finally:
            handle.remove()
            base.layers = layers
        return kept[-1]


def docstrings(module_name: str) -> Iterator[str]:
    """Docstrings of a module's public members, long enough to be text."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        return
    members = [module, *(getattr(module, name) for name in sorted(dir(module)) if name[0] != "_")]
    for member in members:
        text = inspect.getdoc(member) if getattr(member, "__module__", None) else None
        if text and len(text) > 60 and str(member.__module__).split(".")[0] == module_name:
            yield " ".join(text.split())


def encode(tokenizer: Any, text: str, max_tokens: int) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens]
    return ids


def unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def scaled(rows: torch.Tensor) -> torch.Tensor:
    """Rows of root mean square 1, which is how every block sees its input."""
    return unit(rows) * rows.shape[1] ** 0.5


def share(hits: torch.Tensor) -> float:
    return round(float(hits.float().mean()), 4)


def markdown(rows: Sequence[dict[str, float]]) -> str:
    lines = ["| depth | cosine | L2 | probe | search |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (f"{row[name]:.0%}" for name in ("cosine", "l2", "probe", "search"))
        lines.append(f"| {row['depth']:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
