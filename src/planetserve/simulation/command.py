"""The command `planetserve simulate`: its flags, progress, and the table or JSON it prints."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from planetserve import cli
from planetserve.config import LOG_LEVELS
from planetserve.errors import ConfigError

if TYPE_CHECKING:
    from planetserve.simulation.scenario import LoadedScenario
    from planetserve.simulation.summary import Summary

PROG = "python -m planetserve.simulation"

USAGE = "--scenario NAME|FILE [--optimizers NAME...] [--seeds N] [more flags]"

DESCRIPTION = """\
Simulate a swarm under load: many users whose clients choose chains with the optimisers named, on
servers that batch, links that delay and machines that come and go. Shows what users would see.
Every optimiser gets the same machines, requests and departures for the same seed.
"""

EXAMPLES = """examples:
  how much choosing chains is worth on the 14 machines of Petals' test in the real world:
    planetserve simulate --scenario city_14

  what your own optimiser does with twice the requests, for a program to read:
    planetserve simulate --scenario continent_100 --optimizers shortest_path yours:option=3 \\
        --requests_per_s 1.2 --json

An optimiser's name may be followed by its options, and by
  +moves    running sessions look for better chains, as those of the real client do by default
  +folded   load counts as time per block instead of as a wait per visit, so that optimisers see it
            that know of no waits; without it Petals' see what Petals announces, speeds without load
  +informed clients know all loads of the moment, which no real one can

The scenarios home_4, city_14, continent_100, planet_1000 and planet_10000 are in configs/scenarios/
of the source code; a file of your own has the same form. docs/chain_optimization.md explains the
numbers.
"""

GROUPS = {
    "what to simulate": ("scenario", "optimizers", "seeds", "first_seed", "duration_s",
                         "requests_per_s"),
    "output": ("json", "log_level"),
}  # fmt: skip

JSON_VERSION = 1
OPTIMIZERS = ("random", "petals_min_latency", "shortest_path", "shortest_path+moves")
_MANY_SERVERS = 1000
"""Number of servers above which placing takes seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateConfig:
    """What to simulate, and how to show it.

    Raises:
        ConfigError: a value is out of range.
    """

    scenario: str | None = None
    """Name of a scenario, or a YAML file of one."""
    optimizers: tuple[str, ...] = ()
    """Optimisers to compare, each with the first one; by default random, petals_min_latency,
    shortest_path and shortest_path+moves."""
    seeds: int = 3
    """Number of runs, each with its own seed; confidence intervals are over seeds."""
    first_seed: int = 0
    """The seeds are this number and those that follow it."""
    duration_s: float | None = None
    """Simulated seconds during which requests arrive, instead of the scenario's; the warm-up is
    scaled with it."""
    requests_per_s: float | None = None
    """Requests per second of all users, instead of the scenario's."""
    json: bool = False
    """Print one JSON document instead of a table."""
    log_level: str = "warning"
    """What is logged to stderr: debug, info, warning or error."""

    def __post_init__(self) -> None:
        if self.scenario is None:
            raise ConfigError("nothing to simulate: give --scenario NAME or a YAML file of one")
        if not 1 <= self.seeds <= 1000 or not 0 <= self.first_seed < 2**31:
            raise ConfigError("give 1 to 1000 seeds, and a first one from 0 to 2147483647")
        for name in ("duration_s", "requests_per_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"--{name} must be positive, not {value:g}")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(
                f"log_level={self.log_level!r} is unknown; choose one of: {', '.join(LOG_LEVELS)}"
            )


def parse(argv: Sequence[str] | None = None) -> SimulateConfig:
    """Read the command line.

    Raises:
        ConfigError: a flag, the YAML file or a combination of settings is wrong.
    """
    parser = cli.Parser(PROG, USAGE, DESCRIPTION, EXAMPLES)
    cli.add_fields(parser, SimulateConfig, GROUPS)
    return cli.parse_config(parser, SimulateConfig, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Simulate and show.

    Raises:
        ConfigError: the command line or the scenario is wrong, or simpy is not installed.
    """
    config = parse(argv)
    cli.setup_logging(config.log_level)
    if importlib.util.find_spec("simpy") is None:
        raise ConfigError("simulations need simpy: pip install 'planetserve[simulation]'")
    from planetserve.simulation.report import as_document, as_text
    from planetserve.simulation.scenario import load_scenario

    loaded = load_scenario(config.scenario or "")
    workload = loaded.scenario.workload
    changes: dict[str, float] = {}
    if config.duration_s is not None:
        scale = config.duration_s / workload.duration_s
        changes = {"duration_s": config.duration_s, "warmup_s": scale * workload.warmup_s}
    if config.requests_per_s is not None:
        changes["requests_per_s"] = config.requests_per_s
    loaded = loaded.with_workload(**changes)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    found = simulate(loaded, config.optimizers or OPTIMIZERS, seeds, _Progress())
    if config.json:
        document = {"version": JSON_VERSION, **as_document(loaded, seeds, found)}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
    else:
        sys.stdout.write(as_text(loaded, found))
    sys.stdout.flush()


def simulate(
    loaded: LoadedScenario,
    optimizers: Sequence[str],
    seeds: Sequence[int],
    progress: Callable[[str, float], None] = lambda _what, _share: None,
) -> dict[str, list[Summary]]:
    """Every optimizer on every seed.

    Args:
        loaded: the scenario.
        optimizers: as `Policy.parse` reads them.
        seeds: of the runs.
        progress: called now and then with the name of the run and the fraction that is done.

    Returns:
        The summaries of each optimizer, in the order of the seeds.

    Raises:
        ConfigError: an optimizer is unknown, or the machines cannot hold the model.
    """
    from planetserve.simulation.client import Policy
    from planetserve.simulation.run import Simulation
    from planetserve.simulation.summary import Objective, summarise
    from planetserve.simulation.world import World

    policies = {text: Policy.parse(text) for text in optimizers}
    found: dict[str, list[Summary]] = {text: [] for text in policies}
    for number, seed in enumerate(seeds, start=1):
        where = f"{loaded.scenario.name}, seed {number} of {len(seeds)}"
        if loaded.scenario.machines.count >= _MANY_SERVERS:
            progress(f"{where}, placing {loaded.scenario.machines.count} servers", 0.0)
        world = World(loaded, seed)
        objective = Objective(world)
        for text, policy in policies.items():
            result = Simulation(world, policy, partial(progress, f"{where}, {text}")).run()
            found[text].append(summarise(world, objective, result))
    return found


class _Progress:
    """One line on stderr that is written over on a terminal, else one per run."""

    def __init__(self) -> None:
        self._shown_s = 0.0
        self._shown = ""

    def __call__(self, what: str, share: float) -> None:
        now_s = time.monotonic()
        if sys.stderr.isatty():
            if now_s - self._shown_s > 0.2 or share == 1:
                end = "\n" if share == 1 else ""
                sys.stderr.write(f"\r\033[K{what}: {share:.0%}{end}")
                self._shown_s = now_s
        elif what != self._shown:
            sys.stderr.write(f"{what}\n")
            self._shown = what
        sys.stderr.flush()
