"""A plan as text for people and as JSON for programs; docs/plan.md describes the JSON."""

from __future__ import annotations

import json
from typing import Any

from planetserve.plan.solving import Plan
from planetserve.routing.cost import price, reputation
from planetserve.routing.front import request_ms
from planetserve.types import Chain

JSON_VERSION = 1


def as_json(plan: Plan) -> str:
    """The plan as one JSON document with a final line break."""
    return json.dumps(_document(plan), indent=2, allow_nan=False) + "\n"


def _document(plan: Plan) -> dict[str, Any]:
    request, gaps = plan.request, plan.proven.gaps if plan.proven else None
    return {
        "version": JSON_VERSION,
        "optimizer": plan.optimizer,
        "pick": request.pick,
        "prompt_tokens": request.prompt_tokens,
        "output_tokens": request.output_tokens,
        "cache_tokens": request.tokens,
        "num_blocks": plan.snapshot.num_blocks,
        "num_servers": len(plan.snapshot.servers),
        "solve_ms": plan.solve_ms,
        "exact": plan.proven.exact if plan.proven else None,
        "picked": plan.picked,
        "chains": [
            {
                "hops": [
                    {"server": hop.peer_id, "start": hop.start, "end": hop.end} for hop in chain
                ],
                "latency_ms": chain.latency_ms,
                "throughput_tokens_per_s": chain.throughput_tokens_per_s,
                "tokens_per_s": tokens_per_s(chain),
                "reputation": reputation(plan.snapshot, chain),
                "price": price(plan.snapshot, chain),
                "request_ms": request_ms(chain, request) if request.pick == "request" else None,
                "gap": gaps[number] if gaps else None,
            }
            for number, chain in enumerate(plan.chains)
        ],
    }


def as_text(plan: Plan) -> str:
    """The plan for a terminal: every chain on a line, then the picked one hop by hop."""
    lines = [_headline(plan), ""]
    if len(plan.chains) > 1:
        lines += [*_table(plan), ""]
    lines += _picked(plan)
    return "\n".join(lines) + "\n"


def tokens_per_s(chain: Chain) -> float | None:
    """Speed of one user alone on the chain; None where a token takes no time at all."""
    return 1000.0 / chain.latency_ms if chain.latency_ms > 0 else None


def _headline(plan: Plan) -> str:
    snapshot, found = plan.snapshot, len(plan.chains)
    text = f"{plan.optimizer}: {found} chain{'s' if found > 1 else ''}"
    text += f" through {snapshot.num_blocks} blocks on {len(snapshot.servers)} servers,"
    text += f" solve time {plan.solve_ms:.1f} ms"
    if plan.proven is not None:
        text += "; proven exact" if plan.proven.exact else "; not all proven exact"
    return text


def _table(plan: Plan) -> list[str]:
    names = ["latency_ms", "throughput_tokens_per_s"]
    if plan.request.pick == "request":
        names.append("request_s")
    lines = ["    #  " + "  ".join(names) + "  hops"]
    for number, chain in enumerate(plan.chains):
        mark = "->" if number == plan.picked else "  "
        values = [f"{chain.latency_ms:.2f}", f"{chain.throughput_tokens_per_s:.2f}"]
        if plan.request.pick == "request":
            values.append(f"{request_ms(chain, plan.request) / 1000:.2f}")
        cells = [value.rjust(len(name)) for value, name in zip(values, names, strict=True)]
        lines.append(f"{mark} {number:2}  " + "  ".join(cells) + "  " + _hops(chain))
    return lines


def _hops(chain: Chain) -> str:
    return " => ".join(f"{short_name(hop.peer_id)} {hop.start}:{hop.end}" for hop in chain)


def short_name(server_id: str) -> str:
    """A peer id by its end, as in logs; other names as they are."""
    return f"…{server_id[-6:]}" if len(server_id) > 24 else server_id


def _picked(plan: Plan) -> list[str]:
    chain = plan.chain
    alone = tokens_per_s(chain)
    why = f" by {plan.request.pick or 'the optimiser'}" if len(plan.chains) > 1 else ""
    lines = [f"chain{f' {plan.picked}, picked' if why else ''}{why}:"]
    width = max(len(f"{hop.start}:{hop.end}") for hop in chain)
    for hop in chain:
        lines.append(f"  blocks {f'{hop.start}:{hop.end}':<{width}}  {hop.peer_id}")
    lines.append(f"latency_ms: {chain.latency_ms:.2f} a token")
    if alone is not None:
        lines[-1] += f", so {alone:.2f} tokens/s for one user alone"
    lines.append(
        f"throughput_tokens_per_s: {chain.throughput_tokens_per_s:.2f} when the chain is kept full"
    )
    if plan.request.pick == "request":
        lines.append(
            f"request of {plan.request.prompt_tokens} prompt and {plan.request.output_tokens} "
            f"output tokens: {request_ms(chain, plan.request) / 1000:.2f} s"
        )
    if plan.proven is not None and plan.proven.gaps[plan.picked] > 0:
        lines.append(
            f"not proven: a chain of this throughput might be up to "
            f"{plan.proven.gaps[plan.picked]:.1%} faster"
        )
    return lines
