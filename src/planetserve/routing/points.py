"""From what servers announce to what planners read."""

from __future__ import annotations

from planetserve.routing.snapshot import ServerPoint
from planetserve.types import ServerInfo


def server_point(info: ServerInfo) -> ServerPoint:
    """The planner's view of one directory record."""
    return ServerPoint(
        id=info.peer_id,
        start=info.span.start,
        end=info.span.end,
        decode_ms_per_block=info.decode_ms_per_block,
        tokens_per_s_per_block=info.tokens_per_s_per_block,
        network_bytes_per_s=info.network_bytes_per_s,
        free_cache_tokens=info.free_cache_tokens,
    )
