"""The command: its flags, and what happens in which order.

Everything that can go wrong does so before the first line of output, so that a failed plan leaves
stdout empty.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from planetserve import cli
from planetserve.client.planning.block_ranges import trusted_spans
from planetserve.config import LOG_LEVELS, TORCH_DTYPES, ClientConfig
from planetserve.errors import ConfigError, NoChainAvailable
from planetserve.plan.report import as_json, as_text
from planetserve.plan.solving import solve
from planetserve.routing.optimizers import OPTIMIZERS, FrontOptimizer
from planetserve.routing.request import PICKS, ChainRequest
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import CLIENT

PROG = "python -m planetserve.plan"

USAGE = "(--snapshot FILE | MODEL --initial_peers ADDRESS...) [--optimizer NAME] [more flags]"

DESCRIPTION = """\
Show which chain of servers a request would get, and how fast it would be: time per token for one
user, and tokens per second when the chain is kept full. No model is loaded.
"""

EXAMPLES = """examples:
  every chain between the fastest token and the most tokens per second, the best compromise marked:
    planetserve plan --snapshot swarm.json --optimizer pareto_exact

  the chain for requests of 2000 prompt and 300 output tokens, for a program to read:
    planetserve plan --snapshot swarm.json --optimizer pareto_exact --pick request:2000:300 --json

  with reputation and price as further objectives; an optimiser's options follow its name:
    planetserve plan --snapshot swarm.json --optimizer nsga2:objectives=4,population=100 --seed 1

  what a client would get on a live swarm now, kept as a file to plan on again:
    planetserve plan MODEL --initial_peers /ip4/203.0.113.5/tcp/31337/p2p/12D3Koo... \\
        --save_snapshot swarm.json --plot swarm.png

docs/plan.md describes the snapshot file and the JSON output.
"""

GROUPS = {
    "what to plan on": ("snapshot", "model", "initial_peers", "dht_prefix", "revision", "token",
                        "cache_dir", "torch_dtype", "daemon_startup_timeout",
                        "wait_for_blocks_timeout"),
    "how to plan": ("optimizer", "pick", "seed"),
    "what the chain must satisfy": ("cache_tokens", "min_reputation", "allowed_servers",
                                    "blocked_servers", "trusted_servers", "trusted_blocks"),
    "output": ("json", "plot", "save_snapshot", "log_level"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """What to plan on, how, and what to show.

    Raises:
        ConfigError: a value is out of range, or neither or both of a snapshot and a swarm are
            given.
    """

    snapshot: str | None = None
    """File to plan on, in the format of docs/plan.md."""
    model: str | None = None
    """Model to plan on a live swarm for: folder or Hugging Face repository, of which only the
    configuration is read, or demo."""
    initial_peers: tuple[str, ...] = ()
    """Multiaddresses of peers of the live swarm, each ending in /p2p/PEER_ID."""
    dht_prefix: str | None = None
    """Directory prefix of the model; by default it is derived from its configuration."""
    revision: str | None = None
    """Branch, tag or commit of the model's repository."""
    token: str | None = field(default=None, repr=False)
    """Hugging Face access token; by default the one that `hf auth login` saved."""
    cache_dir: str | None = None
    """Folder for downloads; by default Hugging Face's own cache."""
    torch_dtype: str = "auto"
    """Data type of the activations that travel; auto takes the checkpoint's own."""
    daemon_startup_timeout: float = 60.0
    """Seconds to wait for the local libp2p daemon."""
    wait_for_blocks_timeout: float = 10.0
    """Seconds to wait for servers of missing blocks."""

    optimizer: str = "shortest_path"
    """Name of the optimiser, and its options after a colon, as in nsga2:objectives=4."""
    pick: str | None = None
    """Which chain of a front to take: knee, latency, throughput or request:P:G for requests of P
    prompt and G output tokens. By default the optimiser's own choice, mostly the knee."""
    seed: int | None = None
    """Seed of optimisers that use chance; the others ignore it."""

    cache_tokens: int | None = None
    """Tokens of KV cache that every server of the chain must have free. By default none, and the
    whole request with --pick request:P:G."""
    min_reputation: float = 0.0
    """Least reputation of every server of the chain."""
    allowed_servers: tuple[str, ...] | None = None
    """Use these servers only."""
    blocked_servers: tuple[str, ...] | None = None
    """Never use these servers."""
    trusted_servers: tuple[str, ...] | None = None
    """Only these servers run --trusted_blocks; any may run the others."""
    trusted_blocks: str | None = None
    """Blocks that only trusted servers run, as START:END with commas between; a negative number
    counts from the end. By default the first two and the last two."""

    json: bool = False
    """Print one JSON document instead of text."""
    plot: str | None = None
    """PNG file to draw: the front with the picked chain, and the chain on a map of the servers."""
    save_snapshot: str | None = None
    """File to save what was planned on to, to plan on it again with --snapshot."""
    log_level: str = "warning"
    """What is logged to stderr: debug, info, warning or error."""

    def __post_init__(self) -> None:
        if self.snapshot is not None and (self.initial_peers or self.model):
            raise ConfigError("give either --snapshot FILE or MODEL --initial_peers, not both")
        if self.snapshot is None and not self.initial_peers:
            raise ConfigError(
                "nothing to plan on: give --snapshot FILE, or MODEL and --initial_peers of a swarm"
            )
        if self.snapshot is None and not self.model:
            raise ConfigError("say which MODEL the plan is for: a folder, a repository or demo")
        for name, choices in (("torch_dtype", TORCH_DTYPES), ("log_level", LOG_LEVELS)):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of: "
                    + ", ".join(choices)
                )
        for name in ("cache_tokens", "min_reputation"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name}={getattr(self, name):g} must not be negative")
        parse_pick(self.pick)

    def request(self, num_blocks: int) -> ChainRequest:
        """The request to plan for, on a model of `num_blocks`.

        Raises:
            ConfigError: `trusted_blocks` does not fit the model.
        """
        pick, prompt_tokens, output_tokens = parse_pick(self.pick)
        tokens = self.cache_tokens
        trust = ClientConfig(
            trusted_servers=self.trusted_servers, trusted_blocks=self.trusted_blocks
        )
        allowed = self.allowed_servers
        return ChainRequest(
            tokens=prompt_tokens + output_tokens if tokens is None else tokens,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            min_reputation=self.min_reputation,
            allowed=None if allowed is None else frozenset(allowed),
            blocked=frozenset(self.blocked_servers or ()),
            trusted=trusted_spans(trust, num_blocks),
            pick=pick,
        )


