"""A search for the peers nearest to keys that none of the peers on the way can stall or steer.

As in Kademlia, peers are asked for peers nearer to a key until the nearest that *answer* have all
been asked. Whatever a peer may say:

- `always`, the initial peers, are asked in any case; those that this node knows of its own come
  before those that others have named.
- Only who answers counts among the nearest, so made-up peers keep nobody from being asked.
- Of those that one peer names, few are dialled at once, and none any more when several did not
  answer. That, and who did not answer, is remembered for a while.
- Time is bounded: what was found by then counts.

Pure but for the event loop: `Ask` does the asking.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from bisect import bisect_left, insort
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from planetserve.clock import Clock

logger = logging.getLogger(__name__)

NUM_NEAREST = 20
"""Number of nearest peers that must answer for each key, if there are as many."""
MAX_NAMED = 20
"""Maximum number of peers that one answer may name for a key."""
_MAX_KNOWN = 1024
_KEYS_PER_CALL = 2
"""Keys per call; the answer for one key may have a megabyte."""
_PARALLEL = 32
_PARALLEL_PER_NAMER = 4
_DEAD_PER_NAMER = 4
"""Maximum by which the peers that one peer names and that do not answer may outnumber those that
do."""
_LAST_CHANCE_S = 1.0
"""Seconds to wait, once others have answered, for initial peers that did not answer last time."""
_MAX_REMEMBERED = 4096
_FAILED_FOR_S = 15.0
_MISLED_FOR_S = 120.0

Ask = Callable[[bytes, Sequence[int], bool], Awaitable[Mapping[int, Collection[bytes]] | None]]
"""Asks a peer, by its id, for keys; the flag says that this node knows it only by name. Returns the
peers that it names for each, or None if it did not answer."""


class _RecentPeers:
    """Peers that something happened with lately, `_MAX_REMEMBERED` at most."""

    def __init__(self, clock: Clock, for_s: float):
        self._clock = clock
        self._for_s = for_s
        self._until_s: OrderedDict[bytes, float] = OrderedDict()

    def add(self, peer: bytes) -> None:
        self._until_s[peer] = self._clock.monotonic() + self._for_s
        self._until_s.move_to_end(peer)
        if len(self._until_s) > _MAX_REMEMBERED:
            self._until_s.popitem(last=False)

    def remove(self, peer: bytes) -> None:
        self._until_s.pop(peer, None)

    def __contains__(self, peer: bytes) -> bool:
        return self._until_s.get(peer, 0.0) > self._clock.monotonic()


class PeerMemory:
    """Which peers did not answer lately, and which named too many that did not."""

    def __init__(self, clock: Clock):
        self._silent = _RecentPeers(clock, _FAILED_FOR_S)
        self._misleading = _RecentPeers(clock, _MISLED_FOR_S)

    def note_silent(self, peer: bytes) -> None:
        """It did not answer."""
        self._silent.add(peer)

    def note_misleading(self, peer: bytes) -> None:
        """It named too many that did not answer."""
        self._misleading.add(peer)

    def note_answer(self, peer: bytes) -> None:
        """It answered after all."""
        self._silent.remove(peer)

    def is_silent(self, peer: bytes) -> bool:
        """Whether it did not answer lately."""
        return peer in self._silent

    def is_misleading(self, peer: bytes) -> bool:
        """Whether it lately named too many that did not answer."""
        return peer in self._misleading


class Search:
    """One search. Make it, `run` it once.

    Args:
        keys: places to find the nearest peers of.
        ask: how to ask a peer.
        always: peers that are asked for every key.
        known: other peers that this node knows of its own.
        memory: shared by the searches of a node.
        own: this node's id, which is not asked.
    """

    def __init__(
        self,
        keys: Sequence[int],
        ask: Ask,
        *,
        always: Collection[bytes],
        known: Collection[bytes],
        memory: PeerMemory,
        own: bytes,
    ):
        self._keys = tuple(dict.fromkeys(keys))
        self._ask = ask
        self._always = frozenset(always) - {own}
        self._trusted = self._always.union(known) - {own}
        self._memory = memory
        self._own = own
        self._places: dict[bytes, int] = {}
        self._left: dict[bytes, list[int]] = {}
        """For which keys a peer has not been asked."""
        self._namers: dict[bytes, set[bytes]] = {}
        """By whom those were named that this node does not know of its own."""
        self._near: dict[int, list[int]] = {key: [] for key in self._keys}
        """Distances of those that answered, or are known and being asked, in order."""
        self._answered: dict[int, list[tuple[int, bytes]]] = {key: [] for key in self._keys}
        self._failed: set[bytes] = set()
        self._credited: set[bytes] = set()
        self._under_way: Counter[bytes] = Counter()
        self._score: Counter[bytes] = Counter()
        """Of who names others: those that answered less those that did not."""
        for peer in self._trusted:
            self._add(peer)

    async def run(self, enough_s: float, timeout_s: float) -> None:
        """Search until the nearest have answered, or time is up.

        Args:
            enough_s: it is up after this, if anybody has answered by then.
            timeout_s: it is up after this.
        """
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        calls: dict[asyncio.Future[Mapping[int, Collection[bytes]] | None], _Call] = {}
        try:
            while True:
                while len(calls) < _PARALLEL and (call := self._next()) is not None:
                    self._begin(call)
                    asked = self._ask(call.peer, call.keys, call.peer not in self._trusted)
                    calls[asyncio.ensure_future(asked)] = call
                limit_s = timeout_s
                if any(self._answered.values()):
                    is_hopeful = any(call.is_promising for call in calls.values())
                    limit_s = enough_s if is_hopeful else min(enough_s, _LAST_CHANCE_S)
                left_s = began_s + limit_s - loop.time()
                if not calls or left_s <= 0:
                    return
                done, _ = await asyncio.wait(
                    calls, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
                )
                for future in done:
                    error = future.exception()
                    if error is not None:  # whatever a peer has caused ends nobody's search
                        logger.warning("a question failed: %s", type(error).__name__)
                    self._end(calls.pop(future), None if error else future.result())
        finally:
            for future in calls:
                future.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    def nearest(self, key: int) -> list[bytes]:
        """The peers that answered for a key, nearest first."""
        return [peer for _, peer in sorted(self._answered[key])]

    def _add(self, peer: bytes) -> None:
        self._places[peer] = place_of(peer)
        self._left[peer] = list(self._keys)

    def _next(self) -> _Call | None:
        """Whom to ask next: the nearest to a key, known ones first."""
        best: tuple[tuple[bool, int, int], bytes, bytes | None] | None = None
        for peer, left in self._left.items():
            namer = None
            if peer not in self._trusted:
                namer = self._namer_of(peer)
                if namer is None:
                    continue
            if peer not in self._always and self._memory.is_silent(peer):
                continue
            place = self._places[peer]
            distances = [key ^ place for key in left if self._is_wanted(peer, key)]
            if not distances:
                continue
            rank = (namer is not None, self._under_way[namer or b""], min(distances))
            if best is None or rank < best[0]:
                best = rank, peer, namer
        if best is None:
            return None
        _, peer, namer = best
        wanted = [key for key in self._left[peer] if self._is_wanted(peer, key)]
        wanted.sort(key=lambda key: key ^ self._places[peer])
        is_promising = not self._memory.is_silent(peer)
        return _Call(peer, tuple(wanted[:_KEYS_PER_CALL]), namer, is_promising)

    def _is_wanted(self, peer: bytes, key: int) -> bool:
        distance = key ^ self._places[peer]
        return peer in self._always or bisect_left(self._near[key], distance) < NUM_NEAREST

    def _namer_of(self, peer: bytes) -> bytes | None:
        """Of those that named a peer, one whose word still counts, with the fewest dialled."""
        able = [
            namer
            for namer in self._namers[peer]
            if self._under_way[namer] < _PARALLEL_PER_NAMER
            and self._score[namer] > -_DEAD_PER_NAMER
            and not self._memory.is_misleading(namer)
        ]
        return min(able, key=self._under_way.__getitem__, default=None)

    def _begin(self, call: _Call) -> None:
        left = [key for key in self._left[call.peer] if key not in call.keys]
        if left:
            self._left[call.peer] = left
        else:
            del self._left[call.peer]
        if call.namer is not None:
            self._under_way[call.namer] += 1
        elif call.is_promising:
            self._count(call, 1)

    def _count(self, call: _Call, by: int) -> None:
        for key in call.keys:
            distance = key ^ self._places[call.peer]
            if by > 0:
                insort(self._near[key], distance)
            else:
                self._near[key].remove(distance)

    def _end(self, call: _Call, named: Mapping[int, Collection[bytes]] | None) -> None:
        is_counted = call.namer is None and call.is_promising
        if call.namer is not None:
            self._under_way[call.namer] -= 1
        if named is None:
            if is_counted:
                self._count(call, -1)
            self._fail(call.peer)
            return
        if not is_counted:
            self._count(call, 1)
        self._memory.note_answer(call.peer)
        if call.peer not in self._credited:
            self._credited.add(call.peer)
            self._score.update(self._namers.get(call.peer, ()))
        for key in call.keys:
            self._answered[key].append((key ^ self._places[call.peer], call.peer))
        for peers in named.values():
            for peer in list(peers)[:MAX_NAMED]:
                self._name(call.peer, peer)

    def _fail(self, peer: bytes) -> None:
        self._left.pop(peer, None)
        if peer in self._failed:
            return
        self._failed.add(peer)
        self._memory.note_silent(peer)
        for namer in self._namers.get(peer, ()):
            self._score[namer] -= 1
            if self._score[namer] <= -_DEAD_PER_NAMER:
                self._memory.note_misleading(namer)

    def _name(self, namer: bytes, peer: bytes) -> None:
        if peer == self._own or peer in self._trusted or self._memory.is_misleading(namer):
            return
        if peer not in self._places:
            if len(self._places) >= _MAX_KNOWN:
                return
            self._add(peer)
        self._namers.setdefault(peer, set()).add(namer)


class _Call:
    """One question: to whom, for which keys, on whose word."""

    __slots__ = ("is_promising", "keys", "namer", "peer")

    def __init__(self, peer: bytes, keys: tuple[int, ...], namer: bytes | None, is_promising: bool):
        self.peer = peer
        self.keys = keys
        self.namer = namer
        self.is_promising = is_promising


def place_of(peer: bytes) -> int:
    """Where in the directory a peer stands, which nobody can choose."""
    return int.from_bytes(hashlib.sha1(peer, usedforsecurity=False).digest(), "big")
