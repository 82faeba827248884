"""Section `wide_area`: what the planner predicts, against a real swarm on emulated wide-area links.

Server processes with a random Llama sit behind TCP proxies that delay and throttle (`emulated.py`).
Clients generate over one chain after the other, each forced by `allowed_servers`, and once over the
chain that the planner chooses among all. Every prediction is made before its text, from what the
servers announce and the client pings: nobody tells the planner what the proxies do.

- `chains`: time per token, predicted and measured, and what the prediction is made of.
- `targets`: how many predictions are within 15 %, and how good the choice was.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import median

from chain.emulated import ENVIRONMENT, EmulatedSwarm, Place, ServerPlan
from chain.output import markdown, new_figure, say

CLIENT = Place(0, 0, 3, 50)
SERVERS = (
    ServerPlan("a1", "0:4", Place(0, 8, 2, 50)),
    ServerPlan("a2", "0:6", Place(20, 5, 3, 20)),
    ServerPlan("b1", "4:8", Place(12, 12, 2, 50)),
    ServerPlan("b2", "3:9", Place(25, 30, 1, 100)),
    ServerPlan("c1", "8:12", Place(5, 20, 4, 20)),
    ServerPlan("c2", "6:12", Place(40, 10, 2, 50)),
    ServerPlan("d", "2:12", Place(50, 30, 5, 10)),
)
CHAINS = (
    ("a1", "b1", "c1"), ("a1", "b2", "c1"), ("a1", "b1", "c2"), ("a2", "c2"), ("a2", "b2", "c1"),
    ("a1", "d"), ("a2", "d"), ("a2", "b1", "c1"), ("a1", "b2", "c2"),
)  # fmt: skip
QUICK_SERVERS = (SERVERS[1], SERVERS[5])
QUICK_CHAINS = (("a2", "c2"),)
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12,
         "num_attention_heads": 8, "vocab_size": 1000}  # fmt: skip
UPDATE_PERIOD_S = 4.0
TOLERANCE = 0.15


def measure(quick: bool) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    servers, chains = (QUICK_SERVERS, QUICK_CHAINS) if quick else (SERVERS, CHAINS)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
        period = str(UPDATE_PERIOD_S)
        with EmulatedSwarm(folder, servers, CLIENT, "--update_period", period) as swarm:
            say("  the swarm is up; one long text over every chain")
            forced = [[swarm.peer_ids[name] for name in chain] for chain in chains]
            _generate(swarm, folder, forced, 40 if quick else 800, 4 if quick else 16)
            time.sleep(2 * UPDATE_PERIOD_S)  # what that has shown is announced
            rounds = []
            for number in range(1 if quick else 2):
                say(f"  round {number + 1}")
                rounds.append(_generate(swarm, folder, [None, *forced], 20, 4 if quick else 24))
            names = {peer_id: name for name, peer_id in swarm.peer_ids.items()}
    return _summary(rounds, names, {server.name: server for server in servers})


def _generate(
    swarm: EmulatedSwarm,
    folder: str,
    allowed: Sequence[Sequence[str] | None],
    prompt_tokens: int,
    new_tokens: int,
) -> list[dict[str, Any]]:
    task = {"model": folder, "peers": swarm.initial_peers, "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens, "allowed": allowed}  # fmt: skip
    client = Path(__file__).with_name("wide_area_client.py")
    done = subprocess.run(
        [sys.executable, str(client), json.dumps(task)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def _summary(
    rounds: list[list[dict[str, Any]]], names: dict[str, str], servers: dict[str, ServerPlan]
) -> dict[str, Any]:
    texts: dict[str, list[dict[str, Any]]] = {}
    for line in (line for each in rounds for line in each):
        hops = [f"{names[peer_id]} {start}:{end}" for peer_id, start, end in line["hops"]]
        texts.setdefault(" > ".join(hops), []).append(line)
    chosen = [[names[peer_id] for peer_id, *_ in each[0]["hops"]] for each in rounds]
    found = []
    for label, lines in texts.items():
        hops = [names[peer_id] for peer_id, *_ in lines[0]["hops"]]
        ring = [CLIENT, *(servers[name].place for name in hops), CLIENT]
        delays = [1000 * a.link(b).delay_s for a, b in zip(ring, ring[1:], strict=False)]
        parts = lines[0]["predicted_parts_ms"]
        found.append(
            {
                "chain": label,
                "predicted_ms": median(line["predicted_ms"] for line in lines),
                "measured_ms": median(ms for line in lines for ms in line["token_ms"]),
                "parts_ms": {key: median(x["predicted_parts_ms"][key] for x in lines)
                             for key in parts},
                "emulated_delays_ms": sum(delays),
                "chosen": hops in chosen,
                "texts": [{"predicted_ms": line["predicted_ms"], "token_ms": line["token_ms"]}
                          for line in lines],
            }
        )  # fmt: skip
    found.sort(key=lambda chain: chain["measured_ms"])
    return {
        "client": _place(CLIENT),
        "servers": {name: {"span": s.span, **_place(s.place)} for name, s in servers.items()},
        "model": SIZES,
        "chains": found,
        "snapshot": rounds[-1][0]["snapshot"],
        "names": names,
    }


def _place(place: Place) -> dict[str, float]:
    return {"x_ms": place.x_ms, "y_ms": place.y_ms, "last_mile_ms": place.last_mile_ms,
            "mbps": place.mbps}  # fmt: skip


def tables(result: dict[str, Any]) -> dict[str, str]:
    chains = result["chains"]
    rows = [
        [("**" if c["chosen"] else "") + c["chain"] + ("**" if c["chosen"] else ""),
         c["measured_ms"], c["predicted_ms"], f"{100 * _error(c):+.1f} %",
         c["parts_ms"]["links"], c["parts_ms"]["blocks"],
         c["parts_ms"]["visits"] + c["parts_ms"]["sending"]]
        for c in chains
    ]  # fmt: skip
    chosen = [c["measured_ms"] for c in chains if c["chosen"]]
    targets = [
        ["chains measured", len(chains), "5"],
        ["predictions within 15 %", sum(abs(_error(c)) <= TOLERANCE for c in chains), "5"],
        ["largest error", f"{100 * max(abs(_error(c)) for c in chains):.1f} %", None],
        ["chosen chain, time per token over the fastest's",
         f"{max(chosen) / chains[0]['measured_ms']:.3f}", "1.05"],
        ["slowest chain, the same", f"{chains[-1]['measured_ms'] / chains[0]['measured_ms']:.2f}",
         None],
    ]  # fmt: skip
    header = ["chain (the chosen in bold)", "measured, ms per token", "predicted", "error",
              "of it links", "blocks", "visits, sending"]  # fmt: skip
    return {
        "chains": markdown(header, rows),
        "targets": markdown(["wide-area emulation", "measured", "target"], targets),
    }


def _error(chain: dict[str, Any]) -> float:
    error: float = chain["predicted_ms"] / chain["measured_ms"] - 1
    return error


def figures(result: dict[str, Any]) -> dict[str, Any]:
    figure, (axis,) = new_figure()
    most = 1.15 * max(max(c["predicted_ms"], c["measured_ms"]) for c in result["chains"])
    axis.fill_between(
        [0, most], [0, most * (1 - TOLERANCE)], [0, most * (1 + TOLERANCE)], alpha=0.15
    )
    axis.plot([0, most], [0, most], "k-", lw=0.8)
    for chain in result["chains"]:
        mark = "r*" if chain["chosen"] else "b."
        axis.plot(chain["measured_ms"], chain["predicted_ms"], mark, ms=9)
    axis.set(xlabel="measured, ms per token", ylabel="predicted, ms per token")
    axis.set(xlim=(0, most), ylim=(0, most), title="shaded: within 15 %; star: the chosen chain")
    return {"predicted": figure}