def parse_pick(text: str | None) -> tuple[str | None, int, int]:
    """Which pick, prompt tokens and output tokens `text` asks for.

    Raises:
        ConfigError: it asks for none that exists.
    """
    name, *lengths = (text or "").split(":")
    if text is None or (name in PICKS and name != "request" and not lengths):
        return text, 0, 0
    counts = [int(part) for part in lengths if re.fullmatch("[0-9]{1,9}", part)]
    if name != "request" or len(lengths) != 2 or len(counts) != 2 or not sum(counts):
        raise ConfigError(
            f"--pick {text[:80]!r} is none of: knee, latency, throughput, request:P:G with the "
            "numbers of prompt and output tokens, as in request:512:128"
        )
    return name, counts[0], counts[1]


def parse(argv: Sequence[str] | None = None) -> PlanConfig:
    """Read the command line.

    Raises:
        ConfigError: a flag, the YAML file or a combination of settings is wrong.
    """
    parser = cli.Parser(PROG, USAGE, DESCRIPTION, EXAMPLES)
    cli.add_fields(parser, PlanConfig, GROUPS, positional=("model",))
    return cli.parse_config(parser, PlanConfig, argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Plan and show.

    Raises:
        ConfigError: the command line, the snapshot or an optimiser's option is wrong, or no chain
            of the snapshot satisfies the request.
        PlanetServeError: the swarm cannot be joined or has no chain.
    """
    config = parse(argv)
    cli.setup_logging(config.log_level)
    options = {} if config.seed is None else {"seed": config.seed}
    optimizer = OPTIMIZERS.create_from(config.optimizer, **options)
    if config.plot is not None:
        from planetserve.plan.plot import require_matplotlib

        require_matplotlib()
    snapshot = _snapshot(config)
    try:
        plan = solve(snapshot, optimizer, config.optimizer, config.request(snapshot.num_blocks))
    except NoChainAvailable as error:
        if config.snapshot is None:
            raise
        raise ConfigError(f"{config.snapshot}: {error}") from error
    if config.save_snapshot is not None:
        snapshot.save(config.save_snapshot)
    if config.plot is not None:
        from planetserve.plan.plot import draw

        draw(plan, config.plot)
    if config.pick is not None and not isinstance(optimizer, FrontOptimizer):
        sys.stderr.write(
            f"note: {config.optimizer} plans one chain, so --pick has nothing to choose from\n"
        )
    sys.stdout.write(as_json(plan) if config.json else as_text(plan))
    sys.stdout.flush()


def _snapshot(config: PlanConfig) -> SwarmSnapshot:
    if config.snapshot is None:
        return _live_snapshot(config)
    snapshot = SwarmSnapshot.load(config.snapshot)
    for name in ("allowed_servers", "blocked_servers", "trusted_servers"):
        for server_id in getattr(config, name) or ():
            if server_id not in snapshot.index or server_id == CLIENT:
                raise ConfigError(f"--{name}: {server_id[:80]!r} is no server of {config.snapshot}")
    return snapshot


def _live_snapshot(config: PlanConfig) -> SwarmSnapshot:
    from planetserve.plan.live import live_snapshot, open_model

    facts = open_model(
        config.model or "",
        torch_dtype=config.torch_dtype,
        revision=config.revision,
        token=config.token,
        cache_dir=config.cache_dir,
    )
    names = ("initial_peers", "dht_prefix", "daemon_startup_timeout", "wait_for_blocks_timeout",
             "allowed_servers", "blocked_servers", "trusted_servers", "trusted_blocks")  # fmt: skip
    client = ClientConfig(**{name: getattr(config, name) for name in names})
    return live_snapshot(client, facts, config.request(facts.num_blocks).tokens)
