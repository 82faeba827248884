"""Servers that a client leaves alone for a while; pairs of them are in `quarrels.py`.

Decisions only: who is put here and for how long is the chain manager's to say, and nothing here
touches the network. Times are of the monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from planetserve.clock import Clock
from planetserve.types import PeerId


class Bans:
    """One client's, over all its sessions."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._peers_until_s: dict[PeerId, float] = {}

    def ban(self, peer_ids: Iterable[PeerId], until_s: float) -> None:
        """Do without these servers until then, whatever was said of them before."""
        self._peers_until_s.update(dict.fromkeys(peer_ids, until_s))

    def lift(self, peer_ids: Iterable[PeerId]) -> None:
        """These servers are fine."""
        for peer_id in peer_ids:
            self._peers_until_s.pop(peer_id, None)

    def banned(self) -> list[PeerId]:
        """Servers to do without now, in the order in which they came here."""
        now_s = self._clock.monotonic()
        self._peers_until_s = {
            peer_id: until_s for peer_id, until_s in self._peers_until_s.items() if until_s > now_s
        }
        return list(self._peers_until_s)
