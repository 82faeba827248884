"""Admission by pages: what is promised adds up, refusals are immediate and say when to return."""

from __future__ import annotations

import pytest

from planetserve.errors import CacheExhausted, ConfigError, SessionError
from planetserve.scheduler.kv_reservations import KvReservations
from planetserve.testing.clock import ManualClock


def test_a_session_leases_whole_pages_per_row():
    leases = KvReservations(10, 16, ManualClock())
    leases.open(b"a", "peer", num_rows=2, max_length=17)
    assert leases.leased_pages == 4
    assert leases.free_tokens == 96


def test_refuses_what_does_not_fit_and_admits_it_after_a_close():
    leases = KvReservations(4, 16, ManualClock())
    leases.open(b"a", "peer", 1, 48)
    with pytest.raises(CacheExhausted) as refusal:
        leases.open(b"b", "peer", 1, 32)
    assert refusal.value.retry_after_s > 0
    leases.close(b"a")
    leases.open(b"b", "peer", 1, 32)
    assert b"b" in leases
    assert len(leases) == 1


def test_retry_after_follows_how_long_sessions_live():
    clock = ManualClock()
    leases = KvReservations(1, 16, clock)
    hints = []
    for _ in range(2):
        for _ in range(40):
            leases.open(b"a", "peer", 1, 1)
            clock.now_s += 40.0 if hints else 2.0
            leases.close(b"a")
        leases.open(b"b", "peer", 1, 1)
        with pytest.raises(CacheExhausted) as refusal:
            leases.open(b"c", "peer", 1, 1)
        hints.append(refusal.value.retry_after_s)
        leases.close(b"b")
    assert hints[0] == pytest.approx(2.0, rel=0.2)
    assert hints[1] > 20


def test_a_session_grows_while_pages_are_unleased():
    leases = KvReservations(6, 16, ManualClock())
    leases.open(b"a", "peer", 2, 16)
    leases.ensure(b"a", 40)
    assert leases.leased_pages == 6
    leases.ensure(b"a", 48)
    with pytest.raises(CacheExhausted):
        leases.ensure(b"a", 49)
    assert leases.leased_pages == 6
    leases.close(b"a")
    assert leases.leased_pages == 0


def test_one_peer_cannot_lease_more_than_its_share():
    leases = KvReservations(8, 16, ManualClock(), max_peer_share=0.5)
    leases.open(b"a", "modest", 1, 16)
    leases.open(b"b", "greedy", 1, 64)
    with pytest.raises(CacheExhausted, match="one peer.*64 of the 128.*--max_peer_kv_share"):
        leases.open(b"c", "greedy", 1, 16)
    with pytest.raises(CacheExhausted, match="one peer"):
        leases.ensure(b"b", 65)
    leases.open(b"c", "modest", 1, 48)


def test_a_lone_peer_may_lease_everything_until_others_need_their_share():
    leases = KvReservations(8, 16, ManualClock(), max_peer_share=0.25)
    for key in (b"a", b"b", b"c", b"d"):
        leases.open(key, "first", 1, 32)
    with pytest.raises(CacheExhausted):
        leases.open(b"e", "second", 1, 17)
    assert leases.over_share("second", 1, 48) == []  # more than its own share
    assert leases.over_share("first", 1, 16) == []
    assert leases.over_share("second", 1, 17) == [b"d"]
    leases.close(b"d")
    leases.open(b"e", "second", 1, 17)
    assert leases.over_share("third", 2, 16) == [b"c"]
    leases.close(b"c")
    leases.open(b"f", "third", 2, 16)
    with pytest.raises(CacheExhausted):
        leases.open(b"g", "first", 1, 1)
    assert leases.over_share("fourth", 1, 32) == [b"b"]
    leases.close(b"b")
    leases.open(b"h", "fourth", 1, 32)
    assert leases.over_share("fifth", 1, 1) == []  # everybody is within the share


def test_a_share_of_one_is_no_limit():
    leases = KvReservations(8, 16, ManualClock(), max_peer_share=1.0)
    leases.open(b"a", "first", 1, 112)
    leases.open(b"b", "second", 1, 16)
    assert leases.free_tokens == 0


def test_opening_twice_is_an_error_and_closing_twice_is_not():
    leases = KvReservations(8, 16, ManualClock())
    leases.open(b"a", "peer", 1, 16)
    with pytest.raises(SessionError):
        leases.open(b"a", "peer", 1, 16)
    leases.close(b"a")
    leases.close(b"a")
    assert leases.leased_pages == 0
    with pytest.raises(SessionError):
        leases.ensure(b"a", 1)


def test_impossible_sizes_are_refused():
    with pytest.raises(ConfigError):
        KvReservations(0, 16, ManualClock())
    with pytest.raises(ConfigError):
        KvReservations(1, 16, ManualClock(), max_peer_share=0.0)
    with pytest.raises(ConfigError):
        KvReservations(1, 16, ManualClock(), overcommit=0.5)


def test_more_is_promised_than_there_is_unless_sessions_wait():
    leases = KvReservations(8, 16, ManualClock(), max_peer_share=0.25, overcommit=2.0)
    assert leases.free_tokens == 128  # of one session; there are as many for another
    with pytest.raises(CacheExhausted, match="144 tokens does not fit into the 128"):
        leases.open(b"a", "first", 1, 129)
    leases.open(b"a", "first", 1, 128)
    with pytest.raises(CacheExhausted, match="does not fit"):
        leases.ensure(b"a", 129)
    leases.open(b"b", "second", 1, 64)
    with pytest.raises(CacheExhausted, match="one peer.*64 of the 256"):
        leases.open(b"c", "second", 1, 16)
    leases.is_short = True
    assert leases.free_tokens == 0
    with pytest.raises(CacheExhausted, match="0 are free"):
        leases.open(b"c", "third", 1, 16)
    leases.is_short = False
    leases.open(b"c", "third", 1, 64)
    assert leases.leased_pages == 16


def test_states_of_every_row_are_leased_with_its_tokens():
    leases = KvReservations(20, 16, ManualClock(), state_pages=5)
    assert leases.free_tokens == 15 * 16
    leases.open(b"a", "peer", num_rows=2, max_length=17)
    assert leases.leased_pages == 14
    assert leases.leased_tokens(b"a") == 64
    assert leases.free_tokens == 16
    with pytest.raises(CacheExhausted):
        leases.open(b"b", "peer", 1, 17)
    leases.close(b"a")
    assert leases.leased_pages == 0
