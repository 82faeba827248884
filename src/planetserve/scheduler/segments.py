"""The passes of a batch whose sessions use different parts of the span.

Sessions whose parts overlap share a pass wherever they do: the blocks are cut where some part
begins or ends, and all chunks that pass a segment between two cuts go through it together. One read
of the weights then serves them all.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from planetserve.types import BlockSpan


def segments(spans: Sequence[BlockSpan]) -> list[tuple[BlockSpan, list[int]]]:
    """The passes that together run each of `spans`, in order.

    Returns:
        Segments that follow one another, each with the indices of the spans that cover it in
        ascending order. The segments of one index join to its span.
    """
    cuts = sorted({cut for span in spans for cut in (span.start, span.end)})
    found = []
    for start, end in itertools.pairwise(cuts):
        segment = BlockSpan(start, end)
        members = [index for index, span in enumerate(spans) if span.covers(segment)]
        if members:
            found.append((segment, members))
    return found


def separate(spans: Sequence[BlockSpan]) -> list[tuple[BlockSpan, list[int]]]:
    """One pass for each different span, where sharing a pass gains nothing."""
    members: dict[BlockSpan, list[int]] = {}
    for index, span in enumerate(spans):
        members.setdefault(span, []).append(index)
    return list(members.items())
