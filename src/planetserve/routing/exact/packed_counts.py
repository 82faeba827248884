"""The limits that are counted along a path, and the counts of many paths, packed for comparison.

Counts stand side by side in 64-bit words, each in a field one bit wider than its limit needs. The
spare bit makes comparing cheap: with the spare bits of `b` set, `b - a` borrows one of them exactly
where a count of `a` is greater, and fields do not disturb each other (Lamport, 1975).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planetserve.routing.arrays import BoolArray, IntArray
from planetserve.routing.run_graph import Counts, Limits

Used = NDArray[np.uint64]
"""`[paths, words]`: what each path has used of everything that is counted."""

_WORD_BITS = 64


@dataclass(frozen=True, slots=True)
class Fields:
    """Where the count of each server stands; `word` is -1 where nothing is counted."""

    word: IntArray
    shift: NDArray[np.uint64]
    mask: NDArray[np.uint64]
    limit: NDArray[np.uint64]

    def counted(self, servers: IntArray) -> IntArray:
        """Which of `servers` have a count."""
        return np.flatnonzero(self.word[servers] >= 0)

    def read(self, used: Used, rows: IntArray, servers: IntArray) -> NDArray[np.uint64]:
        """The count of `servers[i]` in path `rows[i]`; the two broadcast."""
        return (used[rows, self.word[servers]] >> self.shift[servers]) & self.mask[servers]

    def add(self, used: Used, servers: IntArray, amount: NDArray[np.uint64]) -> None:
        """Count, in place, `amount[i]` more for `servers[i]` in path `i`."""
        rows = self.counted(servers)
        which = servers[rows]
        used[rows, self.word[which]] += amount[rows] << self.shift[which]


@dataclass(frozen=True, slots=True)
class PackedCounts:
    """Counts of the blocks of some servers, and of the visits of some."""

    blocks: Fields
    hops: Fields
    guard: NDArray[np.uint64]
    """`[words]` the spare bits."""

    @classmethod
    def of(cls, limits: Limits, blocks_of: Iterable[int], hops_of: Iterable[int]) -> PackedCounts:
        """Count the blocks of some servers and the visits of some."""
        guard: list[int] = []
        free = _WORD_BITS
        made = []
        for most, which in ((limits.blocks, blocks_of), (limits.hops, hops_of)):
            n = len(most)
            fields = Fields(
                np.full(n, -1, dtype=np.intp), *(np.zeros(n, dtype=np.uint64) for _ in range(3))
            )
            for server in sorted(which):
                bits = int(most[server]).bit_length()
                if free + bits + 1 > _WORD_BITS:
                    guard.append(0)
                    free = 0
                fields.word[server] = len(guard) - 1
                fields.shift[server] = free
                fields.mask[server] = (1 << bits) - 1
                fields.limit[server] = most[server]
                guard[-1] |= 1 << (free + bits)
                free += bits + 1
            made.append(fields)
        return cls(made[0], made[1], np.array(guard, dtype=np.uint64))

    @classmethod
    def binding(cls, limits: Limits, legal: BoolArray) -> PackedCounts:
        """Count every limit that a chain through the blocks of `legal` could exceed.

        Args:
            legal: `[blocks, n]` whether the server may run the block.
        """
        visits = np.minimum(limits.blocks, (len(legal) + 1) // 2)
        return cls.of(
            limits,
            np.flatnonzero((limits.blocks > 0) & (limits.blocks < legal.sum(axis=0))),
            np.flatnonzero((limits.hops > 0) & (limits.hops < visits)),
        )

    def unused(self, paths: int) -> Used:
        """Counts of paths that have used nothing yet."""
        return np.zeros((paths, len(self.guard)), dtype=np.uint64)

    def may_enter(self, used: Used, servers: IntArray) -> BoolArray:
        """`[paths, servers]`: whether a path that has used so much may visit the server."""
        allowed = np.ones((len(used), len(servers)), dtype=bool)
        rows = np.arange(len(used))[:, None]
        for fields in (self.blocks, self.hops):
            columns = fields.counted(servers)
            which = servers[columns]
            allowed[:, columns] &= fields.read(used, rows, which) < fields.limit[which]
        return allowed

    def charge_visit(self, used: Used, servers: IntArray) -> None:
        """Count, in place, one visit of `servers[i]` in path `i`."""
        self.hops.add(used, servers, np.ones(len(servers), dtype=np.uint64))

    def charge_blocks(self, used: Used, servers: IntArray, blocks: IntArray) -> None:
        """Count, in place, `blocks[i]` blocks on `servers[i]` in path `i`."""
        self.blocks.add(used, servers, blocks.astype(np.uint64))

    def blocks_left(self, used: Used, servers: IntArray, limits: Limits) -> Counts:
        """Blocks that path `i` may still run on `servers[i]`; the limit itself if not counted."""
        left = limits.blocks[servers]
        rows = self.blocks.counted(servers)
        left[rows] -= self.blocks.read(used, rows, servers[rows]).astype(np.int64)
        return left

    def no_more(self, one: Used, other: Used) -> BoolArray:
        """`[one, other]`: whether a path of `one` has used no more of anything than of `other`."""
        fits = np.ones((len(one), len(other)), dtype=bool)
        for word, guard in enumerate(self.guard):
            difference = (other[:, word] | guard)[None, :] - one[:, word][:, None]
            fits &= (difference & guard) == guard
        return fits
