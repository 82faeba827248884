"""The round-trip times that a snapshot holds: by name, or as a matrix of all pairs.

Planning, pricing and drawing read them through `RoundTrips`, in either form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Protocol

import numpy as np

from planetserve.errors import ConfigError
from planetserve.routing.arrays import FloatArray, IntArray
from planetserve.routing.links import KnownLinks, Links, LinkTable

_MAX_CELLS = 2000**2
"""Maximum cells of a table of which a fraction below `_FULL` is known."""
_FULL = 0.2


class RoundTrips(Protocol):
    """Symmetric times between the nodes of a snapshot: its servers in their order, the client last;
    between a node and itself the time is 0."""

    def between(self, one: int, other: int) -> float:
        """The round-trip time of two nodes, in milliseconds."""
        ...

    def half_from(self, node: int) -> FloatArray:
        """`[nodes]` half the round-trip times from one node to all, an array of the caller's."""
        ...

    def links(self, members: IntArray) -> Links:
        """Half the round-trip times between some of the servers."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class RttMatrix:
    """Times of all pairs.

    Raises:
        ConfigError: it is not square, not symmetric, not 0 on its diagonal, or has a number that is
            negative or not finite.
    """

    half_ms: FloatArray
    """Half the round-trip times; never changed by anybody."""

    def __post_init__(self) -> None:
        half_ms = self.half_ms
        if half_ms.ndim != 2 or half_ms.shape[0] != half_ms.shape[1]:
            raise ConfigError(f"a matrix of round-trip times has the shape {half_ms.shape}")
        if not 0.0 <= half_ms.min(initial=0.0) <= half_ms.max(initial=0.0) < np.inf:
            raise ConfigError("a matrix of round-trip times has a number below 0 or not finite")
        if half_ms.diagonal().any() or not np.array_equal(half_ms, half_ms.T):
            raise ConfigError(
                "a matrix of round-trip times is not symmetric or not 0 on its diagonal"
            )

    def __len__(self) -> int:
        return len(self.half_ms)

    def between(self, one: int, other: int) -> float:
        return 2.0 * float(self.half_ms[one, other])

    def half_from(self, node: int) -> FloatArray:
        times: FloatArray = self.half_ms[node].copy()
        return times

    def links(self, members: IntArray) -> Links:
        return LinkTable(self.half_ms[np.ix_(members, members)])


class RttTable:
    """Times of the pairs that are known; all others have a default.

    Args:
        index: the nodes' numbers, by name.
        rtt_ms: `rtt_ms[a][b]` in one direction or in both, checked already.
        default_rtt_ms: of all other pairs.
    """

    def __init__(
        self,
        index: Mapping[str, int],
        rtt_ms: Mapping[str, Mapping[str, float]],
        default_rtt_ms: float,
    ):
        self._names = list(index)
        self._index = index
        self._rtt_ms = rtt_ms
        self._default_rtt_ms = default_rtt_ms

    def between(self, one: int, other: int) -> float:
        if one == other:
            return 0.0
        first, second = self._names[one], self._names[other]
        found = self._rtt_ms.get(first, {}).get(second)
        if found is None:
            found = self._rtt_ms.get(second, {}).get(first)
        return self._default_rtt_ms if found is None else found

    def half_from(self, node: int) -> FloatArray:
        first, second, half_ms = self._known
        times = np.full(len(self._names), self._default_rtt_ms / 2)
        times[second[first == node]] = half_ms[first == node]
        times[first[second == node]] = half_ms[second == node]
        times[node] = 0.0
        return times

    def links(self, members: IntArray) -> Links:
        first, second, half_ms = self._known
        place = np.full(len(self._names), -1, dtype=np.intp)
        place[members] = np.arange(len(members))
        inside = (place[first] >= 0) & (place[second] >= 0)
        first, second, half_ms = place[first[inside]], place[second[inside]], half_ms[inside]
        n, default = len(members), self._default_rtt_ms / 2
        if n * n > max(_MAX_CELLS, 2 * len(first) / _FULL):
            return KnownLinks(n, first, second, half_ms, default)
        table = np.full((n, n), default)
        table[first, second] = half_ms
        table[second, first] = half_ms
        np.fill_diagonal(table, 0.0)
        return LinkTable(table)

    @cached_property
    def _known(self) -> tuple[IntArray, IntArray, FloatArray]:
        """The known pairs by their numbers, and half their times."""
        rows, index = self._rtt_ms.values(), self._index
        count = sum(map(len, rows))
        owners = [index[first] for first in self._rtt_ms]
        first = np.repeat(np.array(owners, dtype=np.intp), [len(row) for row in rows])
        names = chain.from_iterable(rows)
        second = np.fromiter((index[name] for name in names), dtype=np.intp, count=count)
        times = chain.from_iterable(row.values() for row in rows)
        return first, second, np.fromiter(times, dtype=np.float64, count=count) / 2
