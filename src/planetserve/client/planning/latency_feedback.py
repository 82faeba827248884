"""Loads that servers report with steps, and penalties for chains slower than predicted.

Every step brings the loads of its hops, which replace the announced ones for a while. Predictions
may all be wrong by one factor, which is the client's own. A chain that is slower than its
prediction by much more than the usual factor gives a penalty to all its servers alike, until other
chains show which of them is slow.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import deque
from collections.abc import Mapping

from planetserve.clock import Clock
from planetserve.swarm.ewma import PeerEwma
from planetserve.types import Chain, PeerId, ServerInfo

_LOAD_AGE_S = 60.0
"""Seconds for which a reported load counts: the default maximum age of an announcement."""
_NUM_RATIOS = 64
_LEAST_RATIOS = 4
_SUSPICIOUS = 1.5
_LEAST_MS = 1e-3


class LatencyFeedback:
    """The feedback of one client, over all its sessions."""

    def __init__(self, max_peers: int, clock: Clock):
        self._loads_ms = PeerEwma(max_peers, clock, _LOAD_AGE_S)
        self._extra_ms = PeerEwma(max_peers, clock)
        self._ratios: deque[float] = deque(maxlen=_NUM_RATIOS)

    def record_loads(
        self, chain: Chain, loads_ms: Mapping[PeerId, float], elapsed_ms: float
    ) -> None:
        """Record the times per block that hops of `chain` reported with a step of `elapsed_ms`.

        A report passes through the later hops, which could change it to anything, so all reports
        together count for no more than the step took.
        """
        said_ms = sum(loads_ms.get(hop.peer_id, 0.0) * (hop.end - hop.start) for hop in chain)
        scale = min(1.0, elapsed_ms / max(said_ms, _LEAST_MS))
        for peer_id, ms in loads_ms.items():
            self._loads_ms.add(peer_id, scale * ms)

    def record_latency(self, chain: Chain, predicted_ms: float, measured_ms: float) -> None:
        """Record the predicted and the measured time per token of a chain."""
        self._ratios.append(measured_ms / max(predicted_ms, _LEAST_MS))
        extra_ms = 0.0
        if len(self._ratios) >= _LEAST_RATIOS:
            usual = statistics.quantiles(self._ratios, n=4)[0]
            extra_ms = max(0.0, measured_ms - _SUSPICIOUS * usual * predicted_ms)
        num_blocks = sum(hop.end - hop.start for hop in chain)
        for peer_id in {hop.peer_id for hop in chain}:
            self._extra_ms.add(peer_id, extra_ms / num_blocks)

    def with_reported_load(self, info: ServerInfo) -> ServerInfo:
        """The record with the load that the server reported last, if that is recent."""
        ms = self._loads_ms.get(info.peer_id)
        return info if ms is None else dataclasses.replace(info, decode_ms_per_block=ms)

    def with_penalty(self, info: ServerInfo) -> ServerInfo:
        """The record with the reported load and the server's penalty."""
        info = self.with_reported_load(info)
        extra_ms = self._extra_ms.get(info.peer_id)
        if not extra_ms:
            return info
        return dataclasses.replace(info, decode_ms_per_block=info.decode_ms_per_block + extra_ms)
