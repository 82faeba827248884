"""`python -m planetserve.run_dht`: a bootstrap peer, through which others join a swarm.

It keeps a share of the directory and introduces peers to each other; it holds no model and sees no
activations. Several of them, each given the others as `--initial_peers`, survive the loss of one.

hivemind is imported only once the arguments are known to be good.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planetserve import cli
from planetserve.config import LOG_LEVELS
from planetserve.config.petals import DHT_FLAGS, ignore
from planetserve.errors import ConfigError, TransportError

if TYPE_CHECKING:
    from planetserve.swarm.libp2p.node import SwarmNode

PROG = "python -m planetserve.run_dht"

USAGE = "[--initial_peers ADDRESS...] [--port N] [--identity_path FILE] [more flags]"

EXAMPLES = f"""examples:
  the first peer of a swarm, with an address that stays the same after a restart:
    {PROG} --port 31337 --identity_path bootstrap.id
  a second one, so that the swarm outlives the first:
    {PROG} --port 31337 --initial_peers /ip4/192.0.2.7/tcp/31337/p2p/12D3Koo...
"""

GROUPS = {
    "swarm": ("initial_peers", "identity_path"),
    "network": ("port", "public_ip", "host_maddrs", "announce_maddrs", "use_relay",
                "daemon_startup_timeout"),
    "limits": ("max_peer_lookups", "peer_lookup_burst"),
    "process": ("ready_file", "log_level"),
}  # fmt: skip

EXCLUSIVE = (("port", "host_maddrs"), ("public_ip", "announce_maddrs"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DhtConfig:
    """Where a bootstrap peer listens and whom it joins.

    Raises:
        ConfigError: a value is out of range.
    """

    initial_peers: tuple[str, ...] = ()
    """Multiaddresses of peers to join the swarm through, each ending in /p2p/PEER_ID; none starts a
    swarm of its own."""
    host_maddrs: tuple[str, ...] = ()
    """Multiaddresses to listen on; by default the TCP port of --port on every interface."""
    announce_maddrs: tuple[str, ...] = ()
    """Multiaddresses that other peers are told to dial, if not the ones it listens on."""
    port: int = 0
    """TCP port to listen on, on every interface; 0 takes a free one."""
    public_ip: str | None = None
    """Announce this IP address with --port, for a forwarded port."""
    identity_path: str | None = None
    """File of the private key that makes the peer id; created if absent. By default a new key."""
    max_peer_lookups: float = 1200.0
    """Keys of the directory that one peer may look up or store here per minute in the long run."""
    peer_lookup_burst: int = 600
    """Keys that a peer which has been quiet may look up or store at once."""
    use_relay: bool = False
    """Pass on connections between peers that cannot reach each other."""
    daemon_startup_timeout: float = 60.0
    """Seconds to wait for the local libp2p daemon."""
    ready_file: str | None = None
    """Write peer id and addresses to this JSON file once the peer answers."""
    log_level: str = "info"
    """What is logged to stderr: debug, info, warning or error."""

    def __post_init__(self) -> None:
        for name in ("daemon_startup_timeout", "max_peer_lookups", "peer_lookup_burst"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be greater than 0")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port={self.port} is no TCP port; give 1 to 65535, or 0 for any")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(
                f"log_level={self.log_level!r} is not one of: {', '.join(LOG_LEVELS)}"
            )


def parse(argv: Sequence[str] | None = None) -> DhtConfig:
    """Read the command line.

    Raises:
        ConfigError: a flag, the YAML file or a combination of settings is wrong.
    """
    parser = cli.Parser(
        PROG, USAGE, "Run a peer that servers and clients join a swarm through.", EXAMPLES
    )
    cli.add_fields(parser, DhtConfig, GROUPS)
    for name, (num_values, _) in DHT_FLAGS.items():
        parser.add_hidden(name, num_values)
    return cli.parse_config(
        parser, DhtConfig, argv, EXCLUSIVE, adjust=lambda given: ignore(given, DHT_FLAGS)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP."""
    config = parse(argv)
    cli.setup_logging(config.log_level)

    with cli.ended_by_interrupts():
        from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode

    node_config = NodeConfig(
        initial_peers=config.initial_peers,
        host_maddrs=config.host_maddrs,
        announce_maddrs=config.announce_maddrs,
        port=config.port,
        public_ip=config.public_ip,
        identity_path=config.identity_path,
        use_relay=config.use_relay,
        daemon_startup_timeout_s=config.daemon_startup_timeout,
        max_peer_lookups=config.max_peer_lookups,
        peer_lookup_burst=config.peer_lookup_burst,
    )

    async def body(stop: asyncio.Event) -> None:
        starting = asyncio.create_task(SwarmNode.start(node_config))
        await _first_of(starting, stop)
        if not starting.done():
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return
        async with await starting as node:
            _report(node, config.ready_file)
            stopped = asyncio.create_task(node.stopped.wait())
            await _first_of(stopped, stop)
            if stopped.done():
                raise TransportError("the libp2p daemon ended; this peer is off the network")
            stopped.cancel()

    cli.run_until_signalled(body)


async def _first_of(task: asyncio.Task[object], stop: asyncio.Event) -> None:
    """Return when `task` is done or `stop` is set."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((task, stopping), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()


def _report(node: SwarmNode, ready_file: str | None) -> None:
    cli.say(f"others join this swarm with:\n--initial_peers {' '.join(node.addresses())}")
    if ready_file is not None:
        cli.write_ready_file(ready_file, peer_id=node.peer_id, addresses=node.addresses())


if __name__ == "__main__":
    cli.run(PROG, main)
