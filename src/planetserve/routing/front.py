"""Fronts of latency against throughput: which chains are on one, which one to take, how good it is.

A front is sorted by latency, and every next chain has more throughput. Points for `hypervolume` are
minimised in every coordinate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from planetserve.errors import ConfigError
from planetserve.routing.arrays import BoolArray, FloatArray, IntArray
from planetserve.routing.request import ChainRequest
from planetserve.types import Chain


def undominated_rows(objectives: FloatArray) -> IntArray:
    """Rows that no other row beats or equals in every column, sorted by their columns.

    All columns are minimised; of equal rows the first is kept.
    """
    order = np.lexsort(objectives.T[::-1])
    rows = objectives[order]
    beaten = np.zeros(len(rows), dtype=bool)
    # Rows are sorted, so nothing after a row can dominate it.
    for start in range(0, len(rows), _CHUNK):
        some = np.arange(start, min(start + _CHUNK, len(rows)))
        kept = rows[:start][~beaten[:start]]
        for low in range(0, len(kept), _CHUNK):
            worse = np.any(_no_more(kept[low : low + _CHUNK], rows[some]), axis=0)
            beaten[some[worse]] = True
            some = some[~worse]
        beaten[some] = np.any(np.triu(_no_more(rows[some], rows[some]), 1), axis=0)
    return order[~beaten]


_CHUNK = 256


def _no_more(one: FloatArray, other: FloatArray) -> BoolArray:
    """`[one, other]`: whether a row of `one` is nowhere more than one of `other`."""
    fits = np.ones((len(one), len(other)), dtype=bool)
    for mine, theirs in zip(one.T, other.T, strict=True):
        fits &= mine[:, None] <= theirs[None, :]
    return fits


def pick_chain(front: Sequence[Chain], request: ChainRequest) -> Chain:
    """The chain of `front` that `request.pick` asks for; without a pick, the knee.

    - `latency`: the least time per token; `throughput`: the most tokens per second;
    - `knee`: the farthest from the straight line between these two, both axes scaled to 0..1;
    - `request`: the least time for the whole request, the prompt at the chain's throughput and
      the output at its latency.

    Raises:
        ConfigError: the front is empty.
    """
    if not front:
        raise ConfigError("an empty front has no chain to pick")
    if request.pick == "latency":
        return min(front, key=lambda chain: chain.latency_ms)
    if request.pick == "throughput":
        return max(front, key=lambda chain: chain.throughput_tokens_per_s)
    if request.pick == "request":
        return min(front, key=lambda chain: request_ms(chain, request))
    return _knee_point(front)


def request_ms(chain: Chain, request: ChainRequest) -> float:
    """Predicted time of the whole request on `chain`, in milliseconds."""
    prompt_ms = 1000.0 * request.prompt_tokens / chain.throughput_tokens_per_s
    return prompt_ms + request.output_tokens * chain.latency_ms


def _knee_point(front: Sequence[Chain]) -> Chain:
    latency = _unit_scale(np.array([chain.latency_ms for chain in front]))
    throughput = _unit_scale(np.array([chain.throughput_tokens_per_s for chain in front]))
    return front[int(np.argmax(throughput - latency))]


def _unit_scale(values: FloatArray) -> FloatArray:
    width = float(np.ptp(values))
    scaled: FloatArray = (values - values.min()) / width if width > 0 else np.zeros(len(values))
    return scaled


def hypervolume(points: FloatArray, reference: Sequence[float]) -> float:
    """Area that two-dimensional `points` dominate below `reference`, both coordinates minimised."""
    inside = points[(points < np.asarray(reference)).all(axis=1)]
    area, ceiling = 0.0, reference[1]
    for x, y in inside[np.lexsort((inside[:, 1], inside[:, 0]))]:
        if y < ceiling:
            area += (reference[0] - x) * (ceiling - y)
            ceiling = y
    return float(area)
