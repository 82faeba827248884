"""A simulated swarm under faults: the production ring, failover, planning, leases and handlers.

`simulate(seed)` draws a swarm and faults (`fault_plan.py`), runs clients on it that generate texts
in every way that sessions allow, and returns violations: a wrong token, a page or stream that is
not released, a session that is stuck or waits past its bound, an error of the wrong kind, a queue
over its limit, a server that is banned without a fault. The same seed gives the same events.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import logging
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import override

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.session_core import SessionCore
from planetserve.config import ClientConfig
from planetserve.errors import ConfigError, LocalProtocolError, PlanetServeError, SessionClosed
from planetserve.testing import virtual_time
from planetserve.testing.fault_plan import AIMED, Fault, SwarmPlan, SwarmShape, draw_plan
from planetserve.testing.integer_model import LoopEngine
from planetserve.testing.lies import Liar
from planetserve.testing.memory_network import MemoryNetwork
from planetserve.testing.simulated_roles import SimulatedServer, new_manager
from planetserve.testing.simulated_text import SimulatedText
from planetserve.testing.swarm_checks import RECOVERY_S, InjectedFault, SwarmChecks
from planetserve.testing.virtual_time import StuckError, VirtualTimeLoop
from planetserve.types import PeerId
from planetserve.wire.frame import FrameHeader
from planetserve.wire.step import StepTable

_STEP_BOUND_S = 400.0
"""Maximum seconds of a step: six attempts, each of which may wait for blocks, connect and time
out."""
_UNDISTURBED_STEP_S = 15.0
"""Maximum seconds of a step without faults, connecting included."""
_END_S = 3000.0
_SETTLE_S = 30.0
_DRAIN_S = 20.0
_CLOSE_S = 15.0
"""Maximum seconds of closing a session."""
_LEAVE_S = 35.0
"""Maximum seconds of closing a server, without draining: it updates the directory twice."""
_MAX_REFUSALS = 20
"""Number of failed steps after which clients give up, in a swarm without room for all sessions."""


@dataclass(slots=True)
class Outcome:
    """The result of one seed."""

    seed: int
    violations: list[str] = field(default_factory=list)
    num_tokens: int = 0
    num_errors: int = 0
    """Number of steps that failed during faults, which is allowed."""
    faults: Counter[str] = field(default_factory=Counter)
    """Number of faults that occurred, and of lies that were told, by kind."""
    digest: str = ""
    """Hash over the times, nodes, types and sizes of all frames."""


def simulate(seed: int, shape: SwarmShape | None = None) -> Outcome:
    """Run the swarm of a seed, drawn from `shape`."""
    plan = draw_plan(seed, shape or SwarmShape())
    outcome = Outcome(seed)
    with _logged_errors(outcome.violations):
        try:
            virtual_time.run(lambda loop: _Simulation(loop, plan, outcome).run())
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
        self._started_s = loop.time()
        self._trace = hashlib.sha256()
        self._sessions: dict[SessionCore, int] = {}
        """Open sessions, with the numbers of their clients."""
        self._checks = SwarmChecks(plan, self._servers, self._now_s, self._violation)
        loop.set_exception_handler(self._on_error)

    async def run(self) -> None:
        plan = self._plan
        late = {fault.first for fault in plan.faults if fault.kind == "join"}
        present = [number for number in range(len(plan.servers)) if number not in late]
        await asyncio.gather(*(self._launch(number) for number in present))
        self._started_s = self._loop.time()
        managers = [self._new_client(number) for number in range(len(plan.clients))]
        faults = [asyncio.create_task(self._inject(fault)) for fault in plan.faults]
        sampling = asyncio.create_task(self._checks.sample())
        try:
            async with asyncio.timeout(_END_S):
                await asyncio.gather(*(self._use(*client) for client in managers))
                await asyncio.gather(*faults)
        except TimeoutError:
            self._violation("stuck: clients are not done")
        await asyncio.sleep(_SETTLE_S)
        self._checks.check_nothing_is_held(manager for manager, _ in managers)
        sampling.cancel()
        await asyncio.gather(*(manager.close() for manager, _ in managers))
        await asyncio.gather(*(server.close() for server in self._servers.values()))
        await asyncio.sleep(_SETTLE_S)
        self._checks.check_no_task_is_left()
        self._outcome.digest = self._trace.hexdigest()

    def _violation(self, text: str) -> None:
        if len(self._outcome.violations) < 20:
            self._outcome.violations.append(f"{self._now_s():.3f} s: {text}")

    def _now_s(self) -> float:
        return self._loop.time() - self._started_s

    def _on_error(self, _loop: object, context: dict[str, Any]) -> None:
        self._violation(f"unhandled: {context.get('message')}: {context.get('exception')!r}")

    # Faults.

    async def _launch(self, number: int) -> None:
        plan = self._plan.servers[number]
        rng = random.Random(self._outcome.seed + 1000 * number)
        while True:
            try:
                server = await SimulatedServer.launch(
                    self._network, plan, self._plan.num_blocks, rng, receipts=self._plan.receipts
                )
                break
            except PlanetServeError:
                await asyncio.sleep(5.0)
        self._servers[number] = server
        server.memory_node.taps.append(functools.partial(self._note, number))

    def _note(self, number: int, way: str, remote: PeerId, header: FrameHeader) -> None:
        line = f"{number} {self._loop.time()!r} {way} {remote} {header.payload_bytes} "
        self._trace.update(line.encode() + header.pack()[:2])
        self._checks.touched[number] = None

    def _peer(self, number: int) -> PeerId:
        servers = self._plan.servers
        if number < len(servers):
            return servers[number].identity.peer_id
        return self._plan.clients[number - len(servers)].peer_id

    async def _inject(self, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        fault = self._aimed(fault)
        network, until_s = self._network, self._loop.time() + fault.for_s
        now_s = self._now_s()
        self._outcome.faults[fault.kind] += 1
        self._checks.injected.append(InjectedFault(fault, now_s, now_s + fault.for_s))
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
            case "join":
                await self._launch(fault.first)
            case "lie":
                await self._lie(fault)
            case _:
                await self._stop(fault)

    def _aimed(self, fault: Fault) -> Fault:
        """The fault moved to a hop that is in use, and to one of its edges."""
        chains = [(core.chain, client) for core, client in self._sessions.items() if core.chain]
        if fault.aim >= AIMED or not chains:
            return fault
        chain, client = chains[int(1e4 * fault.aim) % len(chains)]
        numbers = {self._peer(number): number for number in range(len(self._plan.servers))}
        hops = [numbers[hop.peer_id] for hop in chain]
        ring = [*hops, len(self._plan.servers) + client]
        index = int(1e6 * fault.aim) % len(hops)
        first, second = ring[index], ring[(index + 1) % len(ring)]
        if first == second or fault.kind == "join":
            return fault
        return dataclasses.replace(fault, first=first, second=second)

    async def _slow(self, fault: Fault) -> None:
        one, other = self._peer(fault.first), self._peer(fault.second)
        links = [self._network.link(one, other), self._network.link(other, one)]
        for link in links:
            link.num_slow += 1
        await asyncio.sleep(fault.for_s)
        for link in links:
            link.num_slow -= 1

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

    async def _lie(self, fault: Fault) -> None:
        """A server is hostile for a while."""
        server = self._servers.get(fault.first)
        if server is None:
            return
        neighbours = [plan.identity.peer_id for plan in self._plan.servers]
        liar = Liar(
            fault.lie, random.Random(self._rng.random()), self._outcome.faults,
            self._checks.altered, neighbours,
        )  # fmt: skip
        server.memory_node.liar = liar
        await asyncio.sleep(fault.for_s)
        if server.memory_node.liar is liar:
            server.memory_node.liar = None

    async def _stop(self, fault: Fault) -> None:
        """A server ends, and comes back."""
        server = self._servers.pop(fault.first, None)
        if server is None:
            return
        self._checks.check_refusals(fault.first, server)
        began_s = self._now_s()
        if fault.kind == "drain":
            await server.close(_DRAIN_S)
        else:
            await server.memory_node.crash(is_silent=fault.kind == "silent")
            await server.close()
        took_s = self._now_s() - began_s
        if took_s > (fault.kind == "drain") * _DRAIN_S + _LEAVE_S:
            self._violation(f"server {fault.first} took {took_s:.1f} s to close")
        await asyncio.sleep(fault.for_s)
        await self._launch(fault.first)

    # Clients.

    def _new_client(self, number: int) -> tuple[ChainManager, int]:
        rng = random.Random(self._outcome.seed + 7 * number + 3)
        config = ClientConfig(
            step_timeout=20.0,
            ban_timeout=5.0,
            update_period=rng.choice((30.0, 60.0)),
            replan_period=5.0,
            show_route=False,
            receipts=self._plan.receipts,
        )
        manager = new_manager(
            self._network, config, self._plan.clients[number], self._plan.clocks[number],
            self._plan.num_blocks, rng,
        )  # fmt: skip
        self._checks.watch_bans(manager, len(self._plan.servers) + number)
        return manager, number

    async def _use(self, manager: ChainManager, number: int) -> None:
        rng = random.Random(self._outcome.seed + 31 * number + 5)
        while True:
            try:
                await manager.start()
                break
            except PlanetServeError:
                await asyncio.sleep(1.0)
        texts = [
            self._converse(manager, number, random.Random(rng.random()), rng.randint(1, 2))
            for _ in range(rng.randint(1, 3))
        ]
        await asyncio.gather(*texts)
        if self._plan.is_roomy:
            over_s = self._plan.last_fault_end_s + RECOVERY_S + 1.0
            await asyncio.sleep(max(0.0, over_s - self._now_s()))
            await self._converse(manager, number, random.Random(rng.random()), 1)

    async def _converse(
        self, manager: ChainManager, client: int, rng: random.Random, num_sessions: int
    ) -> None:
        await asyncio.sleep(rng.uniform(0.0, 20.0))
        for _ in range(num_sessions):
            core = SessionCore(manager, lease_tokens=rng.choice((None, 64)))
            self._sessions[core] = client
            try:
                await SimulatedText(
                    core, rng, self._plan.num_blocks, self._step, self._checks.wrong
                ).write()
            except PlanetServeError:
                pass  # reported where it happened, unless the swarm is full
            finally:
                self._sessions.pop(core)
                ended_s = self._now_s()
                await core.release()
                if self._now_s() - ended_s > _CLOSE_S:
                    self._violation("a session takes too long to close")

    async def _step(
        self, core: SessionCore, table: StepTable, hidden_TD: Any, keep_last: bool
    ) -> Any:
        """Run a step until it succeeds; returns its output."""
        rng, num_rows = self._rng, len(table.rows)
        while True:
            began_s = self._now_s()
            core.prepare_step(num_rows, table, hidden_TD)
            work = asyncio.create_task(core.run(num_rows, table, hidden_TD, keep_last=keep_last))
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
                if isinstance(error, ConfigError | LocalProtocolError | SessionClosed):
                    self._violation(f"a step failed by the client's own fault: {error!r}")
                if self._plan.is_roomy and self._checks.is_undisturbed(began_s):
                    self._violation(f"a step failed without a cause: {error!r}")
                    raise
                if not self._plan.is_roomy and self._outcome.num_errors > _MAX_REFUSALS:
                    raise
                await asyncio.sleep(rng.uniform(1.0, 5.0))
                continue
            took_s = self._now_s() - began_s
            if (
                self._plan.is_roomy
                and took_s > _UNDISTURBED_STEP_S
                and self._checks.is_undisturbed(began_s)
            ):
                self._violation(f"a step took {took_s:.1f} s without a cause")
            self._outcome.num_tokens += table.num_tokens
            return output


class _Violations(logging.Handler):
    """Logged errors are violations: no fault here may make a server log one."""

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
