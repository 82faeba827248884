"""Chains over the blocks left to the swarm, from records that may say anything."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from written_swarm import FACTS, inputs, server

from planetserve.client.planning.chain_planner import ChainPlanner
from planetserve.config import ClientConfig
from planetserve.errors import MissingBlocksError, NoChainAvailable
from planetserve.types import CLIENT, BlockSpan, Hop, ServerInfo


def planner(**options: Any) -> ChainPlanner:
    return ChainPlanner(ClientConfig(**options), FACTS)


def test_hops_carry_true_block_numbers() -> None:
    chain = planner(local_blocks="0:2,-1:").plan(
        inputs([server("a", 0, 4), server("b", 3, 8)]), 1, 10, 0
    )
    assert chain.hops[0].start == 2
    assert chain.hops[-1] == Hop("b", chain.hops[-1].start, 7)
    assert chain.hops[0].end == chain.hops[1].start
    assert chain.latency_ms > 0


def test_servers_of_local_blocks_are_not_in_the_snapshot() -> None:
    servers = [server("a", 0, 2), server("b", 1, 8), server("c", 7, 8)]
    snapshot = planner(local_blocks="0:2,7:8").snapshot(inputs(servers), 1)
    assert snapshot.num_blocks == 5
    assert [(point.id, point.start, point.end) for point in snapshot.servers] == [("b", 0, 5)]


def test_missing_blocks_and_full_caches_are_reported_by_true_numbers() -> None:
    plan = planner(local_blocks="0:2").plan
    with pytest.raises(MissingBlocksError, match="blocks 2:3, 6:8") as caught:
        plan(inputs([server("a", 3, 6)]), 1, 10, 0)
    assert caught.value.missing == ((2, 3), (6, 8))
    with pytest.raises(NoChainAvailable, match="of blocks 2:8 have no server with free cache"):
        plan(inputs([server("a", 0, 8, free_cache_tokens=9)]), 1, 10, 0)


def test_trusted_blocks_are_cut_to_the_remote_ones() -> None:
    trusted = {"trusted_servers": ("a",), "trusted_blocks": "0:2,-2:,7:8"}
    made = planner(local_blocks="0:1,7:8", chain_load_prior=0.0, **trusted)
    assert made.trusted == {BlockSpan(1, 2): {"a"}, BlockSpan(6, 7): {"a"}}
    chain = made.plan(
        inputs([server("a", 0, 8, decode_ms_per_block=50.0), server("b", 0, 8)]), 1, 1, 0
    )
    assert [hop.span for hop in chain if hop.peer_id == "a"] == [BlockSpan(1, 2), BlockSpan(6, 7)]


def test_trusted_servers_leave_a_gap() -> None:
    made = planner(trusted_servers=("a",), trusted_blocks="0:2")
    servers = [server("a", 1, 8), server("b", 0, 8), server("c", 2, 8)]
    with pytest.raises(MissingBlocksError) as caught:
        made.plan(inputs(servers), 1, 1, 0)
    assert caught.value.missing == ((0, 1),)
    assert [info.peer_id for info in made.barred(caught.value.missing, servers)] == ["b"]


@pytest.mark.parametrize(
    "lie",
    [
        server("liar", 8, 9, num_blocks=9),
        server("liar", 0, 9, num_blocks=9),
        server("liar", 0, 4, num_blocks=4),
        server("liar", 0, 8, free_cache_tokens=2**53),
        server("liar", 0, 8, tokens_per_s_per_block=1e-300),
        server("liar", 0, 8, next_rtt_ms={"liar": 5.0}, decode_ms_per_block=9.0),
        server("liar", 0, 8, next_rtt_ms={"a": 5.0, "gone": 1.0}, decode_ms_per_block=9.0),
    ],
)
def test_a_record_that_cannot_be_true_costs_only_its_author(lie: ServerInfo) -> None:
    honest = server("a", 0, 8, next_rtt_ms={"liar": 3.0})
    chain = planner().plan(inputs([honest, lie]), 1, 1, 0)
    assert chain.hops == (Hop("a", 0, 8),)


def test_of_two_claims_on_a_link_the_worse_counts() -> None:
    servers = [
        server("a", 0, 8, next_rtt_ms={"b": 1.0}),
        server("b", 0, 8, next_rtt_ms={"a": 7.0}),
        server("c", 0, 8, next_rtt_ms={"a": 2.0}),
    ]
    snapshot = planner().snapshot(inputs(servers), 1)
    assert snapshot.rtt("a", "b") == 7.0
    assert snapshot.rtt("a", "c") == 2.0
    assert snapshot.rtt(CLIENT, "a") == snapshot.default_rtt_ms


def test_the_snapshot_has_one_overhead_for_all_that_a_liar_cannot_move() -> None:
    servers = [server(name, 0, 8, hop_overhead_ms=2.0) for name in ("a", "b", "c")]
    honest = planner().snapshot(inputs(servers), 1)
    lied = planner().snapshot(inputs([*servers, server("liar", 0, 8, hop_overhead_ms=1e7)]), 1)
    assert honest.hop_overhead_ms == lied.hop_overhead_ms == 2.0


def test_load_is_a_wait_per_visit_whatever_the_blocks() -> None:
    """`busy` is fast alone: through all of its span it costs as much as ever, in parts more."""
    busy = server("busy", 0, 8, decode_ms_per_block=3.0, alone_ms_per_block=1.0)
    (point,) = planner().snapshot(inputs([busy]), 1).servers
    assert (point.decode_ms_per_block, point.wait_ms) == (1.0, 16.0)
    assert planner().plan(inputs([busy]), 1, 1, 0).latency_ms >= 24.0
    idle = server("idle", 0, 8, decode_ms_per_block=1.0, alone_ms_per_block=2.0)
    (point,) = planner().snapshot(inputs([idle]), 1).servers
    assert (point.decode_ms_per_block, point.wait_ms) == (1.0, 0.0)


NEARLY_EQUAL = [
    server(f"{stage}{number}", 4 * stage, 4 * stage + 4, decode_ms_per_block=5.0 + 0.02 * number)
    for stage in range(2)
    for number in range(8)
]


@pytest.mark.parametrize(("jitter", "most", "least"), [(0.1, 0.4, 0.0), (0.0, 1.0, 1.0)])
def test_clients_that_plan_at_once_take_different_chains(
    jitter: float, most: float, least: float
) -> None:
    chains = [
        planner(chain_cost_jitter=jitter).plan(inputs(NEARLY_EQUAL), 1, 10, seed)
        for seed in range(200)
    ]
    load = Counter(hop.peer_id for chain in chains for hop in chain)
    busiest = max(load.values()) / len(chains)
    assert least <= busiest <= most
    best = min(chain.latency_ms for chain in chains)
    assert max(chain.latency_ms for chain in chains) <= (1 + jitter) * best


def test_sessions_of_one_client_spread_as_well() -> None:
    made = planner()
    first_hops = {
        made.plan(inputs(NEARLY_EQUAL), 1, 10, seed).hops[0].peer_id for seed in range(60)
    }
    assert len(first_hops) > 2


def test_a_load_that_may_pass_counts_half() -> None:
    servers = [
        server("busy", 0, 8, decode_ms_per_block=15.0, alone_ms_per_block=10.0),
        server("idle", 0, 8, decode_ms_per_block=12.0, alone_ms_per_block=12.0),
        server("crowded", 0, 8, decode_ms_per_block=80.0, alone_ms_per_block=40.0),
    ]

    def chosen(weight: float) -> str:
        return (
            planner(chain_cost_jitter=0.0, chain_load_prior=weight)
            .plan(inputs(servers), 1, 1, 0)
            .hops[0]
            .peer_id
        )

    assert (chosen(0.0), chosen(0.5)) == ("idle", "busy")


def test_cost_jitter_is_offered_only_to_optimizers_that_know_it() -> None:
    chain = planner(chain_optimizer="greedy", chain_cost_jitter=0.5).plan(
        inputs(NEARLY_EQUAL), 1, 10, 0
    )
    assert len(chain) == 2


def test_servers_of_another_dtype_are_planned_on_only_where_needed() -> None:
    ours = [server("a", 0, 8, free_cache_tokens=100)]
    other = [server("b", 0, 8, dtype="bfloat16"), server("c", 0, 8, quant_type="int8")]
    assert list(planner().candidates(inputs([*other, *ours]), 1, 50).servers) == ours
    assert [hop.peer_id for hop in planner().plan(inputs([*other, *ours]), 1, 50, 0)] == ["a"]
    everybody = [*other, *ours]
    assert list(planner().candidates(inputs(everybody), 1, 500).servers) == everybody
    assert list(planner().candidates(inputs(other), 1, 50).servers) == other
    trusting = planner(trusted_servers=("b",), trusted_blocks="0:1")
    assert list(trusting.candidates(inputs(everybody), 1, 50).servers) == everybody


def test_the_longest_session_is_what_every_block_has_a_server_for() -> None:
    whole, first = server("a", 0, 8, max_session_tokens=500), server("b", 0, 4)
    assert planner().longest([whole, first], 1, 100) == 500
    assert planner().longest([first, server("c", 4, 8, max_session_tokens=900)], 1, 100) == 900
    assert planner(local_blocks="4:").longest([first], 1, 100) == 2048
    assert planner().longest([first], 1, 100) is None
    assert planner(trusted_servers=("b",), trusted_blocks="0:1").longest([whole], 1, 9) is None


def test_the_longest_session_has_room_or_waits_for_a_little() -> None:
    busy = server("a", free_cache_tokens=90)
    assert planner().longest([busy], 1, 50) == 90
    assert planner().longest([busy], 3, 20) == 30
    assert planner().longest([busy], 1, 300) == 300
    assert planner().longest([busy], 1, 9000) == 2048
