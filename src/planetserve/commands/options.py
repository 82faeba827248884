"""The settings that commands which join a swarm share."""

from __future__ import annotations

from dataclasses import dataclass, field

from planetserve.config import LOG_LEVELS
from planetserve.errors import ConfigError

SWARM = ("initial_peers", "dht_prefix", "daemon_startup_timeout", "connect_timeout",
         "ping_timeout")  # fmt: skip
FILES = ("revision", "token", "cache_dir")


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmOptions:
    """Which swarm to join, and which model to look at.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str | None = None
    """Folder or Hugging Face repository of the model, of which only the configuration is read;
    demo; or the name by which the directory lists it."""
    initial_peers: tuple[str, ...] = ()
    """Multiaddresses of peers of the swarm, each ending in /p2p/PEER_ID."""
    dht_prefix: str | None = None
    """Directory prefix of the model; by default it is derived from its configuration."""
    revision: str | None = None
    """Branch, tag or commit of the model's repository."""
    token: str | None = field(default=None, repr=False)
    """Hugging Face access token; by default the one that `hf auth login` saved."""
    cache_dir: str | None = None
    """Folder for downloads; by default Hugging Face's own cache."""
    daemon_startup_timeout: float = 60.0
    """Seconds to wait for the local libp2p daemon."""
    connect_timeout: float = 5.0
    """Seconds to wait for a connection to an initial peer."""
    ping_timeout: float = 2.0
    """Seconds to wait for the answer to a ping."""
    json: bool = False
    """Print JSON instead of text."""
    log_level: str = "error"
    """What is logged to stderr: debug, info, warning or error."""

    def __post_init__(self) -> None:
        for name in ("daemon_startup_timeout", "connect_timeout", "ping_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name):g} must be greater than 0")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(
                f"log_level={self.log_level!r} is not one of: {', '.join(LOG_LEVELS)}"
            )

    def require_peers(self) -> None:
        """Refuse to go on without a swarm to join.

        Raises:
            ConfigError: no initial peers are given.
        """
        if not self.initial_peers:
            raise ConfigError(
                "no --initial_peers given; pass the addresses that a server or `planetserve dht` "
                "printed"
            )
