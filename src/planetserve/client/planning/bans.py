"""Servers that a client leaves alone for a while; pairs of them are in `edge_suspicion.py`.

Decisions only: who is put here is the chain manager's to say, and nothing here touches the network.
How long a ban lasts follows from how often the client has had to ban the server lately and from
nothing that the server says. Times are of the monotonic clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from planetserve.clock import Clock
from planetserve.types import PeerId

MAX_SERVERS = 1024
"""The one that was banned longest ago is forgotten first."""

_MAX_DOUBLINGS = 3
_REMEMBERED_S = 600.0
"""A ban within this time of the one before is twice as long as that, up to 2^3 times the first."""


@dataclass(slots=True)
class _Ban:
    since_s: float
    until_s: float
    num_before: int = 0


class Bans:
    """One client's, over all its sessions."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._bans: OrderedDict[PeerId, _Ban] = OrderedDict()

    def ban(self, peer_ids: Iterable[PeerId], for_s: float) -> None:
        """Do without these servers for `for_s` seconds, or longer if it is not the first time.

        One that is left out already, as when several of its sessions fail at once, stays so.
        """
        now_s = self._clock.monotonic()
        for peer_id in peer_ids:
            ban = self._bans.setdefault(peer_id, _Ban(now_s, now_s + for_s))
            if ban.since_s + _REMEMBERED_S <= now_s:
                ban.num_before = 0
            elif ban.until_s <= now_s:
                ban.num_before = min(ban.num_before + 1, _MAX_DOUBLINGS)
            if ban.until_s <= now_s:
                ban.since_s, ban.until_s = now_s, now_s + for_s * 2**ban.num_before
            self._bans.move_to_end(peer_id)
        while len(self._bans) > MAX_SERVERS:
            self._bans.popitem(last=False)

    def lift(self, peer_ids: Iterable[PeerId]) -> None:
        """Give these servers another chance; how often they were banned is not forgotten."""
        now_s = self._clock.monotonic()
        for peer_id in peer_ids:
            if (ban := self._bans.get(peer_id)) is not None:
                ban.until_s = now_s

    def banned(self) -> list[PeerId]:
        """Servers to do without now, the one banned longest ago first."""
        now_s = self._clock.monotonic()
        return [peer_id for peer_id, ban in self._bans.items() if ban.until_s > now_s]
