"""What a client knows of servers better than their records: loads of now, promises that were kept.

Every step brings the loads of its hops; for a while they count instead of what was announced. And
a chain takes as long as it takes: predictions may all be off by a factor that is the client's own,
but a chain that is off by much more than what is usual speaks against its servers, all alike, until
other chains show which of them it is.
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
"""As long as an announcement is old at most, by default."""
_NUM_RATIOS = 64
_LEAST_RATIOS = 4
_SUSPICIOUS = 1.5
_LEAST_MS = 1e-3


class LatencyFeedback:
    """One client's, over all its sessions."""

    def __init__(self, max_peers: int, clock: Clock):
        self._loads_ms = PeerEwma(max_peers, clock, _LOAD_AGE_S)
        self._extra_ms = PeerEwma(max_peers, clock)
        self._ratios: deque[float] = deque(maxlen=_NUM_RATIOS)

    def note_loads(self, chain: Chain, loads_ms: Mapping[PeerId, float], elapsed_ms: float) -> None:
        """Count in what hops of `chain` said of their time per block with a step, which took
        `elapsed_ms` in all.

        What they say comes through the hops after them, which could make it anything: all of it
        together counts for no more than the step took.
        """
        said_ms = sum(loads_ms.get(hop.peer_id, 0.0) * (hop.end - hop.start) for hop in chain)
        scale = min(1.0, elapsed_ms / max(said_ms, _LEAST_MS))
        for peer_id, ms in loads_ms.items():
            self._loads_ms.add(peer_id, scale * ms)

    def judge(self, chain: Chain, predicted_ms: float, measured_ms: float) -> None:
        """Count in what a chain promised by its hops' word and what it took, per token."""
        self._ratios.append(measured_ms / max(predicted_ms, _LEAST_MS))
        extra_ms = 0.0
        if len(self._ratios) >= _LEAST_RATIOS:
            usual = statistics.quantiles(self._ratios, n=4)[0]
            extra_ms = max(0.0, measured_ms - _SUSPICIOUS * usual * predicted_ms)
        num_blocks = sum(hop.end - hop.start for hop in chain)
        for peer_id in {hop.peer_id for hop in chain}:
            self._extra_ms.add(peer_id, extra_ms / num_blocks)

    def loaded(self, info: ServerInfo) -> ServerInfo:
        """The record with the load of now, by the server's own word."""
        ms = self._loads_ms.get(info.peer_id)
        return info if ms is None else dataclasses.replace(info, decode_ms_per_block=ms)

    def corrected(self, info: ServerInfo) -> ServerInfo:
        """The same with what speaks against the server added."""
        info = self.loaded(info)
        extra_ms = self._extra_ms.get(info.peer_id)
        if not extra_ms:
            return info
        return dataclasses.replace(info, decode_ms_per_block=info.decode_ms_per_block + extra_ms)
