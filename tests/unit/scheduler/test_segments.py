"""Where parts of a span are cut so that sessions share passes."""

from __future__ import annotations

import random

import pytest

from planetserve.scheduler.segments import segments, separate
from planetserve.types import BlockSpan


def spans(*pairs: tuple[int, int]) -> list[BlockSpan]:
    return [BlockSpan(start, end) for start, end in pairs]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([(2, 6)], [((2, 6), [0])]),
        ([(2, 6), (2, 6)], [((2, 6), [0, 1])]),
        ([(0, 4), (2, 6)], [((0, 2), [0]), ((2, 4), [0, 1]), ((4, 6), [1])]),
        ([(1, 2), (0, 4)], [((0, 1), [1]), ((1, 2), [0, 1]), ((2, 4), [1])]),
        ([(4, 6), (0, 2)], [((0, 2), [1]), ((4, 6), [0])]),
        ([(0, 2), (2, 4), (0, 4)], [((0, 2), [0, 2]), ((2, 4), [1, 2])]),
    ],
    ids=["one", "same", "overlapping", "nested", "disjoint", "adjacent"],
)
def test_cuts_are_where_parts_begin_and_end(parts, expected):
    wanted = [(BlockSpan(*part), members) for part, members in expected]
    assert segments(spans(*parts)) == wanted


def test_every_part_is_passed_whole_in_order_and_once():
    rng = random.Random(5)
    for _ in range(200):
        parts = [
            BlockSpan(start, rng.randint(start + 1, 12))
            for start in (rng.randrange(12) for _ in range(rng.randint(1, 8)))
        ]
        passes = segments(parts)
        for index, part in enumerate(parts):
            own = [span for span, members in passes if index in members]
            blocks = [block for span in own for block in range(span.start, span.end)]
            assert blocks == list(range(part.start, part.end))
        assert all(members == sorted(set(members)) and members for _, members in passes)
        # One pass more would be one more read of some weights.
        assert len(passes) <= 2 * len(set(parts)) - 1


def test_separate_passes_are_one_for_each_different_part():
    parts = spans((0, 4), (2, 6), (0, 4))
    assert separate(parts) == [(BlockSpan(0, 4), [0, 2]), (BlockSpan(2, 6), [1])]
