"""Chains by NSGA-II: for the objectives that the exact front does not know.

Two objectives are latency and throughput, the third is reputation, the fourth price. With two
objectives the exact method is better; NSGA-II is offered there for comparison. With additive third
and fourth objectives there is no fast exact method. pymoo runs the search and is imported when an
optimiser is made, so that no plan waits for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import secrets
from dataclasses import replace

import numpy as np

from planetserve.errors import ConfigError
from planetserve.routing.cost import price, reputation
from planetserve.routing.front import pick_chain, undominated_rows
from planetserve.routing.optimizers.base import checked_seed
from planetserve.routing.problem import RoutingProblem
from planetserve.routing.request import ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import Chain


class Nsga2:
    """Evolves a front.

    Args:
        objectives: 2 (latency, throughput), 3 (and reputation) or 4 (and price).
        population: individuals per generation.
        generations: how many.
        seed: makes the outcome repeatable.
        warm_start: begin with chains that fast methods find, besides random ones.
        time_limit_s: seconds after which no further generation begins; the search for good first
            chains ends after three quarters of it. So a busy machine answers in time; an idle one
            finishes earlier. 0 sets no limit.

    Raises:
        ConfigError: an argument is out of range, or pymoo is not installed. When planning: more
            than two objectives, and a snapshot without reputations and prices.
    """

    def __init__(
        self,
        objectives: int = 2,
        population: int = 60,
        generations: int = 40,
        seed: int | None = 0,
        warm_start: bool = True,
        time_limit_s: float = 1.6,
    ):
        if objectives not in (2, 3, 4):
            raise ConfigError(f"objectives must be 2, 3 or 4, not {objectives!r}")
        if population < 4 or generations < 1:
            raise ConfigError("population must be at least 4 and generations at least 1")
        if not time_limit_s >= 0:
            raise ConfigError(f"time_limit_s must not be negative, not {time_limit_s!r}")
        if importlib.util.find_spec("pymoo") is None:
            raise ConfigError("nsga2 needs pymoo: pip install 'planetserve[nsga2]'")
        importlib.import_module("planetserve.routing.evolution")
        self._objectives = objectives
        self._population = population
        self._generations = generations
        self._seed = checked_seed(seed)
        self._warm_start = warm_start
        self._time_limit_s = time_limit_s or None

    def plan(self, snapshot: SwarmSnapshot, request: ChainRequest) -> Chain:
        return pick_chain(self.front(snapshot, request), request)

    def front(self, snapshot: SwarmSnapshot, request: ChainRequest) -> tuple[Chain, ...]:
        from planetserve.routing.evolution import Settings, evolve

        self._check_objectives(snapshot)
        problem = RoutingProblem.build(snapshot, request)
        settings = Settings(
            objectives=self._objectives,
            population=self._population,
            generations=self._generations,
            seed=secrets.randbelow(2**31) if self._seed is None else self._seed,
            warm_start=self._warm_start,
            time_limit_s=self._time_limit_s,
        )
        hosts, objectives = evolve(problem, settings)
        found = [problem.chain(hosts[i].tolist()) for i in undominated_rows(objectives)]
        # Costs added up in another order differ in the last digit, which decides between equals.
        exact = np.array([self._costs(snapshot, chain) for chain in found])
        return tuple(found[i] for i in undominated_rows(exact))

    def _check_objectives(self, snapshot: SwarmSnapshot) -> None:
        servers = snapshot.servers
        if self._objectives > 2 and all(s.reputation == 1 and s.price == 0 for s in servers):
            raise ConfigError(
                f"nsga2:objectives={self._objectives} needs servers' reputations or prices, which "
                "no live swarm announces yet; use objectives=2, or planetserve plan --snapshot "
                "with a file that has them"
            )

    def _costs(self, snapshot: SwarmSnapshot, chain: Chain) -> list[float]:
        costs = [chain.latency_ms, -chain.throughput_tokens_per_s]
        costs += [-reputation(snapshot, chain), price(snapshot, chain)]
        return costs[: self._objectives]


class LatencyThroughputTradeoff:
    """The mode that Hakim and Hasan (2025) proposed for Petals: NSGA-II's front, and a choice from
    it.

    Without a pick in the request, the chain with the least time for the expected prompt and output
    is taken when their lengths are known, and the knee of the front otherwise.

    Args:
        seed, population, generations: of the search, as for `Nsga2`.
    """

    def __init__(self, seed: int | None = 0, population: int = 60, generations: int = 40):
        self._nsga2 = Nsga2(2, population, generations, seed)

    def plan(self, snapshot: SwarmSnapshot, request: ChainRequest) -> Chain:
        if request.pick is None and request.prompt_tokens + request.output_tokens > 0:
            request = replace(request, pick="request")
        return pick_chain(self.front(snapshot, request), request)

    def front(self, snapshot: SwarmSnapshot, request: ChainRequest) -> tuple[Chain, ...]:
        return self._nsga2.front(snapshot, request)
