"""A node of the directory's DHT: joining, storing a record, looking records up.

These functions are all that `node.py` and `directory.py` need; hivemind's exceptions end here. What
strangers may ask and answer is in `protocol.py`. Look-ups and announcements are searches
(`search.py`), in which nobody can make others wait: they ask the initial peers in any case, and
what was found in time counts.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial

from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, PeerID
from hivemind.proto import dht_pb2

from planetserve.crypto.identity import peer_id_bytes
from planetserve.errors import ConfigError, PeerUnreachable, TransportError
from planetserve.swarm.dht.lookup_results import LookupResults
from planetserve.swarm.dht.protocol import RPC_TIMEOUT_S, PlanetServeDHT, Validator
from planetserve.swarm.dht.protocol import dht_place as _place_of
from planetserve.swarm.dht.search import NUM_NEAREST, PeerMemory, Search
from planetserve.swarm.dht.storage import MAX_KEYS, MAX_RECORDS, BoundedStorage
from planetserve.swarm.dht.swarm_clock import SwarmClock
from planetserve.swarm.records import RecordChecker
from planetserve.types import PeerId

__all__ = [
    "MAX_KEYS", "MAX_RECORDS", "BoundedStorage", "bootstrap", "create", "get", "keep_time", "known",
    "knows", "put",
]  # fmt: skip

logger = logging.getLogger(__name__)

_DIAL_TIMEOUT_S = 2.0
"""Seconds to wait for the answer of a peer without known address."""
_ENOUGH_S = 5.0
"""Seconds after which a search that has found a peer ends."""
_NUM_REPLICAS = 5
_GREETINGS = 3
"""Maximum number of attempts to greet an initial peer that is connected but does not answer in
time."""
_MAX_PARALLEL_RPC = 128
_MAX_INITIAL_PEERS = 32

Take = Callable[[int, bytes], Awaitable[None]]
"""Reads what an answer holds for a key."""


async def create(
    p2p: P2P,
    peer_id: PeerId,
    checker: RecordChecker,
    clock: SwarmClock,
    initial_peers: Collection[PeerId],
    *,
    client_mode: bool,
) -> DHTNode:
    """A DHT node on a running daemon. It serves nobody yet; `bootstrap` makes it known to others.

    Raises:
        TransportError: the daemon does not answer.
    """
    node = await DHTNode.create(
        p2p=p2p,
        node_id=_place_of(peer_id_bytes(peer_id)),
        client_mode=client_mode,
        record_validator=Validator(checker),
        wait_timeout=RPC_TIMEOUT_S,
        parallel_rpc=_MAX_PARALLEL_RPC,
    )
    node.protocol.clock, node.protocol.memory = clock, PeerMemory(clock)
    node.protocol.always = tuple(map(peer_id_bytes, initial_peers))[:_MAX_INITIAL_PEERS]
    return node


async def bootstrap(dht: DHTNode, peers: Collection[PeerId], required: bool) -> None:
    """Greet connected peers, take over their time and find this node's neighbours through them.

    Raises:
        ConfigError: `required`, and all peers refuse this node or its clock is far off.
        PeerUnreachable: `required`, and none of the peers takes part in the DHT.
    """
    answers: list[dht_pb2.PingResponse | None] = []
    for _ in range(_GREETINGS if required else 1):
        answers = await _greet(dht, peers, validate=True, required=required)
        if any(answers):
            break
    if not any(answers):
        if required:
            raise PeerUnreachable(f"no initial peer takes part in the DHT ({', '.join(peers)})")
        return
    welcome = [bool(answer) and _is_welcome(dht, answer) for answer in answers]
    for peer_id, answer, is_welcome in zip(peers, answers, welcome, strict=True):
        if answer and not is_welcome:
            text = (
                f"{peer_id} cannot reach this node; open its port or forward it, "
                "and announce the address with --public_ip or --announce_maddrs"
            )
            if required and not any(welcome):
                raise ConfigError(f"initial peer {text}")
            logger.warning("peer %s", text)
    if any(welcome):
        await _search(dht, [int(dht.node_id)], timeout_s=_ENOUGH_S)


async def keep_time(dht: DHTNode, peers: Collection[PeerId]) -> None:
    """Ask initial peers again what time it is."""
    await _greet(dht, peers, validate=False, required=False)


async def _greet(
    dht: DHTNode, peers: Collection[PeerId], *, validate: bool, required: bool
) -> list[dht_pb2.PingResponse | None]:
    protocol: PlanetServeDHT = dht.protocol
    offsets_s: list[float] = []

    async def greet(peer_id: PeerID) -> dht_pb2.PingResponse | None:
        request = dht_pb2.PingRequest(peer=protocol.node_info, validate=validate)
        began_s = protocol.clock.local_unix()
        try:
            answer = await protocol.get_stub(peer_id).rpc_ping(request, timeout=RPC_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001  hivemind's have no common class
            logger.debug("no answer to a greeting: %s", type(error).__name__)
            return None
        ended_s = protocol.clock.local_unix()
        if not answer.peer.node_id:
            return None
        if answer.dht_time > 0 and math.isfinite(answer.dht_time):
            offsets_s.append(answer.dht_time - (began_s + ended_s) / 2)
        await protocol.update_routing_table(None, peer_id)
        return answer

    answers = await asyncio.gather(*(greet(PeerID.from_base58(peer)) for peer in peers))
    try:
        protocol.clock.correct(offsets_s)
    except ConfigError as error:
        if required:
            raise
        logger.warning("%s", error)
    return answers


def _is_welcome(dht: DHTNode, answer: dht_pb2.PingResponse | None) -> bool:
    return answer is not None and (dht.protocol.client_mode or answer.available)


def known(dht: DHTNode) -> list[bytes]:
    """Ids, as bytes, of the peers in the routing table."""
    return [peer.to_bytes() for peer in dht.protocol.routing_table.uid_to_peer_id.values()]


def knows(dht: DHTNode, peer_id: PeerId) -> bool:
    """Whether the peer is in the routing table."""
    return _place_of(peer_id_bytes(peer_id)) in dht.protocol.routing_table


async def put(
    dht: DHTNode, key: bytes, owner: PeerId, payload: bytes, expires_at_s: float, timeout_s: float
) -> None:
    """Store a record at the keepers of its key, at the initial peers and here.

    Raises:
        TransportError: others answered in time, and none of them took it; or a client found nobody.
    """
    protocol: PlanetServeDHT = dht.protocol
    place = DHTID.generate(key)
    value, subkey = protocol.serializer.dumps(payload), protocol.serializer.dumps(owner)
    if not protocol.client_mode:
        protocol.storage.store_subkey(place, owner, value, expires_at_s)
    search = await _search(dht, [int(place)], timeout_s)
    keepers = search.nearest(int(place))
    request = dht_pb2.StoreRequest(
        keys=[place.to_bytes()], values=[value], subkeys=[subkey],
        expiration_time=[expires_at_s], in_cache=[False], peer=protocol.node_info,
    )  # fmt: skip
    first = [peer for peer in keepers if peer in protocol.always]
    rest = [peer for peer in keepers if peer not in protocol.always]
    num_stored = num_answered = 0
    while chosen := first + rest[: max(0, _NUM_REPLICAS - num_stored)]:
        del rest[: len(chosen) - len(first)]
        first = []
        outcomes = await asyncio.gather(*(protocol.store_at(peer, request) for peer in chosen))
        num_stored += outcomes.count(True)
        num_answered += len(outcomes) - outcomes.count(None)
    if not num_stored and (num_answered or protocol.client_mode):
        raise TransportError(
            "no peer took the directory record; if this goes on, check this machine's clock"
        )


async def get(
    dht: DHTNode, keys: Collection[bytes], timeout_s: float
) -> Mapping[bytes, Mapping[PeerId, tuple[bytes, float]]]:
    """All records under `keys`: key -> owner -> (envelope, expiry). Each has been checked once.

    Raises:
        TransportError: this node, a client, found nobody in time.
    """
    protocol: PlanetServeDHT = dht.protocol
    places = {int(DHTID.generate(key)): key for key in keys}
    lookup_results = LookupResults(keys)

    async def take(place: int, value: bytes) -> None:
        key = places[place]
        lookup_results.add(
            key, await protocol.good_records(place, value, partial(lookup_results.choose, key))
        )

    for place in places:
        own = protocol.storage.get(DHTID(place))
        if own is not None:
            await take(place, protocol.serializer.dumps(own.value))
    search = await _search(dht, list(places), timeout_s, take)
    if protocol.client_mode and not any(map(search.nearest, places)):
        raise TransportError(f"the directory did not answer in {timeout_s:g} s")
    return lookup_results.records


async def _search(
    dht: DHTNode, places: Sequence[int], timeout_s: float, take: Take | None = None
) -> Search:
    protocol: PlanetServeDHT = dht.protocol

    async def ask(
        peer: bytes, keys: Sequence[int], by_name: bool
    ) -> dict[int, Collection[bytes]] | None:
        response = await protocol.find_at(peer, keys, _DIAL_TIMEOUT_S if by_name else RPC_TIMEOUT_S)
        if response is None:
            return None
        named: dict[int, Collection[bytes]] = {}
        for key, result in zip(keys, response.results, strict=True):
            named[key] = list(result.nearest_peer_ids)
            if take is not None and result.type == dht_pb2.FOUND_DICTIONARY:
                await take(key, result.value)
        return named

    known_peers = {
        peer.to_bytes()
        for place in places
        for _, peer in protocol.routing_table.get_nearest_neighbors(
            DHTID(place), NUM_NEAREST, exclude=dht.node_id
        )
    }
    search = Search(
        places,
        ask,
        always=protocol.always,
        known=known_peers,
        memory=protocol.memory,
        own=protocol.p2p.peer_id.to_bytes(),
    )
    await search.run(min(_ENOUGH_S, timeout_s), timeout_s)
    return search
