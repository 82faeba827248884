"""A real client's plan notices everything that its servers announce and that it measures."""

from __future__ import annotations

from typing import Any

import pytest
from written_swarm import FACTS, inputs, server

from planetserve.client.planning.chain_planner import ChainPlanner
from planetserve.client.ring.ring_spec import Gap
from planetserve.config import ClientConfig
from planetserve.types import BlockSpan, ServerInfo

PINGS = {"a": 20.0, "b": 21.0, "first": 20.0, "last": 20.0}


def servers(**of_a: Any) -> list[ServerInfo]:
    """`a` and `b` hold everything, and `b` is a little farther away; `first` and `last` have half
    each and are fast."""
    of_a = {"decode_ms_per_block": 5.0, "alone_ms_per_block": 5.0, **of_a}
    return [
        server("a", 0, 8, **of_a),
        server("b", 0, 8, decode_ms_per_block=5.0),
        server("first", 0, 4, decode_ms_per_block=4.0),
        server("last", 4, 8, decode_ms_per_block=4.0, next_rtt_ms={"first": 30.0}),
    ]


def chosen(
    infos: list[ServerInfo],
    pings_ms: dict[str, float] = PINGS,
    num_rows: int = 1,
    gap: Gap | None = None,
) -> list[str]:
    planner = ChainPlanner(ClientConfig(chain_cost_jitter=0.0), FACTS)
    chain = planner.plan(inputs(infos, **pings_ms), num_rows, 100, seed=0, gap=gap)
    return [hop.peer_id for hop in chain]


def with_overhead(ms: float) -> list[ServerInfo]:
    return [server(info.peer_id, info.span.start, info.span.end, hop_overhead_ms=ms,
                   decode_ms_per_block=info.decode_ms_per_block, next_rtt_ms=info.next_rtt_ms)
            for info in servers()]  # fmt: skip


def test_without_any_change_the_nearer_of_two_equals_is_taken() -> None:
    assert chosen(servers()) == ["a"]


@pytest.mark.parametrize(
    "of_a",
    [
        {"decode_ms_per_block": 6.0, "alone_ms_per_block": 6.0},
        {"decode_ms_per_block": 6.0},
        {"network_bytes_per_s": 1e4},
        {"free_cache_tokens": 99},
        {"max_session_tokens": 99},
    ],
    ids=["decode time", "load", "network rate", "free cache", "longest session"],
)
def test_what_a_server_announces_is_noticed(of_a: dict[str, Any]) -> None:
    assert chosen(servers(**of_a)) == ["b"]


def test_pings_are_noticed() -> None:
    assert chosen(servers(), PINGS | {"a": 22.5}) == ["b"]
    without = {name: ms for name, ms in PINGS.items() if name != "a"}
    assert chosen(servers(), without) == ["b"]  # the default is longer


def test_what_servers_measured_between_them_is_noticed() -> None:
    infos = servers()
    infos[3] = server("last", 4, 8, decode_ms_per_block=4.0, next_rtt_ms={"first": 1.0})
    assert chosen(infos) == ["first", "last"]


def test_the_overhead_of_a_visit_is_noticed() -> None:
    fast = [server("first", 0, 4, decode_ms_per_block=1.0, next_rtt_ms={"last": 1.0}),
            server("last", 4, 8, decode_ms_per_block=1.0)]  # fmt: skip
    assert chosen([*with_overhead(0.0)[:2], *fast]) == ["first", "last"]
    slow = [server(info.peer_id, info.span.start, info.span.end, hop_overhead_ms=50.0,
                   decode_ms_per_block=1.0, next_rtt_ms=info.next_rtt_ms)
            for info in fast]  # fmt: skip
    assert chosen([*with_overhead(50.0)[:2], *slow]) == ["a"]


def test_the_bytes_of_all_rows_are_noticed() -> None:
    """A wider batch sends more, and `a` sends slowly."""
    infos = servers(network_bytes_per_s=1e5)
    assert chosen(infos, PINGS | {"b": 22.0}, num_rows=1) == ["a"]
    assert chosen(infos, PINGS | {"b": 22.0}, num_rows=8) == ["b"]


def test_both_sides_of_a_gap_are_noticed() -> None:
    """The client is nearer to `a`; the hops on both sides of the gap are nearer to `b`."""
    infos = [*servers(), server("before", 0, 2, next_rtt_ms={"a": 60.0, "b": 10.0})]
    infos.append(server("after", 6, 8, next_rtt_ms={"a": 60.0, "b": 10.0}))
    gap = Gap(BlockSpan(2, 6), before="before", after="after")
    whole = [info for info in infos if info.peer_id not in ("first", "last")]
    assert chosen(whole, gap=gap) == ["b"]
