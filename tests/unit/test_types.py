"""Spans, hops and chains."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planetserve.errors import ConfigError
from planetserve.types import BlockSpan, Chain, Hop


@given(st.integers(0, 200), st.integers(1, 200), st.integers(-5, 405))
def test_a_span_is_half_open(start: int, length: int, block: int) -> None:
    span = BlockSpan(start, start + length)
    assert len(span) == length
    assert (block in span) == (block in range(start, start + length))
    assert BlockSpan.parse(str(span)) == span


def test_only_block_numbers_are_in_a_span() -> None:
    assert "1" not in BlockSpan(0, 3)
    assert 1.0 not in BlockSpan(0, 3)


@pytest.mark.parametrize(("start", "end"), [(0, 0), (3, 3), (5, 2), (-1, 2), (-2, -1)])
def test_empty_reversed_and_negative_spans(start: int, end: int) -> None:
    with pytest.raises(ConfigError, match=f"block span {start}:{end} is empty or reversed"):
        BlockSpan(start, end)


@pytest.mark.parametrize(
    "text", ["", "3", ":", "0:", ":8", "0:3:6", "a:b", "-1:3", "0-3", "1.0:2", "0x1:3"]
)
def test_texts_that_are_no_span(text: str) -> None:
    with pytest.raises(ConfigError, match="not START:END; give two block numbers"):
        BlockSpan.parse(text)


def test_spaces_around_numbers_do_not_matter() -> None:
    assert BlockSpan.parse(" 0 : 8 ") == BlockSpan(0, 8)


@pytest.mark.parametrize(
    ("inner", "covered"), [((2, 4), True), ((2, 5), True), ((1, 4), False), ((4, 6), False)]
)
def test_covers(inner: tuple[int, int], covered: bool) -> None:
    assert BlockSpan(2, 5).covers(BlockSpan(*inner)) is covered


def test_spans_sort_by_start_then_end() -> None:
    spans = [BlockSpan(3, 6), BlockSpan(0, 4), BlockSpan(0, 2)]
    assert sorted(spans) == [BlockSpan(0, 2), BlockSpan(0, 4), BlockSpan(3, 6)]


def test_a_chain_reads_as_its_hops() -> None:
    hops = (Hop("12D3KooWaaaaaa", 0, 3), Hop("12D3KooWbbbbbb", 3, 8))
    chain = Chain(hops)
    assert tuple(chain) == hops
    assert len(chain) == 2
    assert hops[1].span == BlockSpan(3, 8)
    assert str(chain) == "0:3 via …aaaaaa => 3:8 via …bbbbbb"
