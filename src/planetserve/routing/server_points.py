"""Directory records converted to what planners read."""

from __future__ import annotations

import logging

from planetserve.errors import ConfigError
from planetserve.routing.snapshot import ServerPoint
from planetserve.types import ServerInfo

logger = logging.getLogger(__name__)


def usable_point(info: ServerInfo, num_blocks: int) -> ServerPoint | None:
    """`server_point` of an untrusted record; None if it does not fit a model of `num_blocks` blocks
    or no plan could use it."""
    if info.num_blocks != num_blocks:
        return None
    try:
        return server_point(info)
    except ConfigError as error:
        logger.debug("a record is of no use: %s", error)
        return None


def server_point(info: ServerInfo) -> ServerPoint:
    """The planner's view of one directory record.

    Raises:
        ConfigError: as `ServerPoint`.
    """
    decode_ms, wait_ms = split_load(
        info.decode_ms_per_block, info.alone_ms_per_block, len(info.span)
    )
    return ServerPoint(
        id=info.peer_id,
        start=info.span.start,
        end=info.span.end,
        decode_ms_per_block=decode_ms,
        tokens_per_s_per_block=info.tokens_per_s_per_block,
        network_bytes_per_s=info.network_bytes_per_s,
        free_cache_tokens=info.free_cache_tokens,
        wait_ms=wait_ms,
    )


def split_load(decode_ms: float, alone_ms: float, num_blocks: int) -> tuple[float, float]:
    """Time per block and wait per visit, from time per block with and without load.

    Under load, a step waits for the running batch and for the end of its own batch, in which others
    use the rest of the span. Both waits are the same however few blocks the step itself uses, so
    load is charged per visit. For the whole span the sum is the same.

    Args:
        decode_ms: per block under load.
        alone_ms: per block without load, 0 if not known.
        num_blocks: of the server.
    """
    if not 0 < alone_ms < decode_ms:
        return decode_ms, 0.0
    return alone_ms, (decode_ms - alone_ms) * num_blocks
