"""Whether a running session should move to another chain.

It should when another chain has been clearly better for several checks in a row (`replan_gain`,
`replan_checks`) and saves more time on the remaining tokens than filling the new hops costs. Then
it moves at every second check on average, so that sessions which see the same idle server do not
all move there at once. Decisions only: times come in as arguments.
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from planetserve.clock import Clock
from planetserve.config import ClientConfig
from planetserve.routing.snapshot import SwarmSnapshot
from planetserve.types import CLIENT, Chain, Hop

_NUM_STEPS = 16
_LEAST_STEPS = 8
"""Number of decode steps on one chain before it is judged, by the median of the latest."""
_MOVE_SHARE = 0.5
_SETUP_ROUND_TRIPS = 4
"""Number of round trips to connect, open, send keys and rewire."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Another chain for a session."""

    chain: Chain
    now_ms: float
    """Predicted time per token of the chain in use."""
    offered_ms: float
    """The same of the other one."""
    move_ms: float
    """Time to open and fill the hops that are new."""

    def is_worth(self, measured_ms: float, tokens_left: float, gain: float) -> bool:
        """Whether moving pays.

        Args:
            measured_ms: time per token of the chain in use, as measured.
            tokens_left: that the session will probably still decode.
            gain: minimum fraction of the present time per token that must be saved.
        """
        saved_ms = self.now_ms - self.offered_ms
        enough = saved_ms >= gain * max(self.now_ms, measured_ms)
        return enough and saved_ms * tokens_left > self.move_ms


class MigrationPolicy:
    """One session's decision to move. Fed with its steps and with offers."""

    def __init__(self, config: ClientConfig, clock: Clock, rng: random.Random | None = None):
        self._config = config
        self._clock = clock
        self._rng = rng or random.Random()
        self._chain: Chain | None = None
        self._steps_ms: deque[float] = deque(maxlen=_NUM_STEPS)
        self._num_good = 0
        self._next_check_s = clock.monotonic() + self._period_s()

    @property
    def measured_ms(self) -> float:
        """Median time of the latest decode steps on this chain."""
        return statistics.median(self._steps_ms)

    def count_step(self, chain: Chain, elapsed_ms: float) -> None:
        """A decode step has gone through `chain` undisturbed."""
        if chain != self._chain:
            self._chain, self._num_good = chain, 0
            self._steps_ms.clear()
        self._steps_ms.append(elapsed_ms)

    def is_due(self) -> bool:
        """Whether to look for another chain now; true once a period."""
        now_s = self._clock.monotonic()
        enough = len(self._steps_ms) >= _LEAST_STEPS
        if not self._config.replan_period or not enough or now_s < self._next_check_s:
            return False
        self._next_check_s = now_s + self._period_s()
        return True

    @property
    def may_decide(self) -> bool:
        """Whether the next check could make the session move."""
        return self._num_good + 1 >= self._config.replan_checks

    def decide(self, offer: Offer | None, tokens_left: float) -> Chain | None:
        """The chain to move to, after a check that has found this offer or none."""
        gain = self._config.replan_gain
        # The chain may have changed meanwhile; the new one has to be measured first.
        known = bool(self._steps_ms)
        if not known or offer is None or not offer.is_worth(self.measured_ms, tokens_left, gain):
            self._num_good = 0
            return None
        self._num_good += 1
        if self._num_good < self._config.replan_checks or self._rng.random() >= _MOVE_SHARE:
            return None
        return offer.chain

    def _period_s(self) -> float:
        return self._config.replan_period * self._rng.uniform(0.8, 1.2)


def new_hops(old: Sequence[Hop], new: Sequence[Hop]) -> tuple[int, int]:
    """How many hops two chains share at their beginning, and how many of the rest at their end."""
    first = 0
    while first < min(len(old), len(new)) and old[first] == new[first]:
        first += 1
    last = 0
    while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
        last += 1
    return first, last


def move_ms(snapshot: SwarmSnapshot, hops: Sequence[Hop], num_tokens: int, num_rows: int) -> float:
    """Time to open `hops` and to fill them one after the other with `num_tokens` per row.

    Args:
        snapshot: knows the hops.
        hops: those of a chain that are new, numbered as the snapshot numbers blocks.
    """
    servers = {server.id: server for server in snapshot.servers}
    setup_ms = _SETUP_ROUND_TRIPS * max(snapshot.rtt(CLIENT, hop.peer_id) for hop in hops)
    fill_ms = 0.0
    for hop in hops:
        server = servers[hop.peer_id]
        computed = num_tokens * num_rows * (hop.end - hop.start)
        fill_ms += 1000.0 * computed / server.tokens_per_s_per_block
        sent_bytes = num_tokens * snapshot.activation_bytes_per_token
        fill_ms += 1000.0 * sent_bytes / server.network_bytes_per_s
    return setup_ms + fill_ms
