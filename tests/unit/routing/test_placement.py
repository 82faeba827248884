"""Where a joining server goes."""

from __future__ import annotations

import numpy as np
import pytest

from planetserve.errors import ConfigError
from planetserve.routing.placement import PLACEMENTS
from planetserve.routing.placement.balance import Balance, block_throughputs
from planetserve.routing.snapshot import ServerPoint
from planetserve.types import BlockSpan


def server(name: str, start: int, end: int, rate: float = 1000.0) -> ServerPoint:
    return ServerPoint(name, start, end, 1.0, rate, 1e6, 100)


def test_holes_are_filled_first() -> None:
    others = [server("a", 0, 4), server("b", 8, 12)]
    assert Balance().choose_span(others, 12, 4, 1000.0) == BlockSpan(4, 8)


def test_covers_as_much_of_the_hole_as_it_can() -> None:
    others = [server("a", 0, 4), server("b", 4, 8)]
    assert Balance().choose_span(others, 10, 4, 1000.0) == BlockSpan(6, 10)


def test_weakest_blocks_are_strengthened() -> None:
    others = [server("a", 0, 6), server("b", 6, 12, rate=300.0), server("c", 6, 12, rate=300.0)]
    assert Balance().choose_span(others, 12, 6, 1000.0) == BlockSpan(6, 12)


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_equal_servers_tile_the_model(size: int) -> None:
    others: list[ServerPoint] = []
    for i in range(24 // size):
        span = Balance().choose_span(others, 12, size, 1000.0)
        others.append(server(f"s{i}", span.start, span.end))
    assert block_throughputs(others, 12) == pytest.approx(np.full(12, 2 * 1000.0 / size))


def test_order_of_the_others_does_not_matter() -> None:
    rng = np.random.default_rng(6)
    others = []
    for i in range(20):
        start = int(rng.integers(0, 20))
        others.append(server(f"s{i}", start, start + 4, rate=float(rng.uniform(100, 999))))
    spans = set()
    for _ in range(10):
        rng.shuffle(others)  # type: ignore[arg-type]
        spans.add(Balance().choose_span(others, 24, 5, 700.0))
    assert len(spans) == 1


def test_a_span_announced_past_the_model_is_cut() -> None:
    assert Balance().choose_span([server("liar", 4, 4000)], 8, 4, 1000.0) == BlockSpan(0, 4)


def test_fixed_stays_where_it_was_told() -> None:
    fixed = PLACEMENTS.create("fixed", start=3)
    assert fixed.choose_span([], 8, 4, 1000.0) == BlockSpan(3, 7)
    with pytest.raises(ConfigError, match="3:9 leave the model"):
        fixed.choose_span([], 8, 6, 1000.0)


@pytest.mark.parametrize("name", ["balance", "fixed"])
@pytest.mark.parametrize("size", [0, -1, 9])
def test_impossible_sizes_are_refused(name: str, size: int) -> None:
    with pytest.raises(ConfigError, match="cannot hold"):
        PLACEMENTS.create(name).choose_span([], 8, size, 1000.0)
