"""Servers as processes of their own, which tests kill, stop and starve, and then start anew."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from commands import Command
from fault_swarm import CHUNK_TOKENS, CLIENT_OPTIONS

from planetserve import AutoDistributedModelForCausalLM
from planetserve.clock import SystemClock
from planetserve.swarm.directory import Directory
from planetserve.wire.frame import FrameHeader, FrameType

CACHE_TOKENS = 4096
LOOPBACK = ("--host_maddrs", "/ip4/127.0.0.1/tcp/0")
_RELEASE_TIMEOUT_S = 20.0


@dataclass(eq=False)
class Machine:
    """A server process with its libp2p daemon."""

    span: str
    key_file: Path
    command: Command = field(init=False)
    is_starved: bool = False

    @property
    def peer_id(self) -> str:
        peer_id: str = self.command.wait_ready()["peer_id"]
        return peer_id

    @property
    def server(self) -> psutil.Process:
        return psutil.Process(self.command.process.pid)

    @property
    def daemon(self) -> psutil.Process:
        (daemon,) = self.server.children()
        return daemon

    def starve(self, resource: int, limit: int) -> None:
        """Put a limit on the server process, for the rest of its life."""
        self.is_starved = True
        self.server.rlimit(resource, (limit, limit))

    @property
    def works(self) -> bool:
        """Whether both processes run, or would if they were not stopped."""
        return self.command.process.poll() is None and bool(self.server.children())


@dataclass
class ProcessSwarm:
    """A bootstrap peer and one machine for each of `spans`. A context manager."""

    model: str
    spans: Sequence[str]
    folder: Path
    machines: list[Machine] = field(default_factory=list)

    def __enter__(self) -> ProcessSwarm:
        self.bootstrap = Command(self.folder, "run_dht", *LOOPBACK)
        try:
            self.initial_peers = self.bootstrap.wait_ready()["addresses"]
            for number, span in enumerate(self.spans):
                self.machines.append(Machine(span, self.folder / f"{number}.key"))
                self._start(self.machines[-1])
            for machine in self.machines:
                machine.command.wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        for machine in self.machines:
            machine.command.end()
        self.bootstrap.end()

    def repair(self) -> None:
        """Start anew what does not work; let what is stopped go on."""
        broken = [m for m in self.machines if m.is_starved or not m.works]
        for machine in self.machines:
            if machine in broken:
                machine.command.end()
                self._start(machine)
            else:
                machine.command.signal_all(signal.SIGCONT)
        for machine in broken:
            machine.command.wait_ready()

    @contextlib.contextmanager
    def client(self, **options: Any) -> Iterator[Any]:
        """A client of its own."""
        settings = {**CLIENT_OPTIONS, "initial_peers": self.initial_peers, **options}
        with AutoDistributedModelForCausalLM.from_pretrained(self.model, **settings) as model:
            yield model

    def machine_of(self, peer_id: str) -> Machine:
        (machine,) = [machine for machine in self.machines if machine.peer_id == peer_id]
        return machine

    def leaked_pages(self, model: Any, page_size: int = 16) -> int:
        """KV pages that working servers still do not announce as free after some time."""
        deadline_s = time.monotonic() + _RELEASE_TIMEOUT_S
        ids = {machine.peer_id for machine in self.machines if machine.works}
        directory = Directory(model.runtime.node, SystemClock())
        prefix = model.runtime._manager.view.prefix
        while True:
            found = model.runtime._loop_thread.call(directory.lookup(prefix))
            free = [info.free_cache_tokens for info in found if info.peer_id in ids]
            held = len(ids) * CACHE_TOKENS - sum(free)
            if not held or time.monotonic() > deadline_s:
                return held // page_size
            time.sleep(0.2)

    def _start(self, machine: Machine) -> None:
        machine.is_starved = False
        machine.command = Command(
            self.folder, "run_server", self.model, "--block_indices", machine.span,
            "--initial_peers", *self.initial_peers, *LOOPBACK, "--num_threads", "1",
            "--torch_dtype", "float32", "--identity_path", str(machine.key_file),
            "--max_batch_size", str(CHUNK_TOKENS), "--attn_cache_tokens", str(CACHE_TOKENS),
            "--update_period", "1",
        )  # fmt: skip


@dataclass(eq=False)
class Blow:
    """What happens to the machine of one hop when the client sends a step; once."""

    model: Any
    swarm: ProcessSwarm
    hop: int
    step: int
    chunk: int
    strike: Callable[[Machine], object]
    struck_s: float | None = None
    victim: Machine | None = None

    def __call__(self, way: str, remote: str, header: FrameHeader) -> None:
        """A tap of the client's node."""
        sent = (way, header.type, header.step, header.chunk)
        if self.struck_s is None and sent == ("sent", FrameType.STEP, self.step, self.chunk):
            self.victim = self.swarm.machine_of(self.model.chain.hops[self.hop].peer_id)
            self.struck_s = time.perf_counter()
            self.strike(self.victim)
