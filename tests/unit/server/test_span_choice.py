"""Which blocks a joining server takes while others do the same."""

from __future__ import annotations

import random

import pytest

from planetserve.server.span_choice import ahead_of, choose_span, is_wanted_elsewhere
from planetserve.types import BlockSpan, ServerInfo, ServerState

ONLINE, JOINING = ServerState.ONLINE, ServerState.JOINING


def record(
    peer_id: str, start: int, end: int, state: ServerState = ONLINE, speed: float = 500.0
) -> ServerInfo:
    return ServerInfo(
        peer_id=peer_id, model="tiny", fingerprint="f" * 64, span=BlockSpan(start, end),
        num_blocks=12, state=state, dtype="float32", quant_type="none", addresses=(),
        decode_ms_per_block=1000 / speed, alone_ms_per_block=0.0, tokens_per_s_per_block=speed,
        network_bytes_per_s=1e6, hop_overhead_ms=0.0, next_rtt_ms={}, free_cache_tokens=1000,
        max_session_tokens=100, version="0", public_name=None, announced_at_s=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("num_servers", [2, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_servers_that_start_together_end_up_side_by_side(num_servers: int, seed: int) -> None:
    """Each sees what the others announced before, in any order."""
    rng = random.Random(seed)
    size = 12 // num_servers
    spans = {f"peer{i}": choose_span([], 12, size) for i in range(num_servers)}
    assert len(set(spans.values())) == 1
    settled: set[str] = set()
    while len(settled) < num_servers:
        announced = [record(peer, s.start, s.end, JOINING, 1.0) for peer, s in spans.items()]
        looking = rng.sample(sorted(spans), num_servers)
        for peer in looking:
            others = [info for info in announced if info.peer_id != peer]
            if peer in settled:
                continue
            if choose_span(ahead_of(peer, others), 12, size) == spans[peer]:
                settled.add(peer)
            else:
                spans[peer] = choose_span(others, 12, size)
    for peer, span in sorted(spans.items()):
        # What is looked at once more when the blocks are loaded.
        others = [record(p, s.start, s.end, JOINING, 1.0) for p, s in spans.items() if p != peer]
        if is_wanted_elsewhere(peer, span, others, 12):
            spans[peer] = choose_span(others, 12, size)
    assert {block for span in spans.values() for block in range(span.start, span.end)} == set(
        range(12)
    )


def test_a_server_that_is_loading_counts_as_much_as_one_that_serves() -> None:
    others = [record("a", 0, 6), record("b", 6, 12, JOINING, 1.0), record("c", 6, 12)]
    assert choose_span(others, 12, 6) == BlockSpan(0, 6)


def test_blocks_that_only_this_server_holds_are_never_left() -> None:
    alone = [record("a", 0, 4)]
    assert not is_wanted_elsewhere("m", BlockSpan(3, 7), alone, 12)
    assert is_wanted_elsewhere("m", BlockSpan(0, 4), alone, 12)
    joining = [record("a", 0, 4, JOINING), record("z", 4, 8, JOINING)]
    assert is_wanted_elsewhere("m", BlockSpan(0, 4), joining, 12)
    assert not is_wanted_elsewhere("m", BlockSpan(4, 8), joining, 12)


def test_without_a_hole_nobody_moves() -> None:
    others = [record("a", 0, 8), record("b", 4, 12)]
    assert not is_wanted_elsewhere("m", BlockSpan(4, 8), others, 12)
