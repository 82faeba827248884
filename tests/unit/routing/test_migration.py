"""When a session moves: clearly better, for a while, and worth what the move costs."""

from __future__ import annotations

import random
from typing import Any

import pytest

from planetserve.client.planning.latency_feedback import LatencyFeedback
from planetserve.config import ClientConfig
from planetserve.errors import ConfigError
from planetserve.routing.migration import MigrationPolicy, Offer, move_ms, new_hops
from planetserve.routing.snapshot import ServerPoint, SwarmSnapshot
from planetserve.types import BlockSpan, Chain, Hop, ServerInfo, ServerState

OLD = Chain((Hop("a", 0, 4), Hop("b", 4, 8)), latency_ms=100.0)
NEW = Chain((Hop("a", 0, 4), Hop("c", 4, 8)), latency_ms=50.0)
GOOD = Offer(NEW, now_ms=100.0, offered_ms=50.0, move_ms=400.0)


class ManualClock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def unix(self) -> float:
        return self.now


class Always(random.Random):
    """Draws what makes every move happen."""

    def random(self) -> float:
        return 0.0


def migration_policy(
    clock: ManualClock, rng: random.Random | None = None, **options: Any
) -> MigrationPolicy:
    made = MigrationPolicy(ClientConfig(**options), clock, rng or Always())
    for _ in range(8):
        made.count_step(OLD, 100.0)
    return made


def test_what_is_worth_a_move() -> None:
    assert GOOD.is_worth(100.0, tokens_left=9, gain=0.2)
    assert not GOOD.is_worth(100.0, tokens_left=8, gain=0.2)  # 8 x 50 ms do not pay 400 ms
    assert not Offer(NEW, 100.0, 81.0, 0.0).is_worth(100.0, 1000, 0.2)
    # A share of what is measured: that everything takes longer than predicted is no reason.
    assert not GOOD.is_worth(260.0, 1000, 0.2)


def test_only_several_good_checks_in_a_row_make_a_session_move() -> None:
    made = migration_policy(ManualClock())
    assert made.decide(GOOD, 100) is None
    assert not made.may_decide
    assert made.decide(GOOD, 100) is None
    assert made.may_decide
    assert made.decide(None, 100) is None
    assert [made.decide(GOOD, 100) for _ in range(3)] == [None, None, NEW]


def test_a_new_chain_is_judged_from_the_beginning() -> None:
    made = migration_policy(ManualClock(), replan_checks=2)
    made.decide(GOOD, 100)
    made.count_step(NEW, 50.0)
    assert made.measured_ms == 50.0
    assert made.decide(GOOD, 100) is None


def test_not_all_sessions_move_at_once() -> None:
    moved = [
        migration_policy(ManualClock(), random.Random(seed), replan_checks=1).decide(GOOD, 100)
        is not None
        for seed in range(100)
    ]
    assert 30 < sum(moved) < 70


def test_checks_come_once_a_period_and_need_steps() -> None:
    clock = ManualClock()
    made = migration_policy(clock, replan_period=10.0)
    assert not made.is_due()
    clock.now = 12.1
    assert made.is_due()
    assert not made.is_due()
    clock.now = 24.3
    made.count_step(NEW, 50.0)
    assert not made.is_due()
    never = migration_policy(clock, replan_period=0)
    clock.now = 1e9
    assert not never.is_due()


@pytest.mark.parametrize("name", ["replan_period", "replan_gain", "replan_checks"])
def test_settings_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ClientConfig(**{name: -1})


def test_shared_hops_are_kept() -> None:
    a, b, c, d = Hop("a", 0, 2), Hop("b", 2, 4), Hop("c", 4, 6), Hop("d", 2, 4)
    assert new_hops([a, b, c], [a, d, c]) == (1, 1)
    assert new_hops([a, b, c], [a, b, c]) == (3, 0)
    assert new_hops([a, b], [Hop("a", 0, 3), Hop("b", 3, 4)]) == (0, 0)
    assert new_hops([a, c], [a, d, c]) == (1, 1)


def test_filling_takes_time_for_blocks_and_bytes() -> None:
    point = ServerPoint("c", 0, 8, 1.0, 1000.0, 1e6, 10**6)
    snapshot = SwarmSnapshot(8, 1000.0, 1.0, 10.0, (point,))
    setup = move_ms(snapshot, [Hop("c", 4, 8)], 0, 1)
    assert setup == 40.0
    assert move_ms(snapshot, [Hop("c", 4, 8)], 100, 1) == pytest.approx(setup + 400.0 + 100.0)


def info(name: str) -> ServerInfo:
    return ServerInfo(
        peer_id=name, model="tiny", fingerprint="f", span=BlockSpan(0, 8), num_blocks=8,
        state=ServerState.ONLINE, dtype="float32", addresses=(), decode_ms_per_block=2.0,
        tokens_per_s_per_block=1.0, network_bytes_per_s=1.0, free_cache_tokens=1,
        max_session_tokens=1,
    )  # fmt: skip


def test_a_load_of_now_counts_for_a_while() -> None:
    clock = ManualClock()
    known = LatencyFeedback(16, clock)
    known.record_loads(Chain((Hop("a", 0, 8),)), {"a": 7.0}, elapsed_ms=1000.0)
    assert known.with_reported_load(info("a")).decode_ms_per_block == 7.0
    assert known.with_reported_load(info("b")) == info("b")
    clock.now = 100.0
    assert known.with_reported_load(info("a")) == info("a")


def test_what_all_chains_are_off_by_speaks_against_nobody() -> None:
    known = LatencyFeedback(16, ManualClock())
    for _ in range(20):
        known.record_latency(OLD, predicted_ms=10.0, measured_ms=30.0)
    assert known.with_penalty(info("a")) == info("a")


def test_a_chain_that_breaks_its_promise_costs_its_servers() -> None:
    known = LatencyFeedback(16, ManualClock())
    honest = Chain((Hop("h", 0, 8),))
    for _ in range(8):
        known.record_latency(honest, predicted_ms=100.0, measured_ms=110.0)
        known.record_latency(OLD, predicted_ms=20.0, measured_ms=200.0)
    # 200 ms less 1.5 x 1.1 x 20 ms, over 8 blocks
    assert known.with_penalty(info("a")).decode_ms_per_block == pytest.approx(
        2.0 + 167.0 / 8, rel=0.1
    )
    assert known.with_penalty(info("h")) == info("h")
    for _ in range(40):
        known.record_latency(OLD, predicted_ms=20.0, measured_ms=22.0)
    assert known.with_penalty(info("a")).decode_ms_per_block == pytest.approx(2.0, rel=0.01)
