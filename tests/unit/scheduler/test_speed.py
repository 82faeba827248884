"""What a server says of its speed follows from the steps it has run, and from how long ago."""

from __future__ import annotations

import pytest

from planetserve.scheduler.speed import PassSpeed, StepCost, StepLatency


def test_overhead_and_blocks_are_told_apart() -> None:
    cost = StepCost.fit(all_ms=17.0, one_ms=3.0, num_blocks=8)
    assert (cost.overhead_ms, cost.ms_per_block) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("all_ms", "one_ms", "num_blocks", "cost"),
    [
        (5.0, None, 4, StepCost(0.0, 1.25)),  # nothing to compare with
        (5.0, 4.0, 1, StepCost(0.0, 5.0)),
        (8.0, 0.5, 4, StepCost(0.0, 2.0)),  # noise: the overhead would be negative
        (4.0, 5.0, 4, StepCost(pytest.approx(4.0, abs=1e-5), 1e-6)),  # noise: blocks for nothing
    ],
)
def test_noise_makes_no_impossible_cost(
    all_ms: float, one_ms: float | None, num_blocks: int, cost: StepCost
) -> None:
    assert StepCost.fit(all_ms, one_ms, num_blocks) == cost


def test_load_raises_the_time_per_block_and_fades_when_idle() -> None:
    latency = StepLatency(StepCost(1.0, 2.0), now_s=0.0)
    assert latency.ms_per_block(0.0) == 2.0
    for tick in range(1, 401):  # 20 s of steps through 4 blocks that take 41 ms each
        latency.add(41.0, 4, alone=False, now_s=tick * 0.05)
    loaded = latency.ms_per_block(20.0)
    assert loaded == pytest.approx(10.0, rel=0.03)
    assert latency.ms_per_block(55.0) == pytest.approx(2.0 + 8.0 / 2.718, rel=0.05)
    assert latency.ms_per_block(500.0) == pytest.approx(2.0, abs=1e-3)


def test_many_steps_at_once_count_as_one_moment() -> None:
    latency = StepLatency(StepCost(0.0, 2.0), now_s=0.0)
    for _ in range(1000):
        latency.add(100.0, 1, alone=False, now_s=0.001)
    assert latency.ms_per_block(0.001) < 2.1


def test_an_unloaded_server_keeps_learning() -> None:
    latency = StepLatency(StepCost(0.0, 2.0), now_s=0.0)
    for second in range(1, 201):
        latency.add(12.0, 4, alone=True, now_s=float(second))
    assert latency.ms_per_block(1e6) == pytest.approx(3.0, rel=0.01)


def test_throughput_comes_from_large_passes_of_any_number_of_blocks() -> None:
    speed = PassSpeed()
    speed.record(8, 4, 1.0)
    assert speed.tokens_per_s_per_block == 0.0
    speed.record(100, 4, 0.1)
    assert speed.tokens_per_s_per_block == pytest.approx(4000.0)
    speed.record(100, 2, 0.1)
    assert speed.tokens_per_s_per_block == pytest.approx(3800.0)
