"""Scenario files: machines, their places, and the load. Strict YAML, values in stated units.

Tables that several scenarios share, round-trip times between cities and graphics cards, are files
of their own and are named relative to the scenario's.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from planetserve.config import load_yaml
from planetserve.errors import ConfigError
from planetserve.routing.placement import PLACEMENTS
from planetserve.types import BlockSpan

_FOLDERS = (
    Path("configs", "scenarios"),
    Path(__file__).resolve().parents[3] / "configs" / "scenarios",
)
"""Folders of named scenarios: below the current directory, and in this checkout."""
MAX_SERVERS = 100_000
MAX_REQUESTS = 1_000_000

Text = Annotated[str, Field(min_length=1, max_length=4096)]
Name = Annotated[str, Field(min_length=1, max_length=64)]
Positive = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MAX_SERVERS)]
# YAML has lists only.
Range = Annotated[tuple[NotNegative, NotNegative], Field(strict=False)]


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


T = TypeVar("T", bound=_Table)


class Model(_Table):
    """The model that the swarm serves."""

    name: Name
    num_blocks: Annotated[int, Field(ge=1, le=4096)]
    block_gb: Positive
    """Weights of one block, in 1e9 bytes, as the servers hold them."""
    kv_bytes_per_token: Positive
    """Keys and values of one token in one block."""
    activation_bytes_per_token: Positive


class Machines(_Table):
    """The servers."""

    count: Count
    gpus: Name
    """File of graphics cards."""
    mix: Name
    """Name of a mix in that file: counts or probabilities of the cards."""
    exact_mix: bool = False
    """Whether the mix gives counts of machines; if not, it gives the probability of each card."""
    placement: Name = "balance"
    """Name of the placement of blocks; servers join one after the other."""
    vram_share: Share = 0.9
    """Fraction of a card's memory for weights and KV cache."""
    cache_tokens: Annotated[int, Field(ge=16, le=10**9)] = 16384
    """KV cache of a server; `--attn_cache_tokens`."""
    spans: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """With placement `fixed`: START:END of each server in turn."""


class Network(_Table):
    """Where machines are and how they are connected."""

    city_rtt: Name | None = None
    """File of round-trip times between cities; without one, all machines are at one site."""
    cities: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Cities of that file that have machines, equally many each; empty: all of them."""
    last_mile_ms: Range = (0.0, 0.0)
    """Round-trip time of a machine to its city, uniformly distributed; each end of a link adds its
    own."""
    bandwidth_mbit_s: Range
    """Uplink of a machine, log-uniformly distributed."""
    client_mbit_s: Positive = 1000.0
    """Uplink of a client."""
    hop_overhead_ms: NotNegative
    """Time of each visit to a server besides computing and sending."""


class Workload(_Table):
    """Requests: a Poisson stream, shared evenly by the clients; lengths are lognormal."""

    clients: Count
    requests_per_s: Positive
    warmup_s: NotNegative
    """Requests that arrive earlier are served but not counted."""
    duration_s: Positive
    """Requests arrive up to this time; all are served to their end."""
    prompt_tokens: Positive
    """Mean."""
    output_tokens: Positive
    """Mean."""
    sigma: NotNegative = 1.0
    """Standard deviation of the logarithm of both lengths."""
    max_prompt_tokens: Annotated[int, Field(ge=1, le=10**6)] = 1024
    max_output_tokens: Annotated[int, Field(ge=1, le=10**6)] = 1024
    """Maximum tokens of an answer; a client leases as many, since it does not know when the answer
    will end."""
    patience_s: Positive = 120.0
    """Seconds without a chain after which a request fails."""

    @model_validator(mode="after")
    def _check(self) -> Workload:
        if self.warmup_s >= self.duration_s:
            raise ValueError("warmup_s must be shorter than duration_s")
        if self.requests_per_s * self.duration_s > MAX_REQUESTS:
            raise ValueError(f"more than {MAX_REQUESTS} requests; shorten duration_s")
        return self


class Churn(_Table):
    """Servers leave after an exponential time and come back after another one."""

    mean_up_s: Positive
    mean_down_s: Positive
    load_s: NotNegative = 60.0
    """Time to load a span."""
    graceful: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Fraction of the departures that are announced: sessions move between two tokens. In the
    others a machine falls silent and clients must notice."""
    drain_s: Positive = 30.0
    """How long a server that has announced its departure waits for its sessions to move."""


class Slo(_Table):
    """A request attains the objective if both hold; docs/chain_optimization.md has the reasons for
    the numbers."""

    token_scale: Positive = 2.0
    """Maximum mean time per token as a multiple of that of the fastest chain of an idle swarm."""
    first_token_s: Positive = 10.0
    """Maximum time to the first token."""


class Scenario(_Table):
    """One scenario file."""

    name: Name
    description: Text
    sources: Annotated[tuple[Text, ...], Field(strict=False, max_length=32)] = ()
    """Sources of its figures."""
    model: Model
    machines: Machines
    network: Network
    workload: Workload
    churn: Churn | None = None
    slo: Slo = Slo()


