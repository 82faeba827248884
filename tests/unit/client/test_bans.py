"""Servers that are left alone for a while."""

from __future__ import annotations

from planetserve.client.planning import bans as bans_module
from planetserve.client.planning.bans import Bans
from planetserve.testing.clock import ManualClock


def test_a_ban_ends_by_itself() -> None:
    clock = ManualClock()
    bans = Bans(clock)
    bans.ban(["a", "b"], 5.0)
    bans.ban(["c"], 9.0)
    assert bans.banned() == ["a", "b", "c"]
    clock.now_s += 5.0
    assert bans.banned() == ["c"]


def test_a_server_that_fails_again_and_again_is_left_alone_for_longer_and_longer() -> None:
    clock = ManualClock()
    bans = Bans(clock)
    for length_s in (5.0, 10.0, 20.0, 40.0, 40.0):
        bans.ban(["a"], 5.0)
        clock.now_s += length_s - 0.1
        assert bans.banned() == ["a"]
        clock.now_s += 0.1
        assert bans.banned() == []
    clock.now_s += 600.0
    bans.ban(["a"], 5.0)
    clock.now_s += 5.0
    assert bans.banned() == []


def test_sessions_that_fail_at_once_make_one_ban() -> None:
    clock = ManualClock()
    bans = Bans(clock)
    for _ in range(10):
        bans.ban(["a"], 60.0)
        bans.ban(["a"], 1.0)
    clock.now_s += 59.0
    assert bans.banned() == ["a"]
    clock.now_s += 1.0
    assert bans.banned() == []


def test_a_ban_is_lifted_for_those_named_only_and_not_forgotten() -> None:
    clock = ManualClock()
    bans = Bans(clock)
    bans.ban(["a", "b"], 5.0)
    bans.lift(["a", "never banned"])
    assert bans.banned() == ["b"]
    bans.ban(["a"], 5.0)
    clock.now_s += 9.0
    assert bans.banned() == ["a"]


def test_so_many_are_remembered() -> None:
    bans = Bans(ManualClock())
    bans.ban((f"server {number}" for number in range(2 * bans_module.MAX_SERVERS)), 5.0)
    assert len(bans.banned()) == bans_module.MAX_SERVERS
