"""What a client knows of its peers: evidence goes in by one door, plans get frozen copies."""

from __future__ import annotations

import dataclasses
import random

import pytest
from written_swarm import server

from planetserve.client.planning.peer_book import PeerBook
from planetserve.testing.clock import ManualClock
from planetserve.types import CLIENT, Chain, Hop

BOTH = Chain((Hop("a", 0, 4), Hop("b", 4, 8)))
SERVERS = [server("a", 0, 4), server("b", 4, 8), server("c", 0, 8)]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def book(clock: ManualClock) -> PeerBook:
    return PeerBook(avoid_s=10.0, clock=clock)


def test_every_kind_of_evidence_reaches_the_plans(book: PeerBook) -> None:
    book.record_rtt("a", 7.0)
    book.record_loads(BOTH, {"b": 3.0}, elapsed_ms=1000.0)
    book.suspect_edge(("b", "a"))
    book.ban(["c"], 60.0)
    inputs = book.plan_inputs(SERVERS)
    assert [info.peer_id for info in inputs.servers] == ["a", "b"]
    assert [info.decode_ms_per_block for info in inputs.servers] == [1.0, 3.0]
    assert inputs.rtt_ms == {"a": 7.0}
    assert set(inputs.avoided_edges) == {("a", "b")}
    assert inputs.is_suspect(BOTH)
    assert not inputs.is_suspect(Chain((Hop("c", 0, 8),)))


def test_later_evidence_does_not_change_the_inputs_of_a_plan(
    book: PeerBook, clock: ManualClock
) -> None:
    book.record_rtt("a", 7.0)
    before = book.plan_inputs(SERVERS)
    copy = dataclasses.replace(before, rtt_ms=dict(before.rtt_ms))
    book.record_rtt("a", 70.0)
    book.record_rtt("b", 1.0)
    book.suspect_chain(["a", "b", "c"])
    book.ban(["a"], 60.0)
    book.record_loads(BOTH, {"b": 3.0}, elapsed_ms=1000.0)
    assert before == copy
    assert book.plan_inputs(SERVERS) != before
    clock.now_s += 3600.0
    assert book.plan_inputs(SERVERS).servers == before.servers


def test_penalties_count_only_where_they_are_asked_for(book: PeerBook) -> None:
    honest = Chain((Hop("c", 0, 8),))
    for _ in range(8):
        book.record_latency(honest, predicted_ms=100.0, measured_ms=110.0)
        book.record_latency(BOTH, predicted_ms=20.0, measured_ms=200.0)
    with_penalties = {info.peer_id: info for info in book.plan_inputs(SERVERS).servers}
    assert with_penalties["a"].decode_ms_per_block > 10.0
    assert with_penalties["c"] == SERVERS[2]
    without = book.plan_inputs(SERVERS, with_penalties=False)
    assert without.servers == tuple(SERVERS)


def test_bans_can_be_lifted(book: PeerBook) -> None:
    book.ban(["a", "b"], 60.0)
    book.lift_bans(["a"])
    assert book.banned() == ["b"]


def test_the_server_at_an_edge_of_the_client_is_at_fault_for_certain(book: PeerBook) -> None:
    assert book.suspect_edge((CLIENT, "a")) == ["a"]
    assert book.suspect_edge(("a", "b")) == []
    assert book.suspect_chain(["a"]) == ["a"]
    assert set(book.avoided_edges()) == {("a", "b")}


def test_peers_that_were_just_measured_are_not_pinged(book: PeerBook, clock: ManualClock) -> None:
    def chosen() -> list[str]:
        return book.whom_to_ping("ab", unmeasured_s=30.0, most=2, keep=8, rng=random.Random(0))

    book.record_rtt("a", 7.0)
    assert chosen() == ["b"]
    clock.now_s += 31.0
    assert sorted(chosen()) == ["a", "b"]
