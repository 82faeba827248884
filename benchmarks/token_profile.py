"""Where each millisecond of a token goes: the profile of `engine.py --profile`.

One session decodes through a chain of servers on loopback, with stamps (`stamps.py`) at the points
that a step passes in the client and in every server. Between two neighbouring stamps lies one kind
of work, so the parts of a token add up to the whole of it. Medians over tokens.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import median
from stamps import FOLDER_VARIABLE, Stamps

MODEL, HEAD, GENERATE = "model", "head", "generate()"
SCHEDULER, CODEC, CRYPTO = "scheduler", "codec", "crypto"
TRANSPORT, WAKE = "transport", "wake-ups"
KINDS = (MODEL, HEAD, GENERATE, SCHEDULER, CODEC, CRYPTO, TRANSPORT, WAKE)

_SERVER_STAMPS = (
    "received", "opened", "awake", "batched", "computed", "fetched", "packed", "sealed", "sent",
)  # fmt: skip
_SERVER_KINDS = (CRYPTO, WAKE, SCHEDULER, MODEL, WAKE, CODEC, CRYPTO, TRANSPORT)
"""What lies between two neighbouring stamps of a server. Opening a frame is decryption, checks and
a table of a few bytes; taking results from the engine thread counts as a wake-up."""


def server_environment(folder: Path) -> dict[str, str]:
    """What `stamps` needs to run as a server's module."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {FOLDER_VARIABLE: str(folder), "PYTHONPATH": os.pathsep.join(paths)}


def collect(folder: Path, pids: list[int], timeout_s: float = 10.0) -> list[Stamps]:
    """The stamps of the servers with these process ids since the last time."""
    found = []
    for pid in pids:
        path = folder / f"{pid}.json"
        path.unlink(missing_ok=True)
        os.kill(pid, signal.SIGUSR2)
        deadline_s = time.monotonic() + timeout_s
        while not path.exists():
            if time.monotonic() > deadline_s:
                raise SystemExit(f"process {pid} wrote no stamps")
            time.sleep(0.01)
        found.append([(label, moment) for label, moment in json.loads(path.read_text())])
    return found


def profile(client: Stamps, servers: list[Stamps]) -> dict[str, Any]:
    """Milliseconds of a token by kind, from the stamps of the processes along the chain."""
    tokens = list(_tokens(client, servers))
    if not tokens:
        raise SystemExit("the stamps show no whole decode step")
    by_kind = {kind: 1000 * median(token[kind] for token in tokens) for kind in KINDS}
    total = 1000 * median(sum(token.values()) for token in tokens)
    return {"tokens": len(tokens), "token_ms": total, "ms": by_kind}


def idle_share(server: Stamps, begin_s: float, end_s: float) -> float:
    """Part of a time in which a server's engine had no step to run."""
    idle_s, since_s = 0.0, begin_s
    for label, moment in server:
        at_s = min(max(moment, begin_s), end_s)
        if label == "waits":
            since_s = at_s
        elif label == "goes on":
            idle_s += at_s - since_s
    return idle_s / (end_s - begin_s)


def _tokens(client: Stamps, servers: list[Stamps]) -> Iterator[dict[str, float]]:
    steps = _steps(client, "asked")
    hops = [_steps(stamps, "received") for stamps in servers]
    for step, following in zip(steps, steps[1:], strict=False):
        wanted = ("asked", "on loop", "sent", "answered", "told", "head", "logits")
        if any(name not in step for name in wanted):
            continue
        passed = []
        for hop in hops:
            inside = [s for s in hop if step["asked"] < s["received"] < step["told"]]
            if len(inside) == 1 and all(name in inside[0] for name in _SERVER_STAMPS):
                passed.append(inside[0])
        if len(passed) < len(hops):
            continue
        passed.sort(key=lambda stamps: stamps["received"])
        token = dict.fromkeys(KINDS, 0.0)
        token[WAKE] += step["on loop"] - step["asked"]
        token[CODEC] += step["sent"] - step["on loop"]
        left_s = step["sent"]
        for stamps in passed:
            # A frame may arrive before its sender has noted that it was sent.
            token[TRANSPORT] += stamps["received"] - left_s
            moments = itertools.pairwise(stamps[name] for name in _SERVER_STAMPS)
            for kind, (begin_s, end_s) in zip(_SERVER_KINDS, moments, strict=True):
                token[kind] += end_s - begin_s
            left_s = stamps["sent"]
        token[TRANSPORT] += step["answered"] - left_s
        token[WAKE] += step["told"] - step["answered"]
        token[HEAD] += step["logits"] - step["head"]
        token[GENERATE] += following["asked"] - step["told"] - token[HEAD]
        yield token


def _steps(stamps: Stamps, first: str) -> list[dict[str, float]]:
    """Stamps step by step; a step begins with the label `first`."""
    steps: list[dict[str, float]] = []
    for label, moment in sorted(stamps, key=lambda stamp: stamp[1]):
        if label == first:
            steps.append({})
        if steps:
            steps[-1].setdefault(label, moment)
    return steps
