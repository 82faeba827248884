"""Servers that are left alone for a while."""

from __future__ import annotations

from planetserve.client.bans import Bans
from planetserve.testing.clock import ManualClock


def test_a_ban_ends_by_itself() -> None:
    clock = ManualClock()
    bans = Bans(clock)
    bans.ban(["a", "b"], clock.now_s + 5.0)
    bans.ban(["c"], clock.now_s + 9.0)
    assert bans.banned() == ["a", "b", "c"]
    clock.now_s += 5.0
    assert bans.banned() == ["c"]


def test_the_latest_word_on_a_server_counts() -> None:
    clock = ManualClock()
    bans = Bans(clock)
    bans.ban(["a"], clock.now_s + 60.0)
    bans.ban(["a"], clock.now_s + 1.0)
    clock.now_s += 2.0
    assert bans.banned() == []


def test_a_ban_is_lifted_for_those_named_only() -> None:
    clock = ManualClock()
    bans = Bans(clock)
    bans.ban(["a", "b"], clock.now_s + 5.0)
    bans.lift(["a", "never banned"])
    assert bans.banned() == ["b"]
