"""Who serves what: signed announcements in the DHT, and look-ups that believe only those.

A server announces itself under its model's prefix, spread over a fixed number of keys so that no
answer outgrows a message. A small index lists the models of the swarm; a server adds itself there
only while few others vouch for the model, so the index grows with models and not with servers.

Look-ups return verified, unexpired records and count the rest in `rejected`. A record that was
found once stays known until it ends or a newer one of its owner is found: what peers do not answer,
or hide, takes no server away that is there. What a record claims (speeds, free memory) is its
owner's word: authenticity is checked here, truth is not.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from planetserve.clock import Clock
from planetserve.config import MAX_RECORD_LIFETIME_S
from planetserve.errors import ConfigError, RemoteProtocolError, TransportError
from planetserve.swarm.network import Network
from planetserve.swarm.records import (
    MODELS_KEY,
    NUM_SHARDS,
    Body,
    ModelBody,
    ServerBody,
    key_digest,
    server_body,
    server_key,
    shard_of,
    sign,
)
from planetserve.types import PeerId, ServerInfo, ServerState

logger = logging.getLogger(__name__)

_TIMEOUT_S = 15.0
_MAX_VOUCHERS = 4
_LEAST_STEP_S = 0.001
_OFFLINE_TTL_S = 60.0
_MAX_UNSEEN_PER_KEY = 256
"""Records that earlier look-ups found and the latest did not."""


@dataclass(frozen=True, slots=True)
class ModelListing:
    """What a swarm says publicly of one of its models."""

    model: str
    """Directory prefix."""
    fingerprint: str
    """The one that most of those who vouch for the model serve."""
    num_blocks: int
    dtype: str


class Directory:
    """One node's view of the swarm's directory.

    Args:
        node: the running node.
        clock: this machine's time; the node knows how far the swarm's is from it.
        timeout_s: for one announcement or look-up.
    """

    def __init__(self, node: Network, clock: Clock, timeout_s: float = _TIMEOUT_S):
        self._node = node
        self._clock = clock
        self._timeout_s = timeout_s
        self._known: dict[bytes, dict[PeerId, Body]] = {}
        self._latest_expiry: dict[bytes, float] = {}

    @property
    def rejected(self) -> Counter[str]:
        """Records refused by this node, read or to be stored, counted by reason."""
        return self._node.records.rejected

    async def announce(self, info: ServerInfo, ttl_s: float) -> None:
        """Publish what this node serves, for `ttl_s` seconds; replaces its previous record.

        `info.peer_id` must be the node's own. `announced_at_s` is filled in here.

        Raises:
            ConfigError: `ttl_s` is not in (0, 600] or a field cannot be published.
            TransportError: no peer took the record.
        """
        if not 0 < ttl_s <= MAX_RECORD_LIFETIME_S:
            raise ConfigError(f"a record lives up to {MAX_RECORD_LIFETIME_S:g} s, not {ttl_s:g}")
        now = self._now()
        key = server_key(info.model, shard_of(info.peer_id))
        await self._put(server_body(info, now, self._expiry(key, now, ttl_s)))
        if info.state is not ServerState.OFFLINE:
            await self._vouch(info, now, ttl_s)

    async def withdraw(self, info: ServerInfo) -> None:
        """Publish that this node no longer serves; look-ups show it as OFFLINE until that ends.

        Raises:
            TransportError: no peer took the record.
        """
        gone = dataclasses.replace(info, state=ServerState.OFFLINE, next_rtt_ms={})
        await self.announce(gone, _OFFLINE_TTL_S)

    async def lookup(self, model: str) -> list[ServerInfo]:
        """All servers of a model, one record each, whatever their state; sorted by peer id.

        Raises:
            TransportError: the search did not end in time.
        """
        keys = [server_key(model, shard) for shard in range(NUM_SHARDS)]
        bodies = await self._get(keys)
        return [body.info() for body in bodies if isinstance(body, ServerBody)]

    async def models(self) -> dict[str, ModelListing]:
        """The models that live in this swarm, by prefix.

        Raises:
            TransportError: the search did not end in time.
        """
        vouchers: dict[str, list[ModelBody]] = {}
        for body in await self._get([MODELS_KEY]):
            if isinstance(body, ModelBody) and not body.not_understood:
                vouchers.setdefault(body.model, []).append(body)
        return {model: _listing(model, bodies) for model, bodies in vouchers.items()}

    def _now(self) -> float:
        """Unix time as the swarm has it: what its records are made by."""
        return self._clock.unix() + self._node.clock.offset_s

    async def _vouch(self, info: ServerInfo, now: float, ttl_s: float) -> None:
        """Keep the model in the index, unless enough others do."""
        bodies = await self._get([MODELS_KEY])
        # A record for other files under this name does not vouch for these.
        others = {
            body.peer_id
            for body in bodies
            if isinstance(body, ModelBody)
            and (body.model, body.fingerprint) == (info.model, info.fingerprint)
            and body.peer_id != info.peer_id
        }
        if len(others) >= _MAX_VOUCHERS:
            return
        body = ModelBody.model_validate(
            {
                "peer_id": info.peer_id,
                "model": info.model,
                "fingerprint": info.fingerprint,
                "num_blocks": info.num_blocks,
                "dtype": info.dtype,
                "announced_at_s": now,
                "expires_at_s": self._expiry(MODELS_KEY, now, ttl_s),
            }
        )
        try:
            await self._put(body)
        except TransportError as error:
            # The server is found without the index, which only helps clients of other models.
            logger.debug("the index of models did not take this one: %s", error)

    def _expiry(self, key: bytes, now: float, ttl_s: float) -> float:
        """When a record ends: the DHT keeps of two records the one that ends later, so a new one
        must end after the one it replaces."""
        expires_at_s = max(now + ttl_s, self._latest_expiry.get(key, 0.0) + _LEAST_STEP_S)
        self._latest_expiry[key] = expires_at_s
        return expires_at_s

    async def _put(self, body: Body) -> None:
        envelope = sign(self._node.identity, body)
        await self._node.put_record(body.dht_key(), envelope, body.expires_at_s, self._timeout_s)

    async def _get(self, keys: Sequence[bytes]) -> list[Body]:
        found = await self._node.get_records(keys, self._timeout_s)
        now = self._now()
        bodies: dict[PeerId, Body] = {}
        for key in keys:
            for body in self._remember(key, found[key], now):
                bodies[body.peer_id] = body
        return [bodies[owner] for owner in sorted(bodies)]

    def _remember(
        self, key: bytes, found: Mapping[PeerId, tuple[bytes, float]], now: float
    ) -> list[Body]:
        """What is known under a key after a look-up found this."""
        earlier = self._known.get(key, {})
        known = {owner: body for owner, body in earlier.items() if body.expires_at_s > now}
        for owner, (envelope, expires_at_s) in found.items():
            try:
                body = self._node.records.check(key_digest(key), owner, envelope, expires_at_s)
            except RemoteProtocolError as error:
                logger.debug("ignored a directory record of …%s: %s", owner[-6:], error)
                continue
            if body.expires_at_s <= now:
                self.rejected["expired"] += 1
                continue
            if owner not in known or known[owner].expires_at_s < body.expires_at_s:
                known[owner] = body
            if owner == self._node.peer_id:
                # Perhaps of an earlier run, which renewed its records less often.
                latest = self._latest_expiry.get(key, 0.0)
                self._latest_expiry[key] = max(latest, expires_at_s)
        # Those known longest are first: a crowd of new ones pushes none of them out.
        unseen = [owner for owner in known if owner not in found]
        for owner in unseen[_MAX_UNSEEN_PER_KEY:]:
            del known[owner]
        self._known[key] = known
        return list(known.values())


def _listing(model: str, bodies: Sequence[ModelBody]) -> ModelListing:
    counted = Counter((body.fingerprint, body.num_blocks, body.dtype) for body in bodies)
    (fingerprint, num_blocks, dtype), _ = counted.most_common(1)[0]
    return ModelListing(model, fingerprint, num_blocks, dtype)
