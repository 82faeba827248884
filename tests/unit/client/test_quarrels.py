"""One peer's word against another's: a pair is avoided, and who stands out is left out."""

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


@pytest.mark.parametrize("claimed_by", ["m", "n", None])
def test_one_against_one_proves_nothing_however_often(
    quarrels: Quarrels, clock: ManualClock, claimed_by: str | None
) -> None:
    for edge in (("m", "n"), ("n", "m")) * 10:
        assert quarrels.add(edge, claimed_by) == []
        assert quarrels.avoided() == {("m", "n")}
    clock.now_s += AVOID_S
    assert quarrels.avoided() == set()


def test_who_complains_of_one_after_another_is_left_out(quarrels: Quarrels) -> None:
    assert quarrels.add(("liar", "a"), "liar") == []
    # It may complain of either side of it.
    assert quarrels.add(("b", "liar"), "liar") == ["liar"]
    assert quarrels.add(("liar", "a"), "liar") == ["liar"]


def test_a_liar_cannot_have_anybody_left_out(quarrels: Quarrels) -> None:
    """Quarrels with one who complains of everybody count for nothing against the others."""
    for liar in ("liar 1", "liar 2", "liar 3"):
        for other in ("a", "b", "c"):
            assert set(quarrels.add((liar, other), liar)) <= {liar}


def test_who_gets_along_with_nobody_is_left_out(quarrels: Quarrels) -> None:
    assert quarrels.add(("bad", "a"), "a") == []
    assert quarrels.add(("b", "bad"), "b") == []
    assert quarrels.add(("bad", "c"), None) == ["bad"]


def test_what_a_client_sees_of_its_own_edges_needs_no_second_opinion(quarrels: Quarrels) -> None:
    assert quarrels.add((CLIENT, "first"), None) == ["first"]
    assert quarrels.add(("last", CLIENT), None) == ["last"]
    assert quarrels.avoided() == set()


def test_old_quarrels_are_forgotten(quarrels: Quarrels, clock: ManualClock) -> None:
    quarrels.add(("m", "a"), "m")
    clock.now_s += 10 * AVOID_S
    assert quarrels.add(("m", "b"), "m") == ["m"]
    clock.now_s += 10 * AVOID_S + 1
    assert quarrels.add(("m", "c"), "m") == []


def test_so_many_are_remembered(quarrels: Quarrels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarrels_module, "MAX_PAIRS", 10)
    for number in range(100):
        quarrels.add((f"from {number}", f"to {number}"), None)
    assert len(quarrels.avoided()) == 10
