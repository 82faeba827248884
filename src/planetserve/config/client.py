"""The settings of a client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planetserve.config.checks import check_prefix, require_not_negative, require_positive
from planetserve.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How a client finds servers, waits for them and retries.

    Raises:
        ConfigError: a value is out of range; the message names the field.
    """

    initial_peers: tuple[str, ...] = ()
    """Multiaddresses of peers to join the swarm through, each ending in /p2p/PEER_ID."""
    dht_prefix: str | None = None
    """Directory prefix of the model; by default it is derived from the model's name."""
    daemon_startup_timeout: float = 60.0
    """Seconds to wait for the local libp2p daemon."""
    show_route: bool | Literal["inference"] = "inference"
    """Log the chain of servers that a session uses, unless False."""
    allowed_servers: tuple[str, ...] | None = None
    """Use these peer ids only; None allows every server."""
    blocked_servers: tuple[str, ...] | None = None
    """Never use these peer ids."""
    trusted_servers: tuple[str, ...] | None = None
    """Only these peer ids run `trusted_blocks`; any server may run the others."""
    trusted_blocks: str | None = None
    """Blocks that only `trusted_servers` run, as START:END with commas between; a negative number
    counts from the end. By default the first two and the last two, 0:2,-2:"""
    local_blocks: str | None = None
    """Blocks that the client runs itself: the first ones, the last ones or both, such as 0:1 or
    0:2,-2: (START:END; a negative number counts from the end). Their weights and their KV cache
    stay in this machine's memory, as much for each block as a server needs."""
    use_server_to_server: bool = True
    """Servers push activations to the next server. Always on; False is refused."""
    connect_timeout: float = 5.0
    """Seconds to open a session on one server."""
    request_timeout: float = 180.0
    """Seconds a directory look-up or a whole-sequence forward pass may take."""
    step_timeout: float = 60.0
    """Seconds to wait for the answer to one inference step before its chain counts as failed."""
    stall_timeout: float = 5.0
    """Seconds during which nothing moves between two servers, although both answer pings, after
    which the session stops using the way between them."""
    probe_after: float = 1.0
    """Seconds without an answer after which the servers of a step are pinged; a silent one is
    replaced without waiting for `step_timeout`."""
    update_period: float = 60.0
    """Seconds between refreshes of the list of servers."""
    max_retries: int = 5
    """Failed attempts in a row after which an inference step raises its error; 0 never retries."""
    min_backoff: float = 1.0
    """Seconds to wait before the second retry; doubled for each further one."""
    max_backoff: float = 60.0
    """Longest wait between two retries, in seconds."""
    ban_timeout: float = 15.0
    """Seconds for which a server that failed is not chosen again."""
    max_pinged: int = 3
    """How many candidates for the first and for the last server are pinged in every
    `update_period` to measure the round-trip time."""
    ping_timeout: float = 2.0
    """Seconds after which a ping counts as lost."""
    chain_optimizer: str = "shortest_path"
    """Name of the strategy that picks the chain of servers, and its options after a colon, as in
    nsga2:objectives=4."""
    chain_spread: float = 0.1
    """A chain may be slower than the best one by up to this share, so that clients that plan at
    once choose different ones; 0 always takes the best."""
    chain_doubt: float = 0.0
    """How little to believe in the loads that servers announce, which will have changed before the
    session ends: this part of the expected wait at a server is one pass of it, however idle it
    looks. Less of it where even the busiest server is hardly busy, so that in an idle swarm the
    fastest chain is taken. 0 expects the loads of now; in simulated swarms doubt gained nothing."""
    replan_period: float = 10.0
    """Seconds between looks for a better chain while a session runs; 0 never looks."""
    replan_gain: float = 0.2
    """A session moves to another chain only if that saves this share of the time per token, and in
    all more than the move takes."""
    replan_checks: int = 3
    """How many looks in a row must have found such a chain."""
    wait_for_blocks_timeout: float = 10.0
    """Seconds to wait for servers that hold missing blocks before giving up."""

    def __post_init__(self) -> None:
        require_positive(
            self, "daemon_startup_timeout", "connect_timeout", "request_timeout", "step_timeout",
            "update_period", "ping_timeout", "probe_after", "stall_timeout",
            "replan_checks",
        )  # fmt: skip
        require_not_negative(
            self, "max_retries", "min_backoff", "max_backoff", "ban_timeout", "max_pinged",
            "wait_for_blocks_timeout", "replan_period", "replan_gain",
        )  # fmt: skip
        for name in ("chain_spread", "chain_doubt"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value:g} is not between 0 and 1")
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
