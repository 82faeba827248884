"""The data that a scenario and a seed fix before the simulation starts: machines, users, requests.

The same seed gives every optimizer the same machines, spans, departures and arrivals. Each of these
draws from a random stream of its own, so that changing one leaves the others as they were.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planetserve.errors import ConfigError
from planetserve.routing.arrays import FloatArray
from planetserve.routing.placement import PLACEMENTS, Placement
from planetserve.routing.snapshot import ServerPoint
from planetserve.simulation.scenario import LoadedScenario, Model, Scenario, Workload
from planetserve.types import BlockSpan

_BYTES_PER_MBIT = 125_000.0


@dataclass(frozen=True, slots=True)
class Machine:
    """A server without its span."""

    id: str
    gpu: str
    decode_ms_per_block: float
    tokens_per_s_per_block: float
    network_bytes_per_s: float
    num_blocks: int


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and, unknown to its client, how many tokens the answer will have."""

    arrival_s: float
    client: int
    prompt_tokens: int
    output_tokens: int


class Links:
    """Half round-trip times between nodes: first the servers, then the clients."""

    def __init__(self, city_rtt_ms: FloatArray, city: list[int], last_mile_ms: list[float]):
        self._city_rtt_ms = city_rtt_ms
        self._rows = city_rtt_ms.tolist()
        self._city = city
        self._last_mile_ms = last_mile_ms
        self._city_array = np.array(city)
        self._last_mile_array = np.array(last_mile_ms)

    def half_ms(self, one: int, other: int) -> float:
        """Between two nodes."""
        if one == other:
            return 0.0
        between: float = self._rows[self._city[one]][self._city[other]]
        return (between + (self._last_mile_ms[one] + self._last_mile_ms[other])) / 2

    def matrix(self, nodes: list[int]) -> FloatArray:
        """Between any two of `nodes`, diagonal 0."""
        cities = self._city_array[nodes]
        half: FloatArray = self._city_rtt_ms[np.ix_(cities, cities)]
        own = self._last_mile_array[nodes]
        half += own[:, None] + own  # in this order, so that both halves are equal to the last bit
        half /= 2
        np.fill_diagonal(half, 0.0)
        return half

    def column(self, node: int, count: int) -> FloatArray:
        """Between `node` and each of the first `count` nodes."""
        between = self._city_rtt_ms[self._city[node], self._city_array[:count]]
        half: FloatArray = between + (self._last_mile_ms[node] + self._last_mile_array[:count])
        return half / 2


class World:
    """A scenario with its random draws.

    Raises:
        ConfigError: a card cannot hold a single block, or the machines do not cover the model.
    """

    def __init__(self, loaded: LoadedScenario, seed: int):
        scenario = loaded.scenario
        streams = np.random.SeedSequence(seed).spawn(5)
        cards, places, spans, users, arrivals = map(np.random.default_rng, streams)
        self.scenario = scenario
        self.seed = seed
        self.machines = _machines(loaded, cards)
        self.num_clients = scenario.workload.clients
        self.links = _links(loaded, places, users)
        self.spans = _place(scenario, self.machines, spans)
        self.requests = _requests(scenario.workload, arrivals)

    def client_node(self, client: int) -> int:
        """The client's number in `links`."""
        return len(self.machines) + client


def _machines(loaded: LoadedScenario, rng: np.random.Generator) -> list[Machine]:
    scenario, table = loaded.scenario, loaded.gpus
    machines, model = scenario.machines, scenario.model
    mix = table.mixes[machines.mix]
    names = list(mix)
    if machines.exact_mix:
        drawn = [name for name in names for _ in range(round(mix[name]))]
        if not machines.spans:
            drawn = [drawn[i] for i in rng.permutation(len(drawn))]
    else:
        weights = np.array([mix[name] for name in names])
        drawn = rng.choice(names, machines.count, p=weights / weights.sum()).tolist()
    low, high = scenario.network.bandwidth_mbit_s
    mbit_s = np.exp(rng.uniform(np.log(low), np.log(high), machines.count)).tolist()
    result = []
    for number, (name, rate) in enumerate(zip(drawn, mbit_s, strict=True)):
        gpu = table.gpus[name]
        decode_ms = 1000.0 * model.block_gb / (gpu.gb_per_s * table.bandwidth_efficiency)
        result.append(
            Machine(
                id=f"s{number}",
                gpu=name,
                decode_ms_per_block=decode_ms,
                tokens_per_s_per_block=table.batching_gain * 1000.0 / decode_ms,
                network_bytes_per_s=rate * _BYTES_PER_MBIT,
                num_blocks=_blocks_that_fit(model, gpu.vram_gib, scenario),
            )
        )
    return result


