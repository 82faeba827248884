"""How much a peer may ask for, on a clock that the test moves."""

from __future__ import annotations

import pytest

from planetserve.swarm import rate_limit as buckets_module
from planetserve.swarm.rate_limit import TokenBuckets
from planetserve.testing.clock import ManualClock


def test_a_bucket_lets_a_burst_through_and_then_the_rate() -> None:
    clock = ManualClock()
    buckets = TokenBuckets(per_s=2.0, burst=3, clock=clock)
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b") == 0
    clock.now_s += 0.25
    assert buckets.take("a") == pytest.approx(0.25)
    clock.now_s += 0.25
    assert buckets.take("a") == 0
    assert buckets.take("a") == pytest.approx(0.5)
    clock.now_s += 1000
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]


def test_buckets_of_quiet_peers_are_forgotten() -> None:
    clock = ManualClock()
    buckets = TokenBuckets(per_s=1.0, burst=5, clock=clock)
    for number in range(100):
        buckets.take(f"peer {number}")
    assert len(buckets) == 100
    clock.now_s += 1.0
    buckets.take("another")
    assert len(buckets) == 1


def test_so_many_buckets_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets_module, "MAX_BUCKETS", 10)
    buckets = TokenBuckets(per_s=0.001, burst=1, clock=ManualClock())
    for number in range(50):
        buckets.take(f"peer {number}")
    assert len(buckets) == 10
    assert buckets.take("peer 49") > 0


def test_large_requests_take_several_tokens_and_never_more_than_there_can_be() -> None:
    clock = ManualClock()
    buckets = TokenBuckets(per_s=2.0, burst=10, clock=clock)
    assert [buckets.take("a", 4) for _ in range(3)] == [0, 0, 1.0]
    assert buckets.take("a") == 0
    clock.now_s += 4.5
    assert buckets.take("a", 1000) == 0
    assert buckets.take("a", 1000) == 5.0
