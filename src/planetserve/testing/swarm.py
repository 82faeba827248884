"""A whole swarm in this process: a bootstrap peer and servers on loopback, on one background loop.

Everything is real (libp2p daemons, streams, engine threads); only the processes are shared. Tests
and benchmarks use it; nothing else imports it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

from planetserve.client.event_loop_thread import EventLoopThread
from planetserve.config import ServerConfig
from planetserve.server.server import Server
from planetserve.swarm.libp2p.node import NodeConfig, SwarmNode
from planetserve.types import BlockSpan, PeerId
from planetserve.wire.frame import FrameHeader

T = TypeVar("T")

LOOPBACK = ("/ip4/127.0.0.1/tcp/0",)


@dataclass(frozen=True, slots=True)
class SeenFrame:
    """One frame as a node's tap saw it."""

    node: PeerId
    way: str
    remote: PeerId
    header: FrameHeader


@dataclass
class LocalSwarm:
    """Bootstrap peer plus one server for each of `spans`, all of `model`.

    `with LocalSwarm(model, ["0:3", "3:8"]) as swarm:` starts it; `swarm.initial_peers` is what a
    client needs. `options` are further `ServerConfig` fields for every server.
    """

    model: str
    spans: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    servers: list[Server] = field(default_factory=list)
    frames: list[SeenFrame] = field(default_factory=list)
    """Frames that the servers sent and received, in the order each saw them."""

    def __enter__(self) -> LocalSwarm:
        self._loop_thread = EventLoopThread("planetserve-local-swarm")
        try:
            self._bootstrap = self._loop_thread.call(_start_bootstrap())
            self._loop_thread.call(self.start_servers([(span, {}) for span in self.spans]))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def initial_peers(self) -> tuple[str, ...]:
        """Addresses of the bootstrap peer."""
        return self._bootstrap.addresses()

    def add_server(self, span: str, **options: Any) -> Server:
        """Start one more server."""
        return self.add_servers([(span, options)])[0]

    def add_servers(self, wanted: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Server]:
        """Start more servers at the same time, each given as its span and its own options."""
        return self._loop_thread.call(self.start_servers(wanted))

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the servers' event loop."""
        return self._loop_thread.call(work)

    def stop_server(self, server: Server) -> None:
        """Close one server without draining it."""
        self.servers.remove(server)
        self._loop_thread.call(server.close())

    def close(self) -> None:
        """Stop everything."""
        servers, self.servers = self.servers, []
        if not self._loop_thread.closed:
            self._loop_thread.call(self._close_all(servers))
            self._loop_thread.close()

    async def start_servers(self, wanted: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Server]:
        """`add_servers` for callers on the servers' event loop."""
        started = await asyncio.gather(
            *(self._start(span, options) for span, options in wanted), return_exceptions=True
        )
        servers = [item for item in started if isinstance(item, Server)]
        self.servers.extend(servers)
        for item in started:
            if isinstance(item, BaseException):
                raise item
        return servers

    async def _start(self, span: str, options: Mapping[str, Any]) -> Server:
        settings: dict[str, Any] = {
            "block_indices": BlockSpan.parse(span),
            "host_maddrs": LOOPBACK,
            "torch_dtype": "float32",
            "num_threads": 1,
            "model": self.model,
            **self.options,
            **options,
        }
        config = ServerConfig(initial_peers=self.initial_peers, **settings)
        server = await Server.start(config)
        name = server.node.peer_id

        def tap(way: str, remote: PeerId, header: FrameHeader) -> None:
            self.frames.append(SeenFrame(name, way, remote, header))

        server.node.taps.append(tap)
        return server

    async def _close_all(self, servers: Sequence[Server]) -> None:
        await asyncio.gather(*(server.close() for server in servers), return_exceptions=True)
        if hasattr(self, "_bootstrap"):
            await self._bootstrap.close()


async def _start_bootstrap() -> SwarmNode:
    return await SwarmNode.start(NodeConfig(host_maddrs=LOOPBACK))
