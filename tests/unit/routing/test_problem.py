"""Request filters: who may run what, and which error says why nobody can."""

from __future__ import annotations

import pytest

from planetserve.errors import ConfigError, MissingBlocksError, NoChainAvailable
from planetserve.routing.optimizers import OPTIMIZERS
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.types import BlockSpan, Chain


def point(name: str, start: int, end: int, **changes: float) -> ServerPoint:
    values = {"decode_ms_per_block": 1.0, "tokens_per_s_per_block": 1e3, "network_bytes_per_s": 1e7}
    values |= {"free_cache_tokens": 100, **changes}
    return ServerPoint(name, start, end, **values)  # type: ignore[arg-type]


SNAPSHOT = SwarmSnapshot(
    num_blocks=6,
    activation_bytes_per_token=1000,
    hop_overhead_ms=1.0,
    default_rtt_ms=10.0,
    servers=(
        point("fast", 0, 6, reputation=0.3),
        point("good", 0, 6, decode_ms_per_block=5.0, free_cache_tokens=50),
        point("late", 3, 6, decode_ms_per_block=9.0, free_cache_tokens=900),
    ),
)


def plan(request: ChainRequest) -> Chain:
    return OPTIMIZERS.create("shortest_path").plan(SNAPSHOT, request)


def servers(chain: Chain) -> list[str]:
    return [hop.peer_id for hop in chain]


def test_no_filter_takes_the_fastest() -> None:
    assert servers(plan(ChainRequest(tokens=100))) == ["fast"]


@pytest.mark.parametrize(
    "request_",
    [
        ChainRequest(min_reputation=0.5),
        ChainRequest(blocked=frozenset({"fast"})),
        ChainRequest(allowed=frozenset({"good", "nobody"})),
        ChainRequest(trusted={BlockSpan(0, 6): frozenset({"good"})}),
    ],
)
def test_each_filter_turns_the_fastest_away(request_: ChainRequest) -> None:
    assert servers(plan(request_)) == ["good"]


def test_trusted_span_in_the_middle_splits_a_server() -> None:
    chain = plan(ChainRequest(trusted={BlockSpan(2, 4): frozenset({"good", "late"})}))
    assert [(hop.peer_id, hop.start, hop.end) for hop in chain] == [
        ("fast", 0, 2),
        ("good", 2, 4),
        ("fast", 4, 6),
    ]


def test_overlapping_trusted_spans_must_both_agree() -> None:
    trusted = {
        BlockSpan(0, 4): frozenset({"fast", "good"}),
        BlockSpan(3, 6): frozenset({"late", "good"}),
    }
    chain = plan(ChainRequest(trusted=trusted))
    assert all(
        hop.peer_id in trusted[span]
        for hop in chain
        for span in trusted
        if hop.start < span.end and span.start < hop.end
    )


def test_missing_blocks_name_the_spans_after_filters() -> None:
    with pytest.raises(MissingBlocksError, match="this request may use") as caught:
        plan(ChainRequest(allowed=frozenset({"late"})))
    assert caught.value.missing == ((0, 3),)


def test_missing_blocks_without_filters() -> None:
    holey = SwarmSnapshot(9, 1000, 1.0, 10.0, SNAPSHOT.servers)
    with pytest.raises(MissingBlocksError, match="no server holds blocks 6:9") as caught:
        OPTIMIZERS.create("shortest_path").plan(holey, ChainRequest())
    assert caught.value.missing == ((6, 9),)


def test_full_caches_are_not_missing_blocks() -> None:
    with pytest.raises(NoChainAvailable, match="0:3 has free cache for 101 tokens") as caught:
        plan(ChainRequest(tokens=101))
    assert not isinstance(caught.value, MissingBlocksError)


def test_full_servers_are_avoided_where_others_have_room() -> None:
    assert servers(plan(ChainRequest(tokens=80, min_reputation=0.1))) == ["fast"]


@pytest.mark.parametrize(
    "bad",
    [{"tokens": -1}, {"pick": "best"}, {"pick": "request"}, {"output_tokens": -5}],
)
def test_request_refuses_nonsense(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ChainRequest(**bad)  # type: ignore[arg-type]
