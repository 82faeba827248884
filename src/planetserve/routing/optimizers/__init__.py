"""Chain optimisers by name; see `base.py` for what one must do. Listing them imports none."""

from __future__ import annotations

from planetserve.registry import Registry
from planetserve.routing.optimizers.base import ChainOptimizer, FrontOptimizer

OPTIMIZERS: Registry[ChainOptimizer] = Registry(
    "chain optimizer",
    "chain_optimizers",
    {
        "shortest_path": "planetserve.routing.optimizers.shortest_path:ShortestPath",
    },
)

__all__ = ["OPTIMIZERS", "ChainOptimizer", "FrontOptimizer"]
