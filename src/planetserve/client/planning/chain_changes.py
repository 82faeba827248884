"""Remembers why sessions of this client changed servers lately, for whoever shows or counts it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from planetserve.clock import Clock
from planetserve.errors import Blame, PlanetServeError, one_line
from planetserve.types import PeerId

_MAX_REMEMBERED = 64
_MAX_PEERS = 8
_MAX_TEXT_CHARS = 300

LEAVING = "leaving"
BETTER_CHAIN = "better_chain"


@dataclass(frozen=True, slots=True)
class ChainChange:
    """One failure, or one move without a failure."""

    at_s: float
    """Unix time."""
    reason: str
    """Code of the error; or `leaving`, `better_chain`."""
    peer_ids: tuple[PeerId, ...]
    """The servers that were at fault, or that a session leaves; empty if unknown."""
    text: str


class ChainChanges:
    """The latest changes of one client. A server's words are cut to size and printable.

    Args:
        clock: source of wall-clock time.
    """

    def __init__(self, clock: Clock):
        self._clock = clock
        self.recent: deque[ChainChange] = deque(maxlen=_MAX_REMEMBERED)
        """Oldest first."""
        self.listeners: list[Callable[[ChainChange], None]] = []

    def failed(self, error: PlanetServeError, culprits: Iterable[PeerId]) -> None:
        """A step or the opening of a chain failed. What is the caller's own fault is left out."""
        if error.blame is Blame.LOCAL:
            return
        named = [one.peer_id for one in (error, *error.others) if one.peer_id is not None]
        self.add(error.code, [*culprits, *named, *(error.edge or ())], str(error))

    def add(self, reason: str, peer_ids: Iterable[PeerId], text: str) -> None:
        """A session leaves these servers."""
        peers = tuple(dict.fromkeys(peer_ids))[:_MAX_PEERS]
        change = ChainChange(self._clock.unix(), reason, peers, one_line(text, _MAX_TEXT_CHARS))
        self.recent.append(change)
        for listener in self.listeners:
            listener(change)
