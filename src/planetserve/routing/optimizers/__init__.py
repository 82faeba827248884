"""Chain optimisers by name; see `base.py` for what one must do. Listing them imports none."""

from __future__ import annotations

from planetserve.config.old_names import SHORTEST_PATH
from planetserve.registry import Registry
from planetserve.routing.optimizers.base import ChainOptimizer, FrontOptimizer

_HERE = "planetserve.routing.optimizers"

OPTIMIZERS: Registry[ChainOptimizer] = Registry(
    "chain optimizer",
    "chain_optimizers",
    {
        "greedy": f"{_HERE}.greedy:Greedy",
        "latency_throughput_tradeoff": f"{_HERE}.nsga2:LatencyThroughputTradeoff",
        "nsga2": f"{_HERE}.nsga2:Nsga2",
        "pareto_exact": f"{_HERE}.pareto_exact:ParetoExact",
        "petals_max_throughput": f"{_HERE}.petals:PetalsMaxThroughput",
        "petals_min_latency": f"{_HERE}.petals:PetalsMinLatency",
        "random": f"{_HERE}.random_chain:RandomChain",
        "shortest_path": f"{_HERE}.shortest_path:ShortestPath",
    },
)


def create_optimizer(
    text: str, *, cost_jitter: float, load_prior: float, seed: int
) -> ChainOptimizer:
    """The optimizer that a client's `chain_optimizer` names. It gets these options if it has them
    and `text` does not set them."""
    offered = {"cost_jitter": cost_jitter, "load_prior": load_prior, "seed": seed}
    return OPTIMIZERS.create_from(text, **SHORTEST_PATH.with_old(offered))


__all__ = ["OPTIMIZERS", "ChainOptimizer", "FrontOptimizer", "create_optimizer"]
