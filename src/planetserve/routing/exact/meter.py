"""Which limits are counted along a path, and where in its row of counts each one stands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from planetserve.routing.exact.bounds import Counts, Limits, Used
from planetserve.routing.problem import BoolArray, IntArray
from planetserve.routing.snapshot import FloatArray


@dataclass(frozen=True, slots=True)
class Meter:
    """Columns of a count matrix: first one per server whose blocks are counted, then visits."""

    block_slot: IntArray
    """`[n]` column of the server's blocks, or -1."""
    hop_slot: IntArray
    """`[n]` column of the server's visits, or -1."""
    limit: Counts
    """`[columns]`"""
    price: FloatArray
    """`[columns]` what one unit costs in the priced problem."""

    @classmethod
    def of(
        cls,
        limits: Limits,
        blocks_of: Iterable[int],
        hops_of: Iterable[int],
        block_price: FloatArray | None = None,
        hop_price: FloatArray | None = None,
    ) -> Meter:
        """Count the blocks of some servers and the visits of some."""
        n = len(limits.blocks)
        free = np.zeros(n)
        by_block = np.array(sorted(blocks_of), dtype=np.intp)
        by_hop = np.array(sorted(hops_of), dtype=np.intp)
        block_slot, hop_slot = np.full(n, -1, dtype=np.intp), np.full(n, -1, dtype=np.intp)
        block_slot[by_block] = np.arange(len(by_block))
        hop_slot[by_hop] = len(by_block) + np.arange(len(by_hop))
        return cls(
            block_slot,
            hop_slot,
            np.concatenate([limits.blocks[by_block], limits.hops[by_hop]]),
            np.concatenate(
                [
                    (free if block_price is None else block_price)[by_block],
                    (free if hop_price is None else hop_price)[by_hop],
                ]
            ),
        )

    def may_enter(self, used: Used, servers: IntArray) -> BoolArray:
        """`[labels, servers]`: whether a label that has used so much may visit the server."""
        allowed = np.ones((len(used), len(servers)), dtype=bool)
        for slots in (self.block_slot[servers], self.hop_slot[servers]):
            counted = np.flatnonzero(slots >= 0)
            columns = slots[counted]
            allowed[:, counted] &= used[:, columns] < self.limit[columns]
        return allowed

    def charge_visit(self, used: Used, servers: IntArray) -> None:
        """Count, in place, one visit of `servers[i]` in row `i`."""
        slots = self.hop_slot[servers]
        rows = np.flatnonzero(slots >= 0)
        used[rows, slots[rows]] += 1

    def charge_blocks(self, used: Used, servers: IntArray, blocks: Used) -> None:
        """Count, in place, `blocks[i]` blocks on `servers[i]` in row `i`."""
        slots = self.block_slot[servers]
        rows = np.flatnonzero(slots >= 0)
        used[rows, slots[rows]] += blocks[rows]

    def blocks_left(self, used: Used, servers: IntArray, limits: Limits) -> Counts:
        """Blocks that row `i` may still run on `servers[i]`; the limit itself if not counted."""
        left = limits.blocks[servers]
        slots = self.block_slot[servers]
        rows = np.flatnonzero(slots >= 0)
        left[rows] -= used[rows, slots[rows]]
        return left
