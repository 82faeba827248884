"""Admission to the KV cache: how many pages each session may use.

A lease is a promise made when a session opens: the engine thread can give the session that many
pages. A session may grow past its lease while pages are unleased. A request that cannot be promised
is refused at once; no request waits.

Most sessions never use all that they lease, so more pages may be promised than exist
(`overcommit`). If sessions use more pages than exist, some lose theirs for a while
(`preemption.py`); during that time nothing is promised beyond the pages that exist.

Owned by the event loop's thread; the pages themselves belong to the engine thread. A closed lease
may be promised again immediately, because the engine hears of the close before it hears of any
session that is opened later.
"""

from __future__ import annotations

from dataclasses import dataclass

from planetserve.clock import Clock
from planetserve.errors import CacheExhausted, ConfigError, SessionError

_MIN_RETRY_S = 0.5
_MAX_RETRY_S = 60.0
_FIRST_LIFETIME_GUESS_S = 10.0
_LIFETIME_WEIGHT = 0.2


@dataclass(slots=True)
class _Reservation:
    peer_id: str
    num_rows: int
    num_pages: int
    opened_at_s: float


class KvReservations:
    """The leases of all sessions over `total_pages`.

    While other peers hold pages, a peer may hold its share (`max_peer_share`). A peer that is alone
    may hold everything. The part above its share is taken back when another peer needs it for its
    own share (`over_share`), so memory is not left idle, and no single peer can keep the others
    out.

    Args:
        total_pages: pages of the KV cache.
        page_size: tokens per page.
        clock: tells how long sessions live, from which `retry_after_s` is estimated.
        max_peer_share: largest fraction of the promised pages that one peer's sessions may lease
            while others hold any; 1: no limit.
        overcommit: promised pages divided by existing pages. One session gets all existing pages at
            most.
        state_pages: pages that the states of one row take besides those of its tokens.
    """

    def __init__(
        self,
        total_pages: int,
        page_size: int,
        clock: Clock,
        max_peer_share: float = 1.0,
        overcommit: float = 1.0,
        state_pages: int = 0,
    ):
        if total_pages < 1 or page_size < 1 or not 0 < max_peer_share <= 1 or overcommit < 1:
            raise ConfigError(
                f"a KV cache of {total_pages} pages of {page_size} tokens with a peer share of "
                f"{max_peer_share} and an overcommit of {overcommit} cannot serve; give positive "
                "sizes, a share in (0, 1] and at least 1"
            )
        self.is_short = False
        """Whether sessions wait for pages; then only what exists is promised. Set by the owner."""
        self._total_pages = total_pages
        self._max_promised_pages = int(total_pages * overcommit)
        self._page_size = page_size
        self._state_pages = state_pages
        self._clock = clock
        self._max_peer_pages = max(1, int(self._max_promised_pages * max_peer_share))
        self._reservations: dict[bytes, _Reservation] = {}
        self._peer_pages: dict[str, int] = {}
        self._lifetime_s = _FIRST_LIFETIME_GUESS_S

    @property
    def leased_pages(self) -> int:
        return sum(self._peer_pages.values())

    @property
    def free_tokens(self) -> int:
        """Tokens that a new session of one row could still lease."""
        free = min(self._total_pages, self._free_pages) - self._state_pages
        return max(0, free) * self._page_size

    @property
    def _free_pages(self) -> int:
        limit = self._total_pages if self.is_short else self._max_promised_pages
        return max(0, limit - self.leased_pages)

    def __len__(self) -> int:
        return len(self._reservations)

    def __contains__(self, session_id: object) -> bool:
        return session_id in self._reservations

    def open(self, session_id: bytes, peer_id: str, num_rows: int, max_length: int) -> None:
        """Promise `num_rows` rows of `max_length` tokens.

        Raises:
            CacheExhausted: the pages are promised to others, or the peer has its share.
            SessionError: the session is open already.
        """
        if session_id in self._reservations:
            raise SessionError("a session with this id is open already; use a new random id")
        num_pages = num_rows * self._pages_of(max_length)
        self._check_room(peer_id, num_pages, num_pages)
        self._reservations[session_id] = _Reservation(
            peer_id, num_rows, num_pages, self._clock.monotonic()
        )
        self._peer_pages[peer_id] = self._peer_pages.get(peer_id, 0) + num_pages

    def ensure(self, session_id: bytes, length: int) -> None:
        """Grow the lease if rows of `length` tokens do not fit it.

        Raises:
            CacheExhausted: the missing pages are promised to others, or the peer has its share.
            SessionError: the session is not open.
        """
        lease = self._reservations.get(session_id)
        if lease is None:
            raise SessionError("no session with this id is open here")
        missing = lease.num_rows * self._pages_of(length) - lease.num_pages
        if missing > 0:
            self._check_room(lease.peer_id, missing, lease.num_pages + missing)
            lease.num_pages += missing
            self._peer_pages[lease.peer_id] += missing

    def ensure_tokens(self, session_id: bytes, num_tokens: int) -> None:
        """Grow the lease if a step of `num_tokens`, however they are spread over rows, exceeds it.

        Raises as `ensure` does.
        """
        lease = self._reservations.get(session_id)
        if lease is None:
            raise SessionError("no session with this id is open here")
        self.ensure(session_id, -(-num_tokens // lease.num_rows))

    def over_share(self, peer_id: str, num_rows: int, max_length: int) -> list[bytes]:
        """Sessions to end so that `peer_id` can lease so much within its share.

        Of the peers above their share, the one that holds most loses its newest session first. A
        peer stops losing sessions once it is within its share. Empty if that would not make enough
        room.
        """
        wanted = num_rows * self._pages_of(max_length)
        within_share = self._peer_pages.get(peer_id, 0) + wanted <= self._max_peer_pages
        if not within_share or wanted > self._total_pages:
            return []
        free = self._free_pages
        held = {peer: n for peer, n in self._peer_pages.items() if peer != peer_id}
        # Dictionaries keep the order in which sessions were opened.
        newest = [(key, lease) for key, lease in reversed(self._reservations.items())]
        ended: list[bytes] = []
        while free < wanted:
            most = max(held, key=lambda peer: held[peer], default=None)
            if most is None or held[most] <= self._max_peer_pages:
                return []
            key, lease = next(
                item for item in newest if item[1].peer_id == most and item[0] not in ended
            )
            ended.append(key)
            held[most] -= lease.num_pages
            free += lease.num_pages
        return ended

    def leased_tokens(self, session_id: bytes) -> int:
        """Tokens that a session's lease holds, all rows together; 0 if it is not open."""
        lease = self._reservations.get(session_id)
        if lease is None:
            return 0
        return (lease.num_pages - lease.num_rows * self._state_pages) * self._page_size

    def close(self, session_id: bytes) -> None:
        """Take the promise back; closing twice does nothing."""
        lease = self._reservations.pop(session_id, None)
        if lease is None:
            return
        left = self._peer_pages[lease.peer_id] - lease.num_pages
        if left:
            self._peer_pages[lease.peer_id] = left
        else:
            del self._peer_pages[lease.peer_id]
        lifetime_s = self._clock.monotonic() - lease.opened_at_s
        self._lifetime_s += _LIFETIME_WEIGHT * (lifetime_s - self._lifetime_s)

    def _pages_of(self, length: int) -> int:
        """Pages of a row of so many tokens."""
        return -(-length // self._page_size) + self._state_pages

    def _check_room(self, peer_id: str, num_pages: int, session_pages: int) -> None:
        if session_pages > self._total_pages:
            raise CacheExhausted(
                f"a session of {session_pages * self._page_size} tokens does not fit into the "
                f"{self._total_pages * self._page_size} of KV cache here",
                _MAX_RETRY_S,
            )
        free = self._free_pages
        if num_pages > free:
            raise CacheExhausted(
                f"{num_pages * self._page_size} tokens of KV cache are needed, "
                f"{free * self._page_size} are free",
                self._retry_after_s(),
            )
        held = self._peer_pages.get(peer_id, 0)
        is_alone = held == self.leased_pages
        if not is_alone and held + num_pages > self._max_peer_pages:
            raise CacheExhausted(
                f"one peer may hold {self._max_peer_pages * self._page_size} of the "
                f"{self._max_promised_pages * self._page_size} tokens of KV cache promised here "
                "while others hold "
                f"some, and holds {held * self._page_size}; close a session first, or start the "
                "server with a larger --max_peer_kv_share",
                self._retry_after_s(),
            )

    def _retry_after_s(self) -> float:
        # With n sessions of mean lifetime L, one is expected to end within L / n.
        expected_s = self._lifetime_s / max(1, len(self._reservations))
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, expected_s))
