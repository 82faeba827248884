"""Bans: servers that a client does not use for a while. `edge_suspicion.py` has pairs of servers.

Decisions only: the chain manager says whom to ban, and nothing here touches the network. The length
of a ban depends on how often the client has had to ban the server lately, and on nothing that the
server says. Times are of the monotonic clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from planetserve.clock import Clock
from planetserve.types import PeerId

MAX_SERVERS = 1024
"""Maximum servers to remember; the one that was banned longest ago is forgotten first."""

_MAX_DOUBLINGS = 3
_REMEMBERED_S = 600.0
"""Seconds after a ban in which the next one is twice as long, up to 2^3 times the first."""


@dataclass(slots=True)
class _Ban:
    since_s: float
    until_s: float
    num_before: int = 0


class Bans:
    """The bans of one client, over all its sessions."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._bans: OrderedDict[PeerId, _Ban] = OrderedDict()

    def ban(self, peer_ids: Iterable[PeerId], for_s: float) -> None:
        """Ban these servers for `for_s` seconds, or longer if it is not the first time.

        A ban that is under way, as when several sessions of a server fail at once, stays as it is.
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
        """End the bans of these servers; how often they were banned is not forgotten."""
        now_s = self._clock.monotonic()
        for peer_id in peer_ids:
            if (ban := self._bans.get(peer_id)) is not None:
                ban.until_s = now_s

    def banned(self) -> list[PeerId]:
        """Servers that are banned now, the one banned longest ago first."""
        now_s = self._clock.monotonic()
        return [peer_id for peer_id, ban in self._bans.items() if ban.until_s > now_s]
