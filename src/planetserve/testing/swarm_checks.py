"""Conditions that must hold in a simulated swarm, at any time and at its end, under all faults."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.session_core import SessionCore
from planetserve.swarm.ping import PROTOCOL as PING
from planetserve.testing.fault_plan import LINK_FAULTS, Fault, SwarmPlan
from planetserve.testing.integer_model import WIDTH
from planetserve.testing.memory_network import BREAKS_AFTER_S
from planetserve.testing.simulated_roles import SimulatedServer
from planetserve.types import PeerId

SAMPLE_S = 1.0
RECOVERY_S = 100.0
"""Seconds after the last fault until bans are over and every step succeeds at once."""
_AFTERMATH_S = BREAKS_AFTER_S + 25.0
"""Seconds after a fault in which a client may still notice it: dead connections break, steps time
out."""
_MAX_TASKS_PER_SESSION = 40
_MAX_SESSIONS_PER_CLIENT = 8
_FLOAT32_BYTES = 4
_AT_ONCE_S = 1e-6
_NEVER_REFUSED = ("config", "protocol", "session", "decryption", "handshake", "rekey", "internal")
"""Codes of errors that honest clients and servers never cause."""


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """A fault that was injected, and when."""

    fault: Fault
    since_s: float
    until_s: float


class SwarmChecks:
    """The checks of one run.

    Args:
        plan: of the run.
        servers: the running servers, by number.
        now_s: returns the time since the start.
        violation: called with the text of each violation.
    """

    def __init__(
        self,
        plan: SwarmPlan,
        servers: Mapping[int, SimulatedServer],
        now_s: Callable[[], float],
        violation: Callable[[str], None],
    ):
        self.injected: list[InjectedFault] = []
        """Faults that have begun."""
        self.altered: dict[bytes, None] = {}
        """Ids of sessions in which a hostile server may have altered results."""
        self.touched: dict[int, None] = {}
        """Servers that have sent or received frames since their last check."""
        self._plan = plan
        self._servers = servers
        self._now_s = now_s
        self._violation = violation
        self._over: dict[tuple[int, str], None] = {}
        """Bounds that servers have passed; each is reported once."""
        self._has_liars = any(fault.lie for fault in plan.faults)

    def is_undisturbed(self, began_s: float) -> bool:
        """Whether there was no fault since then, nor shortly before."""
        plan = self._plan
        return (
            self._now_s() < plan.first_fault_s - _AT_ONCE_S
            or began_s > plan.last_fault_end_s + RECOVERY_S
        )

    def wrong(self, core: SessionCore, text: str) -> None:
        """Report a wrong answer."""
        if core.ring is None or core.ring.session_id not in self.altered:
            self._violation(text)

    def watch_bans(self, manager: ChainManager, client: int) -> None:
        """Report bans of a client that have no cause.

        Args:
            manager: the client's.
            client: its number.
        """
        numbers = {plan.identity.peer_id: n for n, plan in enumerate(self._plan.servers)}
        plain_ban = manager.peers.ban

        def ban(peer_ids: Iterable[PeerId], for_s: float) -> None:
            chosen = list(peer_ids)
            for peer_id in chosen:
                self._check_ban(numbers[peer_id], client)
            plain_ban(chosen, for_s)

        manager.peers.ban = ban  # type: ignore[method-assign]

    def _check_ban(self, number: int, client: int) -> None:
        now_s = self._now_s()
        if any(_excuses(injected, number, client, now_s) for injected in self.injected):
            return
        if not self._plan.is_roomy and self._has_refused(number):
            return
        self._violation(f"server {number} is banned by client {client} without a cause")

    def _has_refused(self, number: int) -> bool:
        server = self._servers.get(number)
        return server is None or any(server.handler.counters.values())

    async def sample(self) -> None:
        """Check the bounds of servers, once per `SAMPLE_S`."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            touched = [number for number in self.touched if number in self._servers]
            self.touched.clear()
            for number in touched:
                self._check_bounds(number, self._servers[number])

    def _check_bounds(self, number: int, server: SimulatedServer) -> None:
        node, stats, handler = server.memory_node, server.engine.stats(), server.handler
        runner = server.engine.runner
        most_leased = int(runner.num_pages * server.config.kv_overcommit)
        page_bytes = runner.page_size * WIDTH * _FLOAT32_BYTES
        num_sessions = len(self._plan.clients) * _MAX_SESSIONS_PER_CLIENT
        most = _MAX_TASKS_PER_SESSION * (4 + num_sessions)
        held = {
            "queued bytes": (handler.queued_bytes, server.config.max_queued_mib << 20),
            "replay bytes": (handler.replay_bytes, 2 * stats.pages_leased * page_bytes),
            "kept input bytes": (stats.kept_input_bytes, most_leased * page_bytes),
            "pages": (stats.pages_used, runner.num_pages),
            "leased pages": (stats.pages_leased, most_leased),
            "tasks": (len(node.tasks), most),
            "streams": (len(node.streams), most),
        }
        for name, (count, limit) in held.items():
            if count > limit and (number, name) not in self._over:
                self._over[number, name] = None
                self._violation(f"server {number} has {count} {name}, of {limit} at most")

    def check_refusals(self, number: int, server: SimulatedServer) -> None:
        """Check that no honest node has breached the protocol."""
        if self._has_liars:
            return
        for reason, count in server.handler.counters.items():
            if reason.partition(".")[2] in _NEVER_REFUSED:
                self._violation(f"server {number} has refused {count} times: {reason}")

    def check_nothing_is_held(self, managers: Iterable[ChainManager]) -> None:
        """Check that nothing is held when all sessions are over."""
        for client, manager in enumerate(managers):
            streams = getattr(manager.view.node, "streams", ())
            if num_open := sum(stream.protocol != PING for stream in streams):
                self._violation(f"client {client} still holds {num_open} streams")
        for number, server in self._servers.items():
            self.check_refusals(number, server)
            stats, handler = server.engine.stats(), server.handler
            held = {
                "sessions": handler.num_sessions,
                "engine sessions": stats.num_sessions,
                "pages": stats.pages_used,
                "leased pages": stats.pages_leased,
                "queued bytes": handler.queued_bytes,
                "replay bytes": handler.replay_bytes,
                "kept input bytes": stats.kept_input_bytes,
                "streams": sum(stream.protocol != PING for stream in server.memory_node.streams),
            }
            still = {name: count for name, count in held.items() if count}
            if still:
                self._violation(f"server {number} still holds {still}")

    def check_no_task_is_left(self) -> None:
        """Check that no task is left when all nodes are closed."""
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        left = [task for task in left if not task.done()]
        if left:
            names = sorted({str(task.get_coro()).split(" at ")[0] for task in left})
            self._violation(f"{len(left)} tasks are left: {names[:4]}")


def _excuses(injected: InjectedFault, server: int, client: int, now_s: float) -> bool:
    """Whether a fault may be why a client bans a server."""
    if now_s > injected.until_s + _AFTERMATH_S:
        return False
    fault = injected.fault
    if fault.kind in LINK_FAULTS:
        return {fault.first, fault.second} == {server, client}
    return fault.first == server and fault.kind not in ("join", "directory")
