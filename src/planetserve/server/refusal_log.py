"""Counts what was refused, by reason, and logs it without letting a peer fill the log.

A reason is one of the few words that `handler.py` chooses: nothing that a peer sent is counted
under its own name or logged. Each peer gets one log line at its first refusal and then at most one
per `LOG_PERIOD_S`, which sums up what came in between.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from planetserve.clock import Clock
from planetserve.types import PeerId

logger = logging.getLogger(__name__)

LOG_PERIOD_S = 60.0
MAX_PEERS = 1024
"""Peers whose refusals are summed up; of further ones each refusal counts as a first."""


@dataclass(slots=True)
class _Quiet:
    until_s: float
    unlogged: Counter[str] = field(default_factory=Counter)


class RefusalLog:
    """How often what was refused, on this server and since it started."""

    def __init__(self, clock: Clock):
        self.counts: Counter[str] = Counter()
        self._clock = clock
        self._peers: OrderedDict[PeerId, _Quiet] = OrderedDict()

    def add(self, reason: str, peer: PeerId) -> None:
        """Count one refusal of something that `peer` sent, and log it when it is time to."""
        self.counts[reason] += 1
        now_s = self._clock.monotonic()
        quiet = self._peers.get(peer)
        if quiet is None:
            quiet = self._peers[peer] = _Quiet(now_s)
            if len(self._peers) > MAX_PEERS:
                self._peers.popitem(last=False)
        self._peers.move_to_end(peer)
        quiet.unlogged[reason] += 1
        if now_s >= quiet.until_s:
            named = ", ".join(f"{name} x{count}" for name, count in quiet.unlogged.most_common(8))
            logger.info("refused from …%s: %s", peer[-6:], named)
            quiet.until_s = now_s + LOG_PERIOD_S
            quiet.unlogged.clear()

    def log_totals(self) -> None:
        """Log all counts, if there are any."""
        if self.counts:
            named = ", ".join(f"{name} x{count}" for name, count in self.counts.most_common())
            logger.info("refused since the start: %s", named)
