"""What one client knows of each peer: the only owner of it, and the only door to it.

Whoever sees what a peer does writes it here, one method for each kind of evidence. Planning reads
`PlanInputs`, a frozen copy that a plan in another thread may use as well. The book itself belongs
to the event loop. It is bounded: `bans.py`, `edge_suspicion.py` and `swarm/ewma.py` forget the
peers that they heard of longest ago.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from planetserve.client.planning.bans import Bans
from planetserve.client.planning.edge_suspicion import Edge, EdgeSuspicions
from planetserve.client.planning.latency_feedback import LatencyFeedback
from planetserve.clock import Clock
from planetserve.swarm.ewma import PeerEwma
from planetserve.swarm.ping import whom_to_ping
from planetserve.types import Chain, PeerId, ServerInfo

_MAX_MEASURED = 256
"""Peers whose round-trip time, load and latency are remembered."""


@dataclass(frozen=True, slots=True)
class PlanInputs:
    """What one plan is made from. Nobody changes it."""

    servers: tuple[ServerInfo, ...]
    """Records of the servers that may be used, with the loads that the client expects."""
    rtt_ms: Mapping[PeerId, float]
    """Round-trip times that the client measured."""
    avoided_edges: Mapping[Edge, float]
    """Pairs of servers that had trouble with each other, and how much speaks against each."""

    def only(self, servers: Iterable[ServerInfo]) -> PlanInputs:
        """The same inputs with these servers instead."""
        return dataclasses.replace(self, servers=tuple(servers))

    def is_suspect(self, chain: Chain) -> bool:
        """Whether a hop of the chain had trouble with another server."""
        suspects = {peer for edge in self.avoided_edges for peer in edge}
        return any(hop.peer_id in suspects for hop in chain)


class PeerBook:
    """One client's, over all its sessions.

    Args:
        avoid_s: how long two servers are not made neighbours after their first trouble.
        clock: source of monotonic time.
    """

    def __init__(self, avoid_s: float, clock: Clock):
        self._rtt_ms = PeerEwma(_MAX_MEASURED, clock)
        self._bans = Bans(clock)
        self._edges = EdgeSuspicions(avoid_s, clock)
        self._latency = LatencyFeedback(_MAX_MEASURED, clock)

    def record_rtt(self, peer_id: PeerId, rtt_ms: float) -> None:
        """A ping took this long."""
        self._rtt_ms.add(peer_id, rtt_ms)

    def rtt_ms(self) -> dict[PeerId, float]:
        """Round-trip times that were measured lately."""
        return self._rtt_ms.snapshot()

    def record_loads(
        self, chain: Chain, loads_ms: Mapping[PeerId, float], elapsed_ms: float
    ) -> None:
        """Hops of `chain` reported these times per block with a step that took `elapsed_ms`."""
        self._latency.record_loads(chain, loads_ms, elapsed_ms)

    def record_latency(self, chain: Chain, predicted_ms: float, measured_ms: float) -> None:
        """A chain took `measured_ms` per token, and `predicted_ms` by what its hops announce."""
        self._latency.record_latency(chain, predicted_ms, measured_ms)

    def suspect_edge(self, edge: Edge) -> list[PeerId]:
        """Something went wrong between two peers; returns who is at fault for certain."""
        return self._edges.add(edge)

    def suspect_chain(self, peers: Sequence[PeerId]) -> list[PeerId]:
        """Any of the hops may have caused a fault; returns who is at fault for certain."""
        return self._edges.add_chain(peers)

    def ban(self, peer_ids: Iterable[PeerId], for_s: float) -> None:
        """Leave these servers out of plans for `for_s` seconds, or longer if it happens again."""
        self._bans.ban(peer_ids, for_s)

    def lift_bans(self, peer_ids: Iterable[PeerId]) -> None:
        """Put these servers back into plans. How often they were banned is not forgotten."""
        self._bans.lift(peer_ids)

    def banned(self) -> list[PeerId]:
        """Servers that are banned now, the one banned longest ago first."""
        return self._bans.banned()

    def avoided_edges(self) -> dict[Edge, float]:
        """Pairs that should not be neighbours now, and how much speaks against each."""
        return self._edges.avoided()

    def whom_to_ping(
        self,
        candidates: Iterable[PeerId],
        *,
        unmeasured_s: float,
        most: int,
        keep: int,
        rng: random.Random,
    ) -> list[PeerId]:
        """At most `most` of the candidates that were not measured for `unmeasured_s` seconds; see
        `swarm/ping.py` for which."""
        due = [peer_id for peer_id in candidates if self._rtt_ms.age_s(peer_id) > unmeasured_s]
        return whom_to_ping(due, self._rtt_ms, most=most, keep=keep, rng=rng)

    def plan_inputs(
        self, servers: Iterable[ServerInfo], *, with_penalties: bool = True
    ) -> PlanInputs:
        """A copy of what a plan over these servers needs, as of now.

        Args:
            servers: the announced records; those of banned servers are left out.
            with_penalties: whether servers of chains that were slower than predicted count as
                slower than they say.
        """
        banned = set(self._bans.banned())
        expected = (
            self._latency.with_penalty if with_penalties else self._latency.with_reported_load
        )
        usable = tuple(expected(info) for info in servers if info.peer_id not in banned)
        return PlanInputs(usable, self._rtt_ms.snapshot(), self._edges.avoided())
