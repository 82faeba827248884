"""A swarm in this process whose servers can be killed, stopped, cut off and made to misbehave.

`FaultSwarm` keeps replicas of each span, every server with a key, a libp2p daemon and an engine of
its own, behind a `FaultyLink` if asked to. A fault strikes at a given moment of a session: when a
given frame reaches a given hop, on the event loop and before the hop has looked at the frame. After
a test `repair` brings back what was lost, under the same peer ids, so that swarms can be shared.

Killing a server's daemon is what the network sees of a killed machine. The process survives, so its
memory can be counted; tests with real processes are in `test_fault_processes.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from faulty_link import BOTH, FaultyLink, turned
from tampering import Tampering

from planetserve import AutoDistributedModelForCausalLM
from planetserve.server.server import Server
from planetserve.swarm.libp2p.node import SwarmNode
from planetserve.testing.proxy import Link
from planetserve.testing.swarm import LocalSwarm
from planetserve.wire.frame import FrameHeader, FrameType

CHUNK_TOKENS = 16
SERVER_OPTIONS = {
    "max_batch_size": CHUNK_TOKENS,
    "attn_cache_tokens": 4096,
    "inference_max_length": 256,
    "update_period": 30.0,
}
CLIENT_OPTIONS: dict[str, Any] = {
    "torch_dtype": "float32",
    "show_route": False,
    "connect_timeout": 2.0,
    "probe_after": 0.5,
    "ping_timeout": 0.5,
    "stall_timeout": 1.0,
    "step_timeout": 4.0,
    "min_backoff": 0.1,
    "max_retries": 4,
}
_RELEASE_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Moment:
    """When a STEP frame reaches the server that runs block `block`."""

    block: int
    step: int | None = None
    """None: whichever comes first."""
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """What sessions hold at servers."""

    pages_used: int
    pages_leased: int
    num_sessions: int
    queued_bytes: int

    @classmethod
    def nothing(cls) -> Held:
        return cls(0, 0, 0, 0)

    def __add__(self, other: Held) -> Held:
        return Held(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(eq=False)
class Host:
    """One machine of the swarm, and the server that runs on it now."""

    span: str
    key_file: Path
    server: Server = field(init=False)
    link: FaultyLink | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the daemon runs, stopped or not."""
        return not self.server.node.stopped.is_set()

    def signal(self, number: int) -> None:
        """Send the daemon a signal, if it is there."""
        if self.is_alive:
            os.kill(daemon_pid(self.server.node), number)

    def held(self) -> Held:
        stats = self.server.engine.stats()
        num_sessions = max(stats.num_sessions, self.server.handler.num_sessions)
        queued_bytes = self.server.handler.queued_bytes
        return Held(stats.pages_used, stats.pages_leased, num_sessions, queued_bytes)


Strike = Callable[["FaultSwarm", Host], None]
"""A fault: what to do to the host that is hit."""


@dataclass(eq=False)
class Fault:
    """A fault that waits for its moment."""

    moment: Moment
    strike: Strike
    after: Fault | None = None
    """Not before this one has struck, and on another host: on its replacement."""
    struck_s: float | None = None
    """When it happened, by `time.perf_counter`."""
    victim: Host | None = None

    def concerns(self, host: Host, header: FrameHeader) -> bool:
        """Whether this frame at this host is what the fault waits for."""
        moment = self.moment
        if not header.span_start <= moment.block < header.span_end:
            return False
        if moment.step not in (None, header.step) or moment.chunk != header.chunk:
            return False
        return self.after is None or self.after.victim not in (None, host)


