"""A simulated swarm under faults: the production ring, failover, planning, leases and handlers.

`simulate(seed)` draws a swarm and faults (`fault_plan.py`), runs clients on it that generate texts
in every way sessions allow, and returns what must never be: a wrong token, a page or stream that
stays taken, a session that is stuck or waits past its bound, an error of the wrong kind, a queue
that grows, a server that is banned though nothing befell it. The same seed gives the same events.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.session_core import SessionCore
from planetserve.config import ClientConfig
from planetserve.errors import PlanetServeError
from planetserve.swarm.ping import PROTOCOL as PING
from planetserve.testing import virtual_time
from planetserve.testing.fault_plan import AIMED, Fault, SwarmPlan, draw_plan
from planetserve.testing.integer_model import LoopEngine
from planetserve.testing.memory_network import MemoryNetwork
from planetserve.testing.simulated_roles import SimulatedServer, new_manager
from planetserve.testing.simulated_text import SimulatedText
from planetserve.testing.virtual_time import StuckError, VirtualTimeLoop
from planetserve.types import PeerId
from planetserve.wire.frame import FrameHeader
from planetserve.wire.step import StepTable

_STEP_BOUND_S = 400.0
"""No step takes longer: six attempts, each of which may wait for blocks, connect and time out."""
_RECOVERY_S = 100.0
"""After the last fault; bans are over then, and every step goes through at once."""
_CALM_STEP_S = 15.0
"""No step takes longer while nothing befalls anybody, connecting included."""
_NEVER_REFUSED = ("config", "protocol", "session", "decryption", "handshake", "rekey", "internal")
"""Codes of errors that honest clients and servers never give each other cause for."""
_END_S = 3000.0
_SETTLE_S = 30.0
_MAX_TASKS_PER_SESSION = 40
_SAMPLE_S = 1.0
_AT_ONCE_S = 1e-6
_MAX_REFUSALS = 20
"""In a swarm whose servers have not enough room for all: then clients give up."""


@dataclass(slots=True)
class Outcome:
    """What one seed has shown."""

    seed: int
    violations: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_errors: int = 0
    """Steps that failed while there were faults, as they may."""
    digest: str = ""
    """Of every frame that was sent, by whom and when."""


def simulate(seed: int) -> Outcome:
    """Run the swarm of a seed."""
    outcome = Outcome(seed)
    with _logged_errors(outcome.violations):
        try:
            virtual_time.run(lambda loop: _Simulation(loop, draw_plan(seed), outcome).run())
        except StuckError as error:
            outcome.violations.append(f"stuck: {error}")
    return outcome


class _Simulation:
    """One run."""

    def __init__(self, loop: VirtualTimeLoop, plan: SwarmPlan, outcome: Outcome):
        self._loop = loop
        self._plan = plan
        self._outcome = outcome
        self._rng = random.Random(outcome.seed + 1)
        self._network = MemoryNetwork(loop, random.Random(outcome.seed + 2))
        self._servers: dict[int, SimulatedServer] = {}
        self._touched: dict[int, None] = {}
        """Numbers of nodes that a fault concerns, clients after servers."""
        self._started_s = loop.time()
        self._trace = hashlib.sha256()
        self._sessions: dict[SessionCore, int] = {}
        """Open sessions, and whose they are."""
        loop.set_exception_handler(self._on_error)

    async def run(self) -> None:
        plan = self._plan
        await asyncio.gather(*(self._launch(number) for number in range(len(plan.servers))))
        self._started_s = self._loop.time()
        managers = [self._new_client(number) for number in range(len(plan.clients))]
        faults = [asyncio.create_task(self._befall(fault)) for fault in plan.faults]
        sampling = asyncio.create_task(self._sample())
        try:
            async with asyncio.timeout(_END_S):
                await asyncio.gather(*(self._use(*client) for client in managers))
                await asyncio.gather(*faults)
        except TimeoutError:
            self._violation("stuck: clients are not done")
        await asyncio.sleep(_SETTLE_S)
        self._check_nothing_is_held()
        sampling.cancel()
        await asyncio.gather(*(manager.close() for manager, _ in managers))
        await asyncio.gather(*(server.close() for server in self._servers.values()))
        await asyncio.sleep(_SETTLE_S)
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        left = [task for task in left if not task.done()]
        if left:
            names = sorted({str(task.get_coro()).split(" at ")[0] for task in left})
            self._violation(f"{len(left)} tasks are left: {names[:4]}")
        self._outcome.digest = self._trace.hexdigest()

    def _violation(self, text: str) -> None:
        if len(self._outcome.violations) < 20:
            self._outcome.violations.append(f"{self._now_s():.3f} s: {text}")

    def _now_s(self) -> float:
        return self._loop.time() - self._started_s

    def _is_calm(self, began_s: float) -> bool:
        """Whether nothing befell anybody since then, nor shortly before."""
        plan = self._plan
        return self._now_s() < plan.peace_s - _AT_ONCE_S or began_s > plan.calm_s + _RECOVERY_S

    def _on_error(self, _loop: object, context: dict[str, Any]) -> None:
        self._violation(f"unhandled: {context.get('message')}: {context.get('exception')!r}")

    # What befalls the swarm.

    async def _launch(self, number: int) -> None:
        plan = self._plan.servers[number]
        rng = random.Random(self._outcome.seed + 1000 * number)
        while True:
            try:
                server = await SimulatedServer.launch(
                    self._network, plan, self._plan.num_blocks, rng
                )
                break
            except PlanetServeError:
                await asyncio.sleep(5.0)
        self._servers[number] = server
        name = number.to_bytes(2, "big")
        server.node.taps.append(lambda *frame: self._note(name, *frame))

    def _note(self, node: bytes, way: str, remote: PeerId, header: FrameHeader) -> None:
        line = f"{self._loop.time():.9f} {way} {remote} {header.type.name} {header.payload_bytes}\n"
        self._trace.update(node + line.encode())

    def _peer(self, number: int) -> PeerId:
        servers = self._plan.servers
        if number < len(servers):
            return servers[number].identity.peer_id
        return self._plan.clients[number - len(servers)].peer_id

    async def _befall(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        fault = self._aimed(fault)
        self._touched |= dict.fromkeys((fault.first, fault.second))
        network, until_s = self._network, self._loop.time() + fault.for_s
        one, other = self._peer(fault.first), self._peer(fault.second)
        match fault.kind:
            case "cut" | "one_way":
                network.cut(one, other, until_s)
                if fault.kind == "cut":
                    network.cut(other, one, until_s)
                await asyncio.sleep(fault.for_s)
            case "slow":
                await self._slow(fault)
            case "reset":
                network.break_connection(one, other)
            case "directory":
                network.cut_off[one] = until_s
            case "pause":
                await self._pause(fault.first, until_s)
            case _:
                await self._stop(fault)

    def _aimed(self, fault: Fault) -> Fault:
        """The fault where it hurts: at a hop that is in use, and at one of its edges."""
        chains = [(core.chain, client) for core, client in self._sessions.items() if core.chain]
        if fault.aim >= AIMED or not chains:
            return fault
        chain, client = chains[int(1e4 * fault.aim) % len(chains)]
        numbers = {self._peer(number): number for number in range(len(self._plan.servers))}
        hops = [numbers[hop.peer_id] for hop in chain]
        ring = [*hops, len(self._plan.servers) + client]
        index = int(1e6 * fault.aim) % len(hops)
        first, second = ring[index], ring[(index + 1) % len(ring)]
        return fault if first == second else dataclasses.replace(fault, first=first, second=second)

    async def _slow(self, fault: Fault) -> None:
        one, other = self._peer(fault.first), self._peer(fault.second)
        links = [self._network.link(one, other), self._network.link(other, one)]
        before = [(link.latency_s, link.bytes_per_s) for link in links]
        for link in links:
            link.latency_s, link.bytes_per_s = 2.0, 2000.0
        await asyncio.sleep(fault.for_s)
        for link, (latency_s, rate) in zip(links, before, strict=True):
            link.latency_s, link.bytes_per_s = latency_s, rate

    async def _pause(self, number: int, until_s: float) -> None:
        """Nothing reaches or leaves a server, and it computes nothing."""
        server = self._servers.get(number)
        if server is not None and isinstance(server.engine, LoopEngine):
            server.engine.pause(until_s)
        one = self._peer(number)
        for other in range(len(self._plan.servers) + len(self._plan.clients)):
            if other != number:
                self._network.cut(one, self._peer(other), until_s)
                self._network.cut(self._peer(other), one, until_s)
        await asyncio.sleep(until_s - self._loop.time())

    async def _stop(self, fault: Fault) -> None:
        """A server ends, and comes back."""
        server = self._servers.pop(fault.first, None)
        if server is None:
            return
        self._check_refusals(fault.first, server)
        if fault.kind == "drain":
            await server.close(20.0)
        else:
            await server.memory_node.crash(is_silent=fault.kind == "silent")
            await server.close()
        await asyncio.sleep(fault.for_s)
        await self._launch(fault.first)

    # What clients do.

    def _new_client(self, number: int) -> tuple[ChainManager, int]:
        rng = random.Random(self._outcome.seed + 7 * number + 3)
        config = ClientConfig(
            step_timeout=20.0,
            ban_timeout=5.0,
            update_period=rng.choice((15.0, 60.0)),
            replan_period=5.0,
            show_route=False,
        )
        manager = new_manager(
            self._network, config, self._plan.clients[number], self._plan.skews_s[number],
            self._plan.num_blocks, rng,
        )  # fmt: skip
        self._watch_bans(manager, len(self._plan.servers) + number)
        return manager, number

    def _watch_bans(self, manager: ChainManager, client: int) -> None:
        numbers = {self._peer(number): number for number in range(len(self._plan.servers))}
        plain_ban = manager.peers.ban

        def ban(peer_ids: Iterable[PeerId], for_s: float) -> None:
            chosen = list(peer_ids)
            for peer_id in chosen:
                is_touched = {numbers[peer_id], client} & self._touched.keys()
                if self._plan.is_roomy and (not is_touched or self._is_calm(self._now_s())):
                    self._violation(f"server {numbers[peer_id]} is banned without a cause")
            plain_ban(chosen, for_s)

        manager.peers.ban = ban  # type: ignore[method-assign]

    async def _use(self, manager: ChainManager, number: int) -> None:
        rng = random.Random(self._outcome.seed + 31 * number + 5)
        while True:
            try:
                await manager.start()
                break
            except PlanetServeError:
                await asyncio.sleep(1.0)
        texts = [
            self._converse(manager, number, random.Random(rng.random()))
            for _ in range(rng.randint(1, 3))
        ]
        await asyncio.gather(*texts)
        if self._plan.is_roomy:
            over_s = self._plan.calm_s + _RECOVERY_S + 1.0
            await asyncio.sleep(max(0.0, over_s - self._now_s()))
            await self._converse(manager, number, random.Random(rng.random()))

    async def _converse(self, manager: ChainManager, client: int, rng: random.Random) -> None:
        await asyncio.sleep(rng.uniform(0.0, 20.0))
        for _ in range(rng.randint(1, 2)):
            core = SessionCore(manager, lease_tokens=rng.choice((None, 64)))
            self._sessions[core] = client
            try:
                await SimulatedText(
                    core, rng, self._plan.num_blocks, self._step, self._violation
                ).write()
            except PlanetServeError:
                pass  # told of where it happened, unless the swarm is full
            finally:
                self._sessions.pop(core)
                await core.release()

    async def _step(
        self, core: SessionCore, table: StepTable, hidden_TD: Any, rng: random.Random
    ) -> Any:
        """Run a step until it goes through; what it gives."""
        num_rows = len(table.rows)
        while True:
            began_s = self._now_s()
            core.begin(num_rows, table, hidden_TD)
            work = asyncio.create_task(core.run(num_rows, table, hidden_TD))
            if rng.random() < 0.08:
                await asyncio.wait([work], timeout=rng.choice((0.001, 0.05, 1.0)))
                if not work.done():
                    work.cancel()
                    await asyncio.wait([work])
                    continue
            await asyncio.wait([work], timeout=_STEP_BOUND_S)
            if not work.done():
                self._violation(f"a step waits since {began_s:.1f} s")
                work.cancel()
            try:
                output = await work
            except PlanetServeError as error:
                self._outcome.num_errors += 1
                if self._plan.is_roomy and self._is_calm(began_s):
                    self._violation(f"a step failed without a cause: {error!r}")
                    raise
                if not self._plan.is_roomy and self._outcome.num_errors > _MAX_REFUSALS:
                    raise
                await asyncio.sleep(rng.uniform(1.0, 5.0))
                continue
            took_s = self._now_s() - began_s
            if self._plan.is_roomy and took_s > _CALM_STEP_S and self._is_calm(began_s):
                self._violation(f"a step took {took_s:.1f} s without a cause")
            self._outcome.num_tokens += table.num_tokens
            return output

    # What must be.

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(_SAMPLE_S)
            for number, server in self._servers.items():
                queued = server.handler.queued_bytes
                if queued > server.config.max_queued_mib << 20:
                    self._violation(f"server {number} has {queued} bytes queued")
                node = server.memory_node
                most = _MAX_TASKS_PER_SESSION * (4 + len(self._plan.clients) * 6)
                if len(node.tasks) > most or len(node.streams) > most:
                    self._violation(f"server {number} has {len(node.tasks)} tasks")

    def _check_refusals(self, number: int, server: SimulatedServer) -> None:
        for reason, count in server.handler.counters.items():
            if reason.partition(".")[2] in _NEVER_REFUSED:
                self._violation(f"server {number} has refused {count} times: {reason}")

    def _check_nothing_is_held(self) -> None:
        for number, server in self._servers.items():
            self._check_refusals(number, server)
            stats, handler = server.engine.stats(), server.handler
            held = {
                "sessions": handler.num_sessions,
                "engine sessions": stats.num_sessions,
                "pages": stats.pages_used,
                "leased pages": stats.pages_leased,
                "queued bytes": handler.queued_bytes,
                "replay_buffer bytes": handler.journal_bytes,
                "kept input bytes": stats.kept_input_bytes,
                "streams": sum(stream.protocol != PING for stream in server.memory_node.streams),
            }
            still = {name: count for name, count in held.items() if count}
            if still:
                self._violation(f"server {number} still holds {still}")


class _Violations(logging.Handler):
    """Errors that are logged are violations: nothing here may make a server log one."""

    def __init__(self, violations: list[str]):
        super().__init__(logging.ERROR)
        self._violations = violations

    @override
    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._violations.append(f"logged: {record.getMessage()} {error!r}")


@contextlib.contextmanager
def _logged_errors(violations: list[str]) -> Any:
    package = logging.getLogger("planetserve")
    handler, before = _Violations(violations), (package.level, package.propagate)
    package.addHandler(handler)
    package.setLevel(logging.ERROR)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(before[0])
        package.propagate = before[1]
