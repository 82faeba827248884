"""What a node of the directory keeps for others: records, each until it ends, within limits.

Keys, records per key, records per owner and records in all are bounded. Records come from their
owners; of what a peer stores for others a little is taken, and gives way to what owners bring
themselves. When everything is full, an owner with few records takes the place of one with many.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.utils.timed_storage import TimedStorage

from planetserve.swarm.dht.hivemind_limits import MAX_RECORDS_PER_KEY

MAX_KEYS = 1024
MAX_RECORDS_PER_OWNER = 16
MAX_RECORDS = 16 * 1024
MAX_FOREIGN_PER_KEY = 4
"""Maximum number of records of others that one peer may store under a key."""
MAX_FOREIGN_PER_PEER = 16
MAX_FOREIGN = 1024
"""Maximum number of such records from all peers together."""
_ORDINARY_NUM_RECORDS = 4
"""Number of records of an ordinary owner: a server has its own and perhaps its model's."""

Unix = Callable[[], float]


class _Records(DictionaryDHTValue):
    """The records under one key."""

    def __init__(self, unix: Unix):
        super().__init__()
        self._unix = unix

    def _remove_outdated(self) -> None:
        if not self.frozen:
            _remove_ended(self, self._unix())

    def put(self, owner: str, value: bytes, expires_at_s: float) -> None:
        with self.freeze():  # hivemind would go by this machine's time
            self.store(owner, value, expires_at_s)
        _drop_ghosts(self)


class BoundedStorage(DHTLocalStorage):
    """Storage for dictionaries of records only. `get` returns a copy.

    Args:
        unix: the swarm's time.
    """

    def __init__(self, unix: Unix = time.time):
        super().__init__()
        self._unix = unix
        self._foreign: dict[tuple[DHTID, str], str] = {}
        """(Key, owner) of records that somebody else brought, and who."""

    def _remove_outdated(self) -> None:
        if not self.frozen:
            _remove_ended(self, self._unix())

    def get(self, key: DHTID) -> Any:
        """What is stored under a key: a dictionary that nobody else changes, or None."""
        found = super().get(key)
        if found is None:
            return None
        copy = DictionaryDHTValue()
        copy.frozen = True  # what has ended is gone already, by the swarm's time
        for subkey, item in found.value.items():
            copy.store(subkey, item.value, item.expiration_time)
        return type(found)(copy, found.expiration_time)

    def store(self, key: DHTID, value: bytes, expiration_time: float, subkey: Any = None) -> bool:
        """Store one record; plain values without a subkey are none of ours."""
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(
        self,
        key: DHTID,
        subkey: Any,
        value: bytes,
        expiration_time: float,
        sender: str | None = None,
    ) -> bool:
        """Store one record unless it has ended, a newer one is there or a limit is reached.

        Args:
            key: where.
            subkey: its owner.
            value: the record.
            expiration_time: when it ends, in the swarm's time.
            sender: who brings it; None for the owner.
        """
        if expiration_time < self._unix():
            return False
        found = super().get(key)
        records: _Records = found.value if found is not None else _Records(self._unix)
        present = records.get(subkey)
        if present is not None and present.expiration_time >= expiration_time:
            return bool(present.value == value)
        is_foreign = sender not in (None, subkey)
        if present is None:
            if is_foreign and not self._has_foreign_room(key, str(sender)):
                return False
            if not self._make_room(key, records, subkey, may_evict=not is_foreign):
                return False
        if is_foreign and present is None:
            self._foreign[key, subkey] = str(sender)
        elif not is_foreign:
            self._foreign.pop((key, subkey), None)
        records.put(subkey, value, expiration_time)
        if key not in self.data or expiration_time > self.data[key].expiration_time:
            with self.freeze():
                TimedStorage.store(self, key, records, expiration_time)
            _drop_ghosts(self)
        return True

    def _has_foreign_room(self, key: DHTID, sender: str) -> bool:
        for place, owner in list(self._foreign):
            if place not in self or owner not in self.data[place].value:
                del self._foreign[place, owner]
        mine = [place for (place, _), who in self._foreign.items() if who == sender]
        return (
            len(self._foreign) < MAX_FOREIGN
            and len(mine) < MAX_FOREIGN_PER_PEER
            and mine.count(key) < MAX_FOREIGN_PER_KEY
        )

    def _make_room(self, key: DHTID, records: _Records, owner: str, *, may_evict: bool) -> bool:
        """Whether there is room for one more record, if need be of another's."""
        others = [item.value for item in self.data.values()]
        num_own = sum(owner in other for other in others)
        if num_own >= MAX_RECORDS_PER_OWNER:
            return False
        if len(records) >= MAX_RECORDS_PER_KEY:
            guest = next((name for place, name in self._foreign if place == key), None)
            if not may_evict or guest is None:
                return False
            self._remove(key, guest)
        is_full = sum(map(len, others)) >= MAX_RECORDS
        if not is_full and (key in self.data or len(self) < MAX_KEYS):
            return True
        return may_evict and self._evict_of_the_richest(num_own, whole_key=not is_full)

    def _evict_of_the_richest(self, num_own: int, *, whole_key: bool) -> bool:
        """Remove a record, or all of a key, of owners that have many more than the newcomer."""
        numbers = Counter(owner for item in self.data.values() for owner in item.value.data)
        many = max(num_own + 1, _ORDINARY_NUM_RECORDS)
        rich = {owner for owner, number in numbers.items() if number > many}
        if whole_key:
            theirs = [key for key, item in self.data.items() if rich >= item.value.data.keys()]
            victims = min(theirs, key=lambda key: len(self.data[key].value), default=None)
            for owner in [] if victims is None else list(self.data[victims].value.data):
                self._remove(victims, owner)
            return victims is not None
        richest = max(rich, key=numbers.__getitem__, default="")
        for key, item in self.data.items():
            if richest in item.value.data:
                self._remove(key, richest)
                return True
        return False

    def _remove(self, key: DHTID, owner: str) -> None:
        records = self.data[key].value
        del records[owner]
        self._foreign.pop((key, owner), None)
        if not records.data:
            del self[key]


def _remove_ended(storage: Any, now_s: float) -> None:
    heap = storage.expiration_heap
    while heap and heap[0].expiration_time < now_s:
        entry = heapq.heappop(heap)
        if storage.key_to_heap.get(entry.key) == entry:
            del storage.data[entry.key], storage.key_to_heap[entry.key]


def _drop_ghosts(storage: Any) -> None:
    """Rebuild an expiry heap that is mostly entries of replaced records."""
    if len(storage.expiration_heap) > 2 * len(storage.data) + 16:
        storage.expiration_heap = list(storage.key_to_heap.values())
        heapq.heapify(storage.expiration_heap)
