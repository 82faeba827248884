"""One peer's word against another's: a pair is avoided, and nobody is left out for it."""

from __future__ import annotations

import pytest

from planetserve.client.planning import edge_suspicion as quarrels_module
from planetserve.client.planning.edge_suspicion import EdgeSuspicions
from planetserve.testing.clock import ManualClock
from planetserve.types import CLIENT

AVOID_S = 15.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def edge_suspicions(clock: ManualClock) -> EdgeSuspicions:
    return EdgeSuspicions(AVOID_S, clock)


def test_one_against_one_proves_nothing_however_often(
    edge_suspicions: EdgeSuspicions, clock: ManualClock
) -> None:
    for edge in (("m", "n"), ("n", "m")) * 10:
        assert edge_suspicions.add(edge) == []
        assert set(edge_suspicions.avoided()) == {("m", "n")}
    clock.now_s += AVOID_S
    assert not edge_suspicions.avoided()


def test_a_pair_that_quarrels_again_is_avoided_for_longer(
    edge_suspicions: EdgeSuspicions, clock: ManualClock
) -> None:
    for length_s in (AVOID_S, 2 * AVOID_S, 4 * AVOID_S, 8 * AVOID_S, 8 * AVOID_S):
        edge_suspicions.add(("m", "n"))
        clock.now_s += length_s - 0.1
        assert edge_suspicions.avoided()
        clock.now_s += 0.1
        assert not edge_suspicions.avoided()


@pytest.mark.parametrize("num_liars", [1, 2, 3, 20])
def test_no_number_of_accusers_takes_anybody_out(
    edge_suspicions: EdgeSuspicions, num_liars: int
) -> None:
    for liar in range(num_liars):
        for honest in ("a", "b", "c"):
            assert edge_suspicions.add((f"liar {liar}", honest)) == []
    assert len(edge_suspicions.avoided()) == 3 * num_liars


def test_what_a_client_sees_of_its_own_edges_needs_no_second_opinion(
    edge_suspicions: EdgeSuspicions,
) -> None:
    assert edge_suspicions.add((CLIENT, "first")) == ["first"]
    assert edge_suspicions.add(("last", CLIENT)) == ["last"]
    assert not edge_suspicions.avoided()


def test_a_whole_chain_is_suspected_pair_by_pair(edge_suspicions: EdgeSuspicions) -> None:
    assert edge_suspicions.add_chain(["a", "b", "c"]) == []
    assert set(edge_suspicions.avoided()) == {("a", "b"), ("b", "c")}
    assert edge_suspicions.add_chain(["d"]) == ["d"]


def test_old_quarrels_are_forgotten(edge_suspicions: EdgeSuspicions, clock: ManualClock) -> None:
    edge_suspicions.add(("m", "a"))
    clock.now_s += 10 * AVOID_S + 1
    edge_suspicions.add(("m", "b"))
    edge_suspicions.add(("m", "a"))
    clock.now_s += AVOID_S
    assert not edge_suspicions.avoided()


def test_so_many_are_remembered(
    edge_suspicions: EdgeSuspicions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarrels_module, "MAX_PAIRS", 10)
    for number in range(100):
        edge_suspicions.add((f"from {number}", f"to {number}"))
    assert len(edge_suspicions.avoided()) == 10


def test_an_edge_from_a_server_to_itself_is_its_own_fault(edge_suspicions: EdgeSuspicions) -> None:
    assert edge_suspicions.add(("m", "m")) == ["m"]
    assert edge_suspicions.add_chain(["m", "m", "n"]) == []
    assert set(edge_suspicions.avoided()) == {("m", "n")}
