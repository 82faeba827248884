"""Where a node listens and how it joins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from planetserve.errors import ConfigError
from planetserve.swarm import multiaddr

_EVERYWHERE = ("/ip4/0.0.0.0/tcp/{port}", "/ip6/::/tcp/{port}")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """Where a node listens and how it joins.

    Raises:
        ConfigError: an address is malformed or two settings exclude each other.
    """

    initial_peers: tuple[str, ...] = ()
    """Multiaddresses ending in /p2p/PEER_ID; one that answers is enough. None: a new swarm."""
    host_maddrs: tuple[str, ...] = ()
    """Listen here; by default on `port` of every interface."""
    announce_maddrs: tuple[str, ...] = ()
    """Tell others to dial these instead."""
    port: int | None = None
    """TCP port on every interface; None or 0 takes a free one."""
    public_ip: str | None = None
    """Announce this address with `port`."""
    identity_path: str | Path | None = None
    """Key file, created if absent; None makes a key that lives as long as the node."""
    use_relay: bool = False
    """Reach peers, and be reached, through relays, and be one if publicly reachable."""
    client_mode: bool = False
    """Listen nowhere and store nobody's records; dialling and opening streams still work."""
    daemon_startup_timeout_s: float = 60.0
    connect_timeout_s: float = 10.0
    """Time for making one connection."""
    max_peer_lookups: float = 1200.0
    """Directory keys per minute that one peer may look up or store here in the long run."""
    peer_lookup_burst: int = 600
    """As many at once by a peer that has been quiet."""

    def __post_init__(self) -> None:
        for name in ("initial_peers", "host_maddrs", "announce_maddrs"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} takes a list of multiaddresses, not one string")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for text in self.initial_peers:
            multiaddr.parse_peer(text)
        for text in (*self.host_maddrs, *self.announce_maddrs):
            if multiaddr.parse(text).peer_id is not None:
                raise ConfigError(f"{text}: leave out /p2p/..., this node's own id is added")
        for text in self.host_maddrs:
            if multiaddr.parse(text).kind not in ("ip4", "ip6"):
                raise ConfigError(f"--host_maddrs {text}: listen on an /ip4/ or /ip6/ address")
        for text in self.announce_maddrs:
            if multiaddr.parse(text).port == 0:
                raise ConfigError(f"--announce_maddrs {text}: port 0 cannot be dialled")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if not self.max_peer_lookups > 0 or self.peer_lookup_burst < 1:
            raise ConfigError("--max_peer_lookups and --peer_lookup_burst must be positive")
        if self.port is not None and not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is not a TCP port")
        if self.port and self.host_maddrs:
            raise ConfigError("--port and --host_maddrs exclude each other; give one of them")
        if self.public_ip and self.announce_maddrs:
            raise ConfigError("--public_ip and --announce_maddrs exclude each other; give one")
        if self.public_ip and not self.port:
            raise ConfigError("--public_ip needs --port, the port forwarded to this machine")
        if self.client_mode and (self.port or self.host_maddrs or self.announced):
            raise ConfigError("a client listens nowhere: give it no port, host or announce address")
        if self.public_ip:
            multiaddr.parse(self.announced[0])

    @property
    def listens_on(self) -> tuple[str, ...]:
        """Multiaddresses to listen on."""
        if self.client_mode:
            return ()
        return self.host_maddrs or tuple(text.format(port=self.port or 0) for text in _EVERYWHERE)

    @property
    def announced(self) -> tuple[str, ...]:
        """Multiaddresses to announce; none means those it listens on."""
        if self.public_ip:
            kind = "ip6" if ":" in self.public_ip else "ip4"
            return (f"/{kind}/{self.public_ip}/tcp/{self.port}",)
        return self.announce_maddrs
