"""Fronts of latency against throughput: which chains are on one, which one to take, how good it is.

A front is sorted by latency, and every next chain has more throughput. Points for `hypervolume` are
minimised in every coordinate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from planetserve.errors import ConfigError
from planetserve.routing.problem import IntArray
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import FloatArray
from planetserve.types import Chain


def non_dominated(chains: Iterable[Chain]) -> tuple[Chain, ...]:
    """The front of `chains`; of equal ones the first."""
    front: list[Chain] = []
    for chain in sorted(chains, key=lambda c: (c.latency_ms, -c.throughput_tokens_per_s)):
        if not front or chain.throughput_tokens_per_s > front[-1].throughput_tokens_per_s:
            front.append(chain)
    return tuple(front)


def undominated_rows(objectives: FloatArray) -> IntArray:
    """Rows that no other row beats or equals in every column, sorted by their columns.

    All columns are minimised; of equal rows the first is kept.
    """
    order = np.lexsort(objectives.T[::-1])
    rows = objectives[order]
    alive = np.ones(len(rows), dtype=bool)
    for i in range(len(rows)):
        if alive[i]:
            # Rows are sorted, so nothing after a row can dominate it.
            alive[i + 1 :] &= (rows[i + 1 :] < rows[i]).any(axis=1)
    return order[alive]


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
    return _knee(front)


def request_ms(chain: Chain, request: ChainRequest) -> float:
    """Predicted time of the whole request on `chain`, in milliseconds."""
    prompt_ms = 1000.0 * request.prompt_tokens / chain.throughput_tokens_per_s
    return prompt_ms + request.output_tokens * chain.latency_ms


def _knee(front: Sequence[Chain]) -> Chain:
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
