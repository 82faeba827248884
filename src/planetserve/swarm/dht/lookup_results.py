"""What a look-up has found: of each owner the newest record, within limits.

Peer ids cost nothing, so every peer may answer with a full key of owners that it has made up, each
with a good signature. As many records as a key may hold count, whoever brings them. Beyond that an
answer adds a few, drawn by lot: a crowd neither keeps out what honest peers hold nor makes a
look-up check and keep records without end.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping

from planetserve.swarm.dht.hivemind_limits import MAX_RECORDS_PER_KEY
from planetserve.types import PeerId

MORE_PER_ANSWER = 16
"""Maximum number of owners that an answer may add to a full key."""
MAX_PER_KEY = 4 * MAX_RECORDS_PER_KEY

Records = Mapping[PeerId, tuple[bytes, float]]
"""By owner: the envelope, and when it ends."""


class LookupResults:
    """One look-up's, for the keys `keys`."""

    def __init__(self, keys: Collection[bytes]):
        self.records: dict[bytes, dict[PeerId, tuple[bytes, float]]] = {key: {} for key in keys}

    def choose(self, key: bytes, offered: Mapping[PeerId, float]) -> list[PeerId]:
        """Whose records of an answer are worth checking; `offered` says when each ends."""
        records = self.records[key]
        newer = [o for o, ends_s in offered.items() if o in records and records[o][1] < ends_s]
        others = [owner for owner in offered if owner not in records]
        most = max(MAX_RECORDS_PER_KEY - len(records), MORE_PER_ANSWER)
        most = min(most, max(0, MAX_PER_KEY - len(records)))
        if len(others) > most:
            others = random.sample(others, most)
        return newer + others

    def add(self, key: bytes, good: Records) -> None:
        """Take in what has been checked; another answer may have brought some of it meanwhile."""
        records = self.records[key]
        for owner, (envelope, ends_s) in good.items():
            if owner not in records or records[owner][1] < ends_s:
                records[owner] = envelope, ends_s
