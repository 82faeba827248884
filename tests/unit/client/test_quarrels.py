"""One peer's word against another's: a pair is avoided, and nobody is left out for it."""

from __future__ import annotations

import pytest

from planetserve.client import quarrels as quarrels_module
from planetserve.client.quarrels import Quarrels
from planetserve.testing.clock import ManualClock
from planetserve.types import CLIENT

AVOID_S = 15.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def quarrels(clock: ManualClock) -> Quarrels:
    return Quarrels(AVOID_S, clock)


def test_one_against_one_proves_nothing_however_often(
    quarrels: Quarrels, clock: ManualClock
) -> None:
    for edge in (("m", "n"), ("n", "m")) * 10:
        assert quarrels.add(edge) == []
        assert set(quarrels.avoided()) == {("m", "n")}
    clock.now_s += AVOID_S
    assert not quarrels.avoided()


def test_a_pair_that_quarrels_again_is_avoided_for_longer(
    quarrels: Quarrels, clock: ManualClock
) -> None:
    for length_s in (AVOID_S, 2 * AVOID_S, 4 * AVOID_S, 8 * AVOID_S, 8 * AVOID_S):
        quarrels.add(("m", "n"))
        clock.now_s += length_s - 0.1
        assert quarrels.avoided()
        clock.now_s += 0.1
        assert not quarrels.avoided()


@pytest.mark.parametrize("num_liars", [1, 2, 3, 20])
def test_no_number_of_accusers_takes_anybody_out(quarrels: Quarrels, num_liars: int) -> None:
    for liar in range(num_liars):
        for honest in ("a", "b", "c"):
            assert quarrels.add((f"liar {liar}", honest)) == []
    assert len(quarrels.avoided()) == 3 * num_liars


def test_what_a_client_sees_of_its_own_edges_needs_no_second_opinion(quarrels: Quarrels) -> None:
    assert quarrels.add((CLIENT, "first")) == ["first"]
    assert quarrels.add(("last", CLIENT)) == ["last"]
    assert not quarrels.avoided()


def test_a_whole_chain_is_suspected_pair_by_pair(quarrels: Quarrels) -> None:
    assert quarrels.add_chain(["a", "b", "c"]) == []
    assert set(quarrels.avoided()) == {("a", "b"), ("b", "c")}
    assert quarrels.add_chain(["d"]) == ["d"]


def test_old_quarrels_are_forgotten(quarrels: Quarrels, clock: ManualClock) -> None:
    quarrels.add(("m", "a"))
    clock.now_s += 10 * AVOID_S + 1
    quarrels.add(("m", "b"))
    quarrels.add(("m", "a"))
    clock.now_s += AVOID_S
    assert not quarrels.avoided()


def test_so_many_are_remembered(quarrels: Quarrels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarrels_module, "MAX_PAIRS", 10)
    for number in range(100):
        quarrels.add((f"from {number}", f"to {number}"))
    assert len(quarrels.avoided()) == 10