class Gpu(_Table):
    """One graphics card."""

    gb_per_s: Positive
    """Memory bandwidth."""
    vram_gib: Positive


class GpuTable(_Table):
    """Cards, mixes of them, and factors from data sheets to speeds."""

    sources: Annotated[tuple[Text, ...], Field(strict=False, max_length=32)] = ()
    bandwidth_efficiency: Share
    """Fraction of the memory bandwidth at which a decode step reads a block's weights."""
    batching_gain: Annotated[float, Field(ge=1, le=1e6)]
    """Ratio of tokens per second in large batches to those of one sequence."""
    gpus: dict[Name, Gpu]
    mixes: dict[Name, dict[Name, Positive]]

    @model_validator(mode="after")
    def _check(self) -> GpuTable:
        for name, mix in self.mixes.items():
            unknown = sorted(set(mix) - set(self.gpus))
            if unknown or not mix:
                raise ValueError(f"mix {name} is empty or names an unknown card {unknown}")
        return self


class CityTable(_Table):
    """Round-trip times in milliseconds; row i holds those to cities 0..i."""

    sources: Annotated[tuple[Text, ...], Field(strict=False, max_length=32)] = ()
    rtt_ms: dict[Name, list[NotNegative]]

    @model_validator(mode="after")
    def _check(self) -> CityTable:
        for place, (city, row) in enumerate(self.rtt_ms.items(), start=1):
            if len(row) != place:
                raise ValueError(f"the row of {city} must hold {place} numbers, not {len(row)}")
        return self


@dataclass(frozen=True, slots=True)
class LoadedScenario:
    """A scenario with the tables that it names."""

    scenario: Scenario
    gpus: GpuTable
    cities: CityTable | None

    def with_workload(self, **changes: float) -> LoadedScenario:
        """The same under another load.

        Raises:
            ConfigError: a value is out of range.
        """
        workload = {**self.scenario.workload.model_dump(), **changes}
        scenario = {**self.scenario.model_dump(), "workload": workload}
        return replace(self, scenario=_validated(Scenario, scenario, self.scenario.name))


def scenario_names() -> tuple[str, ...]:
    """The scenarios that come with the source code."""
    return tuple(sorted({path.stem for folder in _FOLDERS for path in folder.glob("*.yaml")}))


def load_scenario(name_or_file: str) -> LoadedScenario:
    """Read one of `scenario_names` or a file.

    Raises:
        ConfigError: a file does not exist, has another form, or does not fit another file.
    """
    path = _find(name_or_file)
    scenario = _load(Scenario, path)
    machines, network = scenario.machines, scenario.network
    gpus = _load(GpuTable, path.parent / machines.gpus)
    cities = _load(CityTable, path.parent / network.city_rtt) if network.city_rtt else None
    problem = (
        _mix_problem(machines, gpus)
        or _span_problem(machines, scenario.model)
        or _city_problem(network, cities)
    )
    if problem:
        raise ConfigError(f"{path}: {problem}")
    PLACEMENTS.check(machines.placement)
    return LoadedScenario(scenario, gpus, cities)


def _find(text: str) -> Path:
    if text.endswith((".yaml", ".yml")) or os.sep in text:
        return Path(text)
    for folder in _FOLDERS:
        if (folder / f"{text}.yaml").is_file():
            return folder / f"{text}.yaml"
    names = ", ".join(scenario_names()) or "none found; run in a checkout of the source code"
    raise ConfigError(f"no scenario {text[:80]!r}; give a .yaml file or one of: {names}")


def _mix_problem(machines: Machines, gpus: GpuTable) -> str | None:
    mix = gpus.mixes.get(machines.mix)
    if mix is None:
        choices = ", ".join(gpus.mixes)
        return f"no mix {machines.mix!r} in {machines.gpus}; choose one of: {choices}"
    counted = sum(mix.values())
    if machines.exact_mix and counted != machines.count:
        return f"mix {machines.mix!r} counts {counted:g} machines, not {machines.count}"
    return None


def _span_problem(machines: Machines, model: Model) -> str | None:
    if (machines.placement == "fixed") != bool(machines.spans):
        return "give spans with placement fixed, and only with it"
    if machines.spans and len(machines.spans) != machines.count:
        return f"{len(machines.spans)} spans for {machines.count} servers"
    for text in machines.spans:
        if BlockSpan.parse(text).end > model.num_blocks:
            return f"span {text} leaves the model, which has {model.num_blocks} blocks"
    return None


def _city_problem(network: Network, cities: CityTable | None) -> str | None:
    known = cities.rtt_ms if cities else {}
    for city in network.cities:
        if city not in known:
            return f"no city {city!r} in {network.city_rtt}"
    return None


def _load(kind: type[T], path: Path) -> T:
    return _validated(kind, load_yaml(path), str(path))


def _validated(kind: type[T], values: object, source: str) -> T:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{source}: {where}: {first['msg']}") from error