@dataclass
class FaultSwarm:
    """One host for each of `spans`. A context manager.

    Args:
        model: folder of the checkpoint.
        folder: for keys.
        links: put a `FaultyLink` in front of every server.
    """

    model: str
    spans: Sequence[str]
    folder: Path
    links: bool = False
    hosts: list[Host] = field(default_factory=list)
    tampering: Tampering = field(default_factory=Tampering)
    faults: list[Fault] = field(default_factory=list)
    runs: dict[int, Host] = field(default_factory=dict)
    """Who was the latest to get a frame for the blocks that begin with this one."""
    client_pid: int | None = None
    """Process id of the latest client's daemon."""
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _chores: set[asyncio.Task[None]] = field(default_factory=set)
    _closings: set[asyncio.Task[object]] = field(default_factory=set)
    _undo: list[Callable[[], object]] = field(default_factory=list)

    def __enter__(self) -> FaultSwarm:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.local = stack.enter_context(LocalSwarm(self.model, [], SERVER_OPTIONS))
            stack.callback(self._close_links)
            stack.callback(self.restore)
            stack.enter_context(self.tampering.installed())
            self.add_hosts(self.spans)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def add_hosts(self, spans: Sequence[str]) -> list[Host]:
        """Start one more host for each span."""
        return self.local.call(self.start_hosts(spans))

    async def start_hosts(self, spans: Sequence[str], delay_s: float = 0.0) -> list[Host]:
        """`add_hosts` on the event loop, after a while."""
        await asyncio.sleep(delay_s)
        keys = [self.folder / f"{next(self._numbers)}.key" for _ in spans]
        added = [Host(span, key) for span, key in zip(spans, keys, strict=True)]
        await self._start(added)
        self.hosts += added
        return added

    def remove(self, host: Host) -> None:
        """Stop a host for good; it says so to the swarm if it still can."""
        self.hosts.remove(host)
        self._stop(host)

    def restore(self) -> None:
        """Fair weather, honest and running servers; what is dead stays dead."""
        self.faults.clear()
        self.runs.clear()
        self.tampering.disarm()
        while self._undo:
            self._undo.pop()()
        self.local.call(self._end_chores())
        for host in self.hosts:
            host.server.engine.__dict__.pop("submit", None)
            if host.link is not None:
                host.link.clear()
            host.signal(signal.SIGCONT)

    def repair(self) -> None:
        """`restore`, and start anew what is dead, or keeps what an earlier test left there."""
        self.restore()
        dead = [h for h in self.hosts if not (h.is_alive and h.held() == Held.nothing())]
        for host in dead:
            self._stop(host)
        self.local.call(self._start(dead))

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[Any]:
        """A client of its own: nobody remembers the faults of an earlier test."""
        settings = {**CLIENT_OPTIONS, "initial_peers": self.local.initial_peers, **options}
        with AutoDistributedModelForCausalLM.from_pretrained(self.model, **settings) as model:
            self.client_pid = daemon_pid(model.runtime.node)
            yield model

    def strike_at(self, moment: Moment, strike: Strike, after: Fault | None = None) -> Fault:
        """Arm a fault."""
        fault = Fault(moment, strike, after)
        self.faults.append(fault)
        return fault

    def later(self, delay_s: float, do: Callable[[], None]) -> None:
        """Do something after a while, unless the test is over by then. On the event loop."""

        async def chore() -> None:
            await asyncio.sleep(delay_s)
            do()

        task = asyncio.get_running_loop().create_task(chore())
        self._chores.add(task)
        task.add_done_callback(self._chores.discard)

    def spawn(self, work: Coroutine[Any, Any, object]) -> None:
        """Let a server start or close meanwhile; `restore` waits for it. On the event loop."""
        task = asyncio.get_running_loop().create_task(work)
        self._closings.add(task)
        task.add_done_callback(self._closings.discard)

    def on_restore(self, undo: Callable[[], object]) -> None:
        """Do this when the test is over."""
        self._undo.append(undo)

    def cut_between(self, one: Host, other: Host) -> None:
        """Cut the link of two hosts, whichever of them dialled."""
        for near, far in ((one, other), (other, one)):
            if near.link is not None:
                near.link.set(Link(holds=BOTH), dialler=daemon_pid(far.server.node))

    def set_link(self, host: Host, link: Link) -> None:
        """Have this link for every connection of a host, whoever dialled; in and out as it sees.

        Its connection with the bootstrap peer, over which no session goes, is left alone.
        """
        for other in self.hosts:
            if other.link is not None and other is not host:
                other.link.set(turned(link), dialler=daemon_pid(host.server.node))
            elif other.link is not None:
                other.link.set(link)

    async def reset_connections(self, host: Host) -> None:
        """Reset every connection of a host. On the event loop."""
        for other in self.hosts:
            if other.link is not None:
                pid = None if other is host else daemon_pid(host.server.node)
                await other.link.reset(pid)

    def held(self) -> Held:
        """What sessions hold at all servers, the unreachable ones included."""
        return sum((host.held() for host in self.hosts), Held.nothing())

    def leaked(self) -> Held:
        """What is still held when no session is open any more and servers had time to notice."""
        return self.held_when(lambda held: held == Held.nothing())

    def held_when(self, condition: Callable[[Held], bool]) -> Held:
        """What is held once that satisfies `condition`, or after the time for it is over."""
        deadline_s = time.monotonic() + _RELEASE_TIMEOUT_S
        while not condition(held := self.held()) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return held

    def _process_of(self, port: int) -> int | None:
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if any(item.laddr.port == port for item in process.net_connections("tcp4")):
                    return process.pid
        return None

    async def _start(self, hosts: Sequence[Host]) -> None:
        """Start the servers of these hosts, with a new link each."""
        wanted = []
        for host in hosts:
            options: dict[str, Any] = {"identity_path": str(host.key_file)}
            if self.links:
                port = free_port()
                host.link = FaultyLink(port, self._process_of)
                await host.link.start()
                options["host_maddrs"] = (f"/ip4/127.0.0.1/tcp/{port}",)
                options["announce_maddrs"] = (host.link.address,)
            wanted.append((host.span, options))
        for host, server in zip(hosts, await self.local.start_servers(wanted), strict=True):
            host.server = server
            server.node.taps.append(self._tap_of(host))

    def _stop(self, host: Host) -> None:
        host.signal(signal.SIGCONT)
        self.local.stop_server(host.server)
        if host.link is not None:
            self.local.call(host.link.close())

    def _close_links(self) -> None:
        for host in self.hosts:
            if host.link is not None:
                self.local.call(host.link.close())

    async def _end_chores(self) -> None:
        for task in list(self._chores):
            task.cancel()
        await asyncio.gather(*self._chores, return_exceptions=True)
        await asyncio.gather(*self._closings)

    def _tap_of(self, host: Host) -> Callable[[str, str, FrameHeader], None]:
        def tap(way: str, remote: str, header: FrameHeader) -> None:
            if way == "received" and header.type is FrameType.STEP:
                self._on_step(host, header)

        return tap

    def _on_step(self, host: Host, header: FrameHeader) -> None:
        self.runs[header.span_start] = host
        for fault in self.faults:
            if fault.struck_s is None and fault.concerns(host, header):
                fault.victim = host
                fault.struck_s = time.perf_counter()
                fault.strike(self, host)


def daemon_pid(node: SwarmNode) -> int:
    """Process id of a node's libp2p daemon."""
    pid: int = node._daemon._child.pid
    return pid


def free_port() -> int:
    """A TCP port that nobody listens on, outside the range that the system picks ports from."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
