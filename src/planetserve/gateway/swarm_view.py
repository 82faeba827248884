"""What a gateway knows of the swarm, as `/swarm` shows it.

Names and versions are what strangers announce: at most 64 printable characters each
(`swarm/records.py`), which a page must show as text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.types import ServerInfo

_MAX_SERVERS = 512

State = Literal["ready", "left_out", "excluded", "incompatible", "other_files"]


class ServerView(BaseModel):
    """One server."""

    peer_id: str
    name: str
    """What its owner calls it; may be empty."""
    version: str
    start: int
    """It runs the blocks from here,"""
    end: int
    """up to here, without this one."""
    state: State
    """`left_out`: it failed lately; `excluded`: by this gateway's settings; `incompatible`: of
    another protocol; `other_files`: of another revision of the model."""
    dtype: str
    quant_type: str
    tokens_per_s: float
    """One text, through its blocks, by its own word."""
    batch_tokens_per_s: float
    """The same in large batches."""
    free_cache_tokens: int
    max_session_tokens: int
    rtt_ms: float | None
    """As measured here; null for servers that were not pinged lately."""


class HopView(BaseModel):
    """A server and the blocks that it runs in a chain."""

    peer_id: str
    start: int
    end: int


class ChangeView(BaseModel):
    """Why a text changed servers, or a chain could not be opened."""

    at_s: float
    """Unix time."""
    reason: str
    """Code of the error, or `leaving`, or `better_chain`."""
    peer_ids: list[str]
    """The server at fault, or the one that the text left; empty if unknown."""
    text: str


class SwarmView(BaseModel):
    """The swarm of one model, as far as this gateway sees it."""

    model: str
    num_blocks: int
    servers: list[ServerView]
    """By their first blocks; at most 512."""
    num_servers: int
    uncovered: list[tuple[int, int]]
    """Blocks that no ready server runs: from, and up to without the second number."""
    latest_chain: list[HopView]
    """The chain that a text was put on last."""
    changes: list[ChangeView]
    """The latest 64, newest first."""


async def view_swarm(name: str, manager: ChainManager) -> SwarmView:
    """The swarm of `manager`'s model. Reads the directory if that was not done for seconds."""
    await manager.view.refresh_if_stale()
    view = manager.view
    banned = set(manager.peers.banned())
    rtt_ms = manager.peers.rtt_ms()
    found: list[tuple[ServerInfo, State]] = [
        (info, "left_out" if info.peer_id in banned else "ready") for info in view.servers.values()
    ]
    found += [(info, "excluded") for info in view.excluded]
    found += [(info, "incompatible") for info in view.incompatible]
    found += [(info, "other_files") for info in view.strangers.values()]
    num_blocks = manager.facts.num_blocks
    ready = [info for info, state in found if state == "ready"]
    # Those that can be used must not be pushed off the list by strangers.
    shown = found[:_MAX_SERVERS]
    shown.sort(key=lambda one: (one[0].span, one[0].peer_id))
    chain = manager.last_chain
    return SwarmView(
        model=name,
        num_blocks=num_blocks,
        servers=[_server(info, state, rtt_ms.get(info.peer_id)) for info, state in shown],
        num_servers=len(found),
        uncovered=uncovered(ready, num_blocks),
        latest_chain=[
            HopView(peer_id=hop.peer_id, start=hop.start, end=hop.end) for hop in chain or ()
        ],
        changes=[
            ChangeView(
                at_s=change.at_s,
                reason=change.reason,
                peer_ids=list(change.peer_ids),
                text=change.text,
            )
            for change in reversed(manager.changes.recent)
        ],
    )


def num_ready(manager: ChainManager) -> int:
    """Servers that can be used now."""
    return len(_usable(manager))


def num_uncovered(manager: ChainManager) -> int:
    """Blocks that none of them runs."""
    missing = uncovered(_usable(manager), manager.facts.num_blocks)
    return sum(end - start for start, end in missing)


def _usable(manager: ChainManager) -> list[ServerInfo]:
    banned = set(manager.peers.banned())
    return [info for info in manager.view.servers.values() if info.peer_id not in banned]


def uncovered(servers: Iterable[ServerInfo], num_blocks: int) -> list[tuple[int, int]]:
    """Ranges of blocks that none of these servers runs."""
    missing, reached = [], 0
    for start, end in sorted((info.span.start, info.span.end) for info in servers):
        if start > reached:
            missing.append((reached, min(start, num_blocks)))
        reached = max(reached, end)
    if reached < num_blocks:
        missing.append((reached, num_blocks))
    return missing


def _server(info: ServerInfo, state: State, rtt_ms: float | None) -> ServerView:
    num_blocks = len(info.span)
    step_ms = info.decode_ms_per_block * num_blocks + info.hop_overhead_ms
    return ServerView(
        peer_id=info.peer_id,
        name=info.public_name,
        version=info.version,
        start=info.span.start,
        end=info.span.end,
        state=state,
        dtype=info.dtype,
        quant_type=info.quant_type,
        tokens_per_s=round(1000 / step_ms, 2),
        batch_tokens_per_s=round(info.tokens_per_s_per_block / num_blocks, 2),
        free_cache_tokens=info.free_cache_tokens,
        max_session_tokens=info.max_session_tokens,
        rtt_ms=None if rtt_ms is None else round(rtt_ms, 2),
    )
