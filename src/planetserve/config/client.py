"""The settings of a client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planetserve.config.checks import check_prefix, require_not_negative, require_positive
from planetserve.config.old_names import CLIENT, accepts_old_names, current_options
from planetserve.errors import ConfigError


@accepts_old_names(CLIENT)
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How a client finds servers, waits for them and retries.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    initial_peers: tuple[str, ...] = ()
    """Multiaddresses of peers to join the swarm through, each ending in /p2p/PEER_ID."""
    dht_prefix: str | None = None
    """Prefix of the model's keys in the directory; derived from the model's name by default."""
    daemon_startup_timeout: float = 60.0
    """Seconds to wait until the local libp2p daemon has started."""
    show_route: bool | Literal["inference"] = "inference"
    """Whether to log the chain of servers that a session uses; only False turns it off."""
    allowed_servers: tuple[str, ...] | None = None
    """Peer ids of the only servers to use; None allows every server."""
    blocked_servers: tuple[str, ...] | None = None
    """Peer ids of servers never to use."""
    trusted_servers: tuple[str, ...] | None = None
    """Peer ids of the only servers that may run `trusted_blocks`; any server may run the other
    blocks."""
    trusted_blocks: str | None = None
    """Blocks that only `trusted_servers` may run, as START:END separated by commas; a negative
    number counts from the end. The default is the first two and the last two, 0:2,-2:"""
    local_blocks: str | None = None
    """Blocks that the client runs itself, as START:END separated by commas; a negative number
    counts from the end. They must be the first blocks, the last ones or both, as in 0:1 or 0:2,-2:
    and each takes as much memory here, for weights and KV cache, as on a server."""
    receipts: bool = False
    """Whether to ask servers that give receipts to sign for what they take in and send on, and to
    check that all of them agree."""
    use_server_to_server: bool = True
    """Whether servers push activations to the next server. Always true; False is refused."""
    connect_timeout: float = 5.0
    """Seconds to wait for one server to open a session."""
    step_timeout: float = 60.0
    """Seconds to wait for the answer to one inference step before its chain counts as failed."""
    stall_timeout: float = 5.0
    """Seconds without any data between two servers that both answer pings, after which the session
    stops using the link between them."""
    probe_after: float = 1.0
    """Seconds to wait for the answer to a step before pinging its servers. A server that does not
    answer is replaced without waiting for `step_timeout`."""
    update_period: float = 60.0
    """Seconds between updates of the list of servers."""
    max_retries: int = 5
    """Number of failed attempts in a row after which a step raises its error; 0 never retries."""
    min_backoff: float = 1.0
    """Seconds to wait before the second retry; doubled for each further one."""
    max_backoff: float = 60.0
    """Maximum seconds to wait between two retries."""
    ban_timeout: float = 15.0
    """Seconds for which a server that failed is not used again."""
    max_pinged: int = 3
    """Number of candidates for the first and for the last server to ping in every `update_period`,
    to measure round-trip times."""
    ping_timeout: float = 2.0
    """Seconds to wait for the answer to a ping."""
    chain_optimizer: str = "shortest_path"
    """Name of the algorithm that picks the chain of servers, with its options after a colon, as in
    nsga2:population=100."""
    chain_cost_jitter: float = 0.1
    """Maximum share in [0, 1] by which a server's cost is raised at random before planning, so that
    clients that plan at the same time pick different chains. The chain may be slower than the best
    one by that share; 0 always picks the best one."""
    chain_load_prior: float = 0.0
    """Weight in [0, 1] of a prior estimate of the wait at a server, against the wait that it
    announces. The prior is the time of one pass through all its blocks. The weight shrinks with the
    load of the busiest server, so that an idle swarm gives the fastest chain. 0 uses announced
    loads as they are; in simulated swarms higher weights gained nothing."""
    replan_period: float = 10.0
    """Seconds between searches for a better chain while a session runs; 0 never searches."""
    replan_gain: float = 0.2
    """Minimum share of the time per token that another chain must save before a session moves to
    it; over the rest of the session it must also save more time than the move takes."""
    replan_checks: int = 3
    """Number of searches in a row that must have found such a chain before the session moves."""
    wait_for_blocks_timeout: float = 10.0
    """Seconds to wait for servers of blocks that nobody holds before giving up."""

    def __post_init__(self) -> None:
        require_positive(
            self, "daemon_startup_timeout", "connect_timeout", "step_timeout",
            "update_period", "ping_timeout", "probe_after", "stall_timeout",
            "replan_checks",
        )  # fmt: skip
        require_not_negative(
            self, "max_retries", "min_backoff", "max_backoff", "ban_timeout", "max_pinged",
            "wait_for_blocks_timeout", "replan_period", "replan_gain",
        )  # fmt: skip
        for name in ("chain_cost_jitter", "chain_load_prior"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value:g} is not between 0 and 1")
        object.__setattr__(self, "chain_optimizer", current_options(self.chain_optimizer))
        if self.max_backoff < self.min_backoff:
            raise ConfigError(
                f"max_backoff={self.max_backoff:g} is below min_backoff={self.min_backoff:g}"
            )
        if not self.use_server_to_server:
            raise ConfigError(
                "use_server_to_server=False is not possible: servers always push to the next "
                "server; leave it out"
            )
        if self.trusted_blocks is not None and self.trusted_servers is None:
            raise ConfigError(
                "trusted_blocks says which blocks trusted_servers run; name the servers as well"
            )
        check_prefix(self.dht_prefix)
