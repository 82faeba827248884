"""NSGA-II by pymoo on the operators of this package (Deb et al., 2002). Imported only when used."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.crossover import Crossover
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair

from planetserve.routing.arrays import FloatArray, IntArray
from planetserve.routing.evolution.initial_population import good_chains
from planetserve.routing.evolution.objectives import evaluate
from planetserve.routing.evolution.operators import Operators
from planetserve.routing.problem import RoutingProblem

_WARM_SHARE = 0.75
"""Fraction of the time limit that the first population may take."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of one search."""

    objectives: int
    population: int
    generations: int
    seed: int
    warm_start: bool
    time_limit_s: float | None


def evolve(problem: RoutingProblem, settings: Settings) -> tuple[IntArray, FloatArray]:
    """Run NSGA-II; every individual it ever evaluated, without repetitions, and its objectives."""
    started_s = time.perf_counter()
    rng = np.random.default_rng(settings.seed)
    operators = Operators(problem)
    first = operators.random(settings.population, rng)
    if settings.warm_start:
        good = good_chains(
            problem, settings.objectives, rng, _WARM_SHARE * (settings.time_limit_s or math.inf)
        )
        size = max(settings.population, len(good) + settings.population // 2)
        first = np.concatenate([good, first])[:size]
    model = _Model(problem, settings.objectives)
    algorithm = NSGA2(
        pop_size=settings.population,
        sampling=first,
        crossover=_Crossover(operators, rng),
        mutation=_Mutation(operators, rng),
        repair=_Repair(operators, rng),
        eliminate_duplicates=_SameHosts(),
    )
    # On a small swarm every chain is soon known, and pymoo would look for new ones 100 times a
    # generation. This ends the search when there are none.
    algorithm.mating.n_max_iterations = 3
    algorithm.setup(model, termination=("n_gen", settings.generations), seed=settings.seed)
    while algorithm.has_next():
        algorithm.next()
        limit_s = settings.time_limit_s
        if limit_s is not None and time.perf_counter() - started_s > limit_s:
            break
    hosts, objectives = np.concatenate(model.hosts), np.concatenate(model.objectives)
    _, kept = np.unique(hosts, axis=0, return_index=True)
    return hosts[kept], objectives[kept]


class _Model(Problem):  # type: ignore[misc]
    """pymoo's view of a routing problem; remembers what it evaluates."""

    def __init__(self, problem: RoutingProblem, num_objectives: int):
        super().__init__(
            n_var=problem.num_blocks,
            n_obj=num_objectives,
            xl=0,
            xu=problem.num_servers - 1,
            vtype=int,
        )
        self._problem = problem
        self.hosts: list[IntArray] = []
        self.objectives: list[FloatArray] = []

    def _evaluate(self, x: IntArray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        hosts = x.astype(np.intp)
        out["F"] = evaluate(self._problem, hosts, self.n_obj)
        self.hosts.append(hosts)
        self.objectives.append(out["F"])


class _Crossover(Crossover):  # type: ignore[misc]
    def __init__(self, operators: Operators, rng: np.random.Generator):
        super().__init__(n_parents=2, n_offsprings=2, prob=0.9)
        self._operators, self._rng = operators, rng

    def _do(self, problem: Problem, x: IntArray, *args: Any, **kwargs: Any) -> IntArray:
        return np.stack(self._operators.cross(x[0], x[1], self._rng))


class _Mutation(Mutation):  # type: ignore[misc]
    def __init__(self, operators: Operators, rng: np.random.Generator):
        super().__init__(prob=0.9)
        self._operators, self._rng = operators, rng

    def _do(self, problem: Problem, x: IntArray, *args: Any, **kwargs: Any) -> IntArray:
        return self._operators.mutate(x, self._rng)


class _Repair(Repair):  # type: ignore[misc]
    def __init__(self, operators: Operators, rng: np.random.Generator):
        super().__init__()
        self._operators, self._rng = operators, rng

    def _do(self, problem: Problem, x: IntArray, **kwargs: Any) -> IntArray:
        return self._operators.repair(x.astype(np.intp), self._rng)


class _SameHosts(DuplicateElimination):  # type: ignore[misc]
    """Equal rows are duplicates; by hashing, where pymoo's default measures all distances."""

    def _do(self, pop: Any, other: Any, is_duplicate: Any) -> Any:
        seen = set() if other is None else {row.tobytes() for row in other.get("X")}
        for i, row in enumerate(pop.get("X")):
            key = row.tobytes()
            is_duplicate[i] = is_duplicate[i] or key in seen
            if other is None:
                seen.add(key)
        return is_duplicate
