"""Which blocks a server with `--num_blocks` takes, and whether it should take others after all.

Servers that start together see the same holes and would all fill the same one. So each announces
its choice and looks again: of those that are still joining the one with the smallest peer id keeps
its blocks, and the others choose again, around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from planetserve.routing.placement import PLACEMENTS
from planetserve.routing.server_points import usable_point
from planetserve.routing.snapshot import ServerPoint
from planetserve.types import BlockSpan, PeerId, ServerInfo, ServerState


def choose_span(others: Sequence[ServerInfo], num_blocks_model: int, num_blocks: int) -> BlockSpan:
    """The `num_blocks` blocks that help the swarm most, as the placement "balance" says."""
    points = {info.peer_id: usable_point(info, num_blocks_model) for info in others}
    online = [info.peer_id for info in others if info.state is ServerState.ONLINE]
    speeds = sorted(
        point.tokens_per_s_per_block for peer_id in online if (point := points[peer_id])
    )
    # Nobody knows yet what this one will do, nor do those that are still loading.
    usual = speeds[len(speeds) // 2] if speeds else 1.0
    servers = [
        point if peer_id in online else _at_speed(point, usual)
        for peer_id, point in points.items()
        if point is not None
    ]
    return PLACEMENTS.create("balance").choose_span(servers, num_blocks_model, num_blocks, usual)


def ahead_of(peer_id: PeerId, others: Iterable[ServerInfo]) -> list[ServerInfo]:
    """Those that keep their blocks whatever `peer_id`, which is joining, takes."""
    return [info for info in others if info.state is ServerState.ONLINE or info.peer_id < peer_id]


def is_wanted_elsewhere(
    peer_id: PeerId, span: BlockSpan, others: Sequence[ServerInfo], num_blocks_model: int
) -> bool:
    """Whether others hold all of `span` for good, and nobody holds some other block."""
    held = _blocks(ahead_of(peer_id, others))
    return held >= set(range(span.start, span.end)) and not _blocks(others) >= set(
        range(num_blocks_model)
    )


def _at_speed(point: ServerPoint, tokens_per_s_per_block: float) -> ServerPoint:
    return dataclasses.replace(point, tokens_per_s_per_block=tokens_per_s_per_block)


def _blocks(servers: Iterable[ServerInfo]) -> set[int]:
    return {block for info in servers for block in range(info.span.start, info.span.end)}
