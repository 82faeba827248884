"""A swarm of real server processes on this machine, with a wide-area network between them.

Nodes have places on a map. Every server announces the address of a `LinkProxy` instead of its own,
and whoever dials it gets the delay of the way between both places, and the rate of the slower of
both links. The bootstrap peer is next to everybody: only the directory's traffic passes it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from planetserve.client.event_loop_thread import EventLoopThread
from planetserve.testing.proxy import Link, LinkProxy, TcpAddress

LOOPBACK = "127.0.0.1"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node is, in milliseconds of one-way delay, and how fast its link is."""

    x_ms: float
    y_ms: float
    last_mile_ms: float
    mbps: float

    def link(self, other: Place) -> Link:
        """The way to another place."""
        distance = math.hypot(self.x_ms - other.x_ms, self.y_ms - other.y_ms)
        delay_ms = distance + self.last_mile_ms + other.last_mile_ms
        return Link(delay_ms / 1000, min(self.mbps, other.mbps) * 125_000)


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """A server to start."""

    name: str
    span: str
    place: Place


class EmulatedSwarm:
    """`with EmulatedSwarm(model, servers, client_place) as swarm:` starts it, then ends it.

    `swarm.peer_ids` maps names to peer ids, `swarm.initial_peers` is what a client needs.
    """

    def __init__(self, model: str, servers: Sequence[ServerPlan], client: Place, *options: str):
        self.servers = servers
        self.peer_ids: dict[str, str] = {}
        self.initial_peers: list[str] = []
        self._model = model
        self._client = client
        self._options = options
        self._processes: list[subprocess.Popen[bytes]] = []
        self._proxies: list[LinkProxy] = []
        self._ports: dict[int, Place] = {}

    def __enter__(self) -> EmulatedSwarm:
        self._folder = tempfile.TemporaryDirectory()
        self._loop_thread = EventLoopThread("links")
        try:
            bootstrap = self._start("bootstrap", "run_dht", "--host_maddrs", _maddr(0))
            self.initial_peers = self._ready(bootstrap)["addresses"]
            # One after the other: a server times its blocks when it has loaded them.
            for server in self.servers:
                self.peer_ids[server.name] = self._ready(self._start_server(server))["peer_id"]
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

    def close(self) -> None:
        """End every process and link."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)
        for process in self._processes:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for proxy in self._proxies:
            self._loop_thread.call(proxy.close())
        self._loop_thread.close()
        self._folder.cleanup()

    def _start_server(self, server: ServerPlan) -> Path:
        port = free_port()
        self._ports[port] = server.place

        def link_of(dialler: TcpAddress) -> Link:
            # libp2p dials from the port that it listens on; a client listens on none.
            return server.place.link(self._ports.get(dialler[1], self._client))

        proxy = self._loop_thread.call(LinkProxy.start((LOOPBACK, port), link_of))
        self._proxies.append(proxy)
        return self._start(
            server.name, "run_server", self._model, "--block_indices", server.span,
            "--host_maddrs", _maddr(port), "--announce_maddrs", _maddr(proxy.address[1]),
            "--public_name", server.name, "--initial_peers", *self.initial_peers,
            "--num_threads", "1", "--torch_dtype", "float32", *self._options,
        )  # fmt: skip

    def _start(self, name: str, command: str, *arguments: str) -> Path:
        ready_file = Path(self._folder.name) / f"{name}.json"
        with ready_file.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"planetserve.{command}", *arguments,
                 "--ready_file", str(ready_file)],
                env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return ready_file

    def _ready(self, ready_file: Path) -> dict[str, Any]:
        while not ready_file.exists():
            for process in self._processes:
                if process.poll() is not None:
                    raise SystemExit(ready_file.with_suffix(".log").read_text())
            time.sleep(0.1)
        found: dict[str, Any] = json.loads(ready_file.read_text())
        return found


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    import socket

    with socket.socket() as sock:
        sock.bind((LOOPBACK, 0))
        port: int = sock.getsockname()[1]
        return port


def _maddr(port: int) -> str:
    return f"/ip4/{LOOPBACK}/tcp/{port}"