def _blocks_that_fit(model: Model, vram_gib: float, scenario: Scenario) -> int:
    room = vram_gib * 2**30 * scenario.machines.vram_share
    block = model.block_gb * 1e9 + scenario.machines.cache_tokens * model.kv_bytes_per_token
    fits = int(room / block)
    if fits < 1:
        raise ConfigError(f"{vram_gib:g} GiB hold no block of {model.name}; take it from the mix")
    return min(fits, model.num_blocks)


def _links(
    loaded: LoadedScenario, places: np.random.Generator, users: np.random.Generator
) -> Links:
    scenario = loaded.scenario
    network = scenario.network
    rtt_ms, used = np.zeros((1, 1)), [0]
    if loaded.cities is not None:
        rows = loaded.cities.rtt_ms
        names = list(rows)
        rtt_ms = np.zeros((len(names), len(names)))
        for i, row in enumerate(rows.values()):
            rtt_ms[i, : i + 1] = row
            rtt_ms[: i + 1, i] = row
        used = [names.index(city) for city in network.cities or names]
    num_servers, num_clients = scenario.machines.count, scenario.workload.clients
    low, high = network.last_mile_ms
    # In turn, so that every city has its share; the place of each machine is still random.
    city = [used[i % len(used)] for i in range(num_servers)]
    city = [city[i] for i in places.permutation(num_servers)]
    home = [used[i % len(used)] for i in range(num_clients)]
    last_mile = places.uniform(low, high, num_servers).tolist()
    last_mile += users.uniform(low, high, num_clients).tolist()
    return Links(rtt_ms, city + home, last_mile)


def _place(
    scenario: Scenario, machines: list[Machine], rng: np.random.Generator
) -> list[BlockSpan]:
    """The spans of all machines, which join one after the other in random order."""
    if scenario.machines.spans:
        return [BlockSpan.parse(text) for text in scenario.machines.spans]
    num_blocks = scenario.model.num_blocks
    placement = PLACEMENTS.create(scenario.machines.placement)
    covered = np.zeros(num_blocks)
    spans: dict[int, BlockSpan] = {}
    for number in rng.permutation(len(machines)).tolist():
        span = join(placement, machines[number], covered)
        covered[span.start : span.end] += machines[number].tokens_per_s_per_block / len(span)
        spans[number] = span
    if not covered.all():
        raise ConfigError(
            f"{scenario.name}: the machines hold no block {int(np.argmin(covered))}; add some"
        )
    return [spans[number] for number in range(len(machines))]


def join(placement: Placement, machine: Machine, covered: FloatArray) -> BlockSpan:
    """The span that the machine takes when the servers of each block make `covered[block]`
    tokens/s.

    One server per block represents all that hold it: placements use sums per block.
    """
    others = [
        ServerPoint(f"block {block}", block, block + 1, 0.0, rate, 1.0, 0)
        for block, rate in enumerate(covered.tolist())
        if rate > 0
    ]
    return placement.choose_span(
        others, len(covered), machine.num_blocks, machine.tokens_per_s_per_block
    )


def _requests(workload: Workload, rng: np.random.Generator) -> list[Request]:
    expected = workload.requests_per_s * workload.duration_s
    gaps = rng.exponential(1 / workload.requests_per_s, int(expected + 10 * expected**0.5 + 10))
    arrivals = np.cumsum(gaps)
    arrivals = arrivals[arrivals < workload.duration_s]
    count = len(arrivals)
    clients = rng.integers(workload.clients, size=count)
    sigma = workload.sigma
    prompts = _lengths(rng, count, workload.prompt_tokens, sigma, workload.max_prompt_tokens)
    outputs = _lengths(rng, count, workload.output_tokens, sigma, workload.max_output_tokens)
    columns = (arrivals, clients, prompts, outputs)
    return [Request(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _lengths(
    rng: np.random.Generator, count: int, mean: float, sigma: float, longest: int
) -> NDArray[np.int64]:
    """Lognormal with this mean, rounded, cut to `1..longest`, which lowers the mean a little."""
    drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(drawn), 1, longest).astype(np.int64)
