"""Whom a server pings: those that may come next in a chain."""

from __future__ import annotations

import pytest

from planetserve.server.neighbours import likely_next
from planetserve.types import BlockSpan, ServerInfo, ServerState


def server(name: str, start: int = 4, end: int = 8) -> ServerInfo:
    return ServerInfo(
        peer_id=name, model="tiny", fingerprint="f", span=BlockSpan(start, end), num_blocks=8,
        state=ServerState.ONLINE, dtype="float32", addresses=(), decode_ms_per_block=1.0,
        tokens_per_s_per_block=1.0, network_bytes_per_s=1.0, free_cache_tokens=1,
        max_session_tokens=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("start", "end", "likely"),
    [
        (4, 8, True),  # goes on where 2:4 ends
        (3, 5, True),  # begins inside it
        (3, 4, True),
        (0, 5, True),  # holds block 4, whatever else
        (2, 4, False),  # the same span
        (0, 4, False),
        (5, 8, False),  # too far ahead
        (0, 2, False),
    ],
)
def test_who_may_come_next(start: int, end: int, likely: bool) -> None:
    found = likely_next(BlockSpan(2, 4), [server("x", start, end)])
    assert bool(found) is likely
