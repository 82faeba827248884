"""Summaries: the numbers of one run, and mean and confidence interval over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from planetserve.routing.optimizers import OPTIMIZERS
from planetserve.routing.request import ChainRequest
from planetserve.simulation.client import idle_directory, idle_snapshot
from planetserve.simulation.run import RunResult
from planetserve.simulation.session import Outcome, Record
from planetserve.simulation.world import World

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
         2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060,
         2.056, 2.052, 2.048, 2.045)  # fmt: skip
"""Student's t for 95 % by degrees of freedom, from 1."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One run. Requests that arrive during warm-up do not count; times are of finished ones."""

    requests: int
    failed: int
    """Number of requests that found no chain for too long."""
    idle_ms: float
    """Time per token of the fastest chain of an idle swarm, on average over the users who asked: no
    policy gets below it."""
    token_mean_ms: float
    """Mean time from one token to the next, over all tokens."""
    token_p50_ms: float
    token_p99_ms: float
    normalised_mean_ms: float
    """From the arrival of a request to its last token, by output token, over requests: waiting for
    room and the first token count as well. What vLLM's paper reports (Kwon et al., SOSP 2023,
    section 6.1), after Orca's (Yu et al., OSDI 2022), whose figure is the median."""
    normalised_p50_ms: float
    first_token_mean_s: float
    """From the arrival of a request to its first token, over requests."""
    first_token_p50_s: float
    first_token_p99_s: float
    slo_share: float
    """Fraction of requests that attained the scenario's objective."""
    tokens_per_s: float
    """Output tokens of all users while requests arrive."""
    jumps: int
    """Number of replacements of servers that were lost or leaving."""
    moves: int
    """Number of moves of sessions to a better chain."""
    replayed_tokens: int
    """Tokens computed again after either, summed over servers."""
    refusals: int
    """Number of hops that had no room when they were asked."""
    departures: int
    """Number of departures of servers, in the whole run."""
    busy_share: float
    """Fraction of the time that a server computed, averaged over servers."""
    tokens_per_tick: float
    """Tokens that share one pass of a server, prompts included."""

    def values(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


class Objective:
    """Whether a request was served well: its first token came in time, and the others on average at
    most `token_scale` times as slowly as on the fastest chain of an idle swarm."""

    def __init__(self, world: World):
        self._world = world
        self._slo = world.scenario.slo
        self._idle = idle_directory(world)
        self._best_ms: dict[int, float] = {}

    def is_attained(self, record: Record) -> bool:
        """By a request that has ended."""
        if record.outcome is not Outcome.DONE or record.first_token_s > self._slo.first_token_s:
            return False
        if not record.gaps_ms:
            return True
        allowed_ms = self._slo.token_scale * self.best_ms(record.request.client)
        return statistics.fmean(record.gaps_ms) <= allowed_ms

    def best_ms(self, client: int) -> float:
        """Time per token of the fastest chain of an idle swarm for this client."""
        if client not in self._best_ms:
            snapshot = idle_snapshot(self._world, client, self._idle)
            chain = OPTIMIZERS.create("shortest_path").plan(snapshot, ChainRequest())
            self._best_ms[client] = chain.latency_ms
        return self._best_ms[client]


def summarise(world: World, objective: Objective, result: RunResult) -> Summary:
    """The numbers of one run on `world`."""
    workload = world.scenario.workload
    counted = [r for r in result.records if r.request.arrival_s >= workload.warmup_s]
    done = [record for record in counted if record.outcome is Outcome.DONE]
    gaps_ms = _array([gap for record in done for gap in record.gaps_ms])
    first_s = _array([record.first_token_s for record in done])
    normalised_ms = _array([record.normalised_ms for record in done])
    return Summary(
        requests=len(counted),
        failed=len(counted) - len(done),
        idle_ms=float(_array([objective.best_ms(r.request.client) for r in counted]).mean()),
        token_mean_ms=float(gaps_ms.mean()),
        token_p50_ms=float(np.percentile(gaps_ms, 50)),
        token_p99_ms=float(np.percentile(gaps_ms, 99)),
        normalised_mean_ms=float(normalised_ms.mean()),
        normalised_p50_ms=float(np.percentile(normalised_ms, 50)),
        first_token_mean_s=float(first_s.mean()),
        first_token_p50_s=float(np.percentile(first_s, 50)),
        first_token_p99_s=float(np.percentile(first_s, 99)),
        slo_share=sum(map(objective.is_attained, counted)) / max(1, len(counted)),
        tokens_per_s=result.tokens_in_window / (workload.duration_s - workload.warmup_s),
        jumps=sum(record.num_jumps for record in counted),
        moves=sum(record.num_moves for record in counted),
        replayed_tokens=sum(record.num_replayed for record in counted),
        refusals=sum(record.num_refusals for record in counted),
        departures=result.departures,
        busy_share=result.busy_share,
        tokens_per_tick=result.tokens_per_tick,
    )


def _array(values: Sequence[float]) -> np.ndarray:
    return np.array(values if values else [math.nan])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent values and half the width of its 95 % confidence interval (Student's t);
    of a single value, NaN."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    freedom = len(values) - 1
    t = _T_95[freedom - 1] if freedom <= len(_T_95) else 1.96
    return mean, t * statistics.stdev(values) / math.sqrt(len(values))
