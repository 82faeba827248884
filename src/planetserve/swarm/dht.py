"""hivemind's DHT under this project's rules: who stands where in it, what it holds, and how much.

- A peer's place follows from its peer id; hivemind lets everybody choose, and choose many.
- Only records that `records.py` admits are stored or believed; the rest of an answer still counts.
- Stored keys, records per key, records per owner and records in all are bounded, and so is what one
  request or answer may hold. When full, known owners may renew and new ones are refused.
- A peer may ask for so much in a while (`Door`); what is refused costs nothing but the answer.
- Nothing is cached: a look-up returns what the keepers of a key hold now.

The functions at the end are all that `node.py` and `directory.py` need; hivemind's exceptions end
there.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import hivemind.dht.node
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import DHTProtocol, ValidationError
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import dht_pb2

from planetserve.crypto.identity import peer_id_bytes
from planetserve.errors import (
    ConfigError,
    PeerUnreachable,
    QueueFull,
    RemoteProtocolError,
    TransportError,
)
from planetserve.swarm.buckets import TokenBuckets
from planetserve.swarm.calls import Call
from planetserve.swarm.guards import MAX_RECORDS_PER_KEY
from planetserve.swarm.records import MAX_RECORD_BYTES, RecordChecker
from planetserve.types import PeerId

logger = logging.getLogger(__name__)

MAX_KEYS = 1024
MAX_RECORDS_PER_OWNER = 16
MAX_RECORDS = 16 * 1024
MAX_KEYS_PER_REQUEST = 16
"""hivemind asks for at most this many keys in one call."""

_KEYS_AT_ONCE = 16
_BYTES_AT_ONCE = 64 * 1024
_STORE_BYTES_PER_KEY = 16 * 1024
"""A dictionary of records that is stored counts as so many keys as it has pieces of this size."""
_KEYS_PER_VALIDATION = 10
"""A ping that asks for a ping back holds one of the few calls that this node may have under way."""
_MAX_ANSWER_BYTES = 3 * 1024 * 1024
_RPC_TIMEOUT_S = 3.0
_GREETINGS = 3
"""So often are initial peers asked that are connected and say nothing in time."""
_MAX_PARALLEL_RPC = 128
_BIN8, _BIN16, _STR8 = 0xC4, 0xC5, 0xD9


class Validator(RecordValidatorBase):
    """hivemind's hook for records, answered by a `RecordChecker`.

    hivemind wraps values and subkeys in msgpack; the two shapes a record of ours can have are
    recognised by their first bytes and nothing is decoded.
    """

    def __init__(self, checker: RecordChecker):
        self._checker = checker

    def validate(self, record: DHTRecord) -> bool:
        owner, payload = _unwrap_text(record.subkey), _unwrap_bytes(record.value)
        if owner is None or payload is None:
            self._checker.rejected["malformed"] += 1
            return False
        try:
            self._checker.check(record.key, owner, payload, record.expiration_time)
        except RemoteProtocolError:
            return False
        return True


class BoundedStorage(DHTLocalStorage):
    """Storage for dictionaries of records only, with limits. `get` returns a copy."""

    def get(self, key: DHTID) -> Any:
        found = super().get(key)
        if found is None or not isinstance(found.value, DictionaryDHTValue):
            return found
        # hivemind merges other nodes' answers into what it got here.
        copy = DictionaryDHTValue()
        for subkey, item in found.value.items():
            copy.store(subkey, item.value, item.expiration_time)
        return type(found)(copy, found.expiration_time)

    def store(self, key: DHTID, value: bytes, expiration_time: float, subkey: Any = None) -> bool:
        """Store one record; plain values without a subkey are none of ours."""
        return subkey is not None and self.store_subkey(key, subkey, value, expiration_time)

    def store_subkey(self, key: DHTID, subkey: Any, value: bytes, expiration_time: float) -> bool:
        """Store one record unless a newer one is there or a limit is reached."""
        found = super().get(key)
        records = found.value if found is not None else DictionaryDHTValue()
        present = records.get(subkey)
        if present is not None and present.expiration_time >= expiration_time:
            return bool(present.value == value)
        if present is None and not self._has_room(records, subkey, is_new_key=found is None):
            return False
        if not records.store(subkey, value, expiration_time):
            return False
        _drop_ghosts(records)
        if found is None or expiration_time > found.expiration_time:
            super(DHTLocalStorage, self).store(key, records, expiration_time)
            _drop_ghosts(self)
        return True

    def _has_room(self, records: DictionaryDHTValue, owner: Any, is_new_key: bool) -> bool:
        if len(records) >= MAX_RECORDS_PER_KEY or (is_new_key and len(self) >= MAX_KEYS):
            return False
        others = [item.value.data for item in self.data.values()]
        if sum(owner in other for other in others) >= MAX_RECORDS_PER_OWNER:
            return False
        return sum(map(len, others)) < MAX_RECORDS


def _drop_ghosts(storage: Any) -> None:
    """Rebuild an expiry heap that is mostly entries of replaced records."""
    if len(storage.expiration_heap) > 2 * len(storage.data) + 16:
        storage.expiration_heap = list(storage.key_to_heap.values())
        heapq.heapify(storage.expiration_heap)


class Door:
    """Lets in what peers ask for, and counts what they ask for too often.

    Args:
        buckets: a token for each key that is looked up or stored.
        refused: `refused[name]` is how many requests were turned away.
        name: see `refused`.
    """

    def __init__(self, buckets: TokenBuckets, refused: Counter[str], name: str):
        self._buckets = buckets
        self._refused = refused
        self._name = name

    def enter(self, peer_id: PeerId, num_keys: int) -> None:
        """Count a request for so many keys.

        Raises:
            QueueFull: the peer has asked for too much lately.
        """
        wait_s = self._buckets.take(peer_id, num_keys)
        if wait_s:
            self._refused[self._name] += 1
            raise QueueFull("too many requests from one peer", retry_after_s=wait_s)


def _num_keys(request: Any) -> int:
    match request:
        case dht_pb2.PingRequest():
            return _KEYS_PER_VALIDATION if request.validate else 1
        case dht_pb2.StoreRequest():
            return 1 + max(len(request.keys), request.ByteSize() // _STORE_BYTES_PER_KEY)
        case _:
            return 1 + len(request.keys)


class PlanetServeDHT(DHTProtocol):
    """hivemind's DHT protocol with the limits above.

    Its name is part of every RPC's name, so that other hivemind networks do not mix with ours.
    """

    _rpc_handlers = None

    @classmethod
    async def create(cls, p2p: P2P, *args: Any, **kwargs: Any) -> PlanetServeDHT:
        self: PlanetServeDHT = await super().create(p2p, *args, **kwargs)
        self.storage, self.cache = BoundedStorage(), BoundedStorage()
        return self

    async def add_p2p_handlers(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the daemon is not to serve them, the node does (`served`)."""

    def served(self, door: Door) -> dict[str, Call]:
        """What strangers may call, behind a door: protocol name -> call."""
        self._collect_rpc_handlers()
        handlers: Any = self._rpc_handlers
        return {
            self._get_handle_name(None, handler.method_name): self._served(handler, door)
            for handler in handlers
        }

    def _served(self, handler: Any, door: Door) -> Call:
        method = getattr(self, handler.method_name)

        async def call(data: bytes, remote: PeerId) -> bytes:
            request = handler.request_type.FromString(data)
            door.enter(remote, _num_keys(request))
            context = P2PContext(
                handle_name=handler.method_name,
                local_id=self.p2p.peer_id,
                remote_id=PeerID.from_base58(remote),
            )
            response = await method(request, context)
            return bytes(response.SerializeToString())

        return call

    async def rpc_store(
        self, request: dht_pb2.StoreRequest, context: P2PContext
    ) -> dht_pb2.StoreResponse:
        if len(request.keys) > MAX_KEYS or any(request.in_cache):
            raise RemoteProtocolError("too many keys in one request, or for a cache")
        columns = ("keys", "subkeys", "values", "expiration_time", "in_cache")
        num_keys = len(request.keys)
        if any(len(getattr(request, name)) != num_keys for name in columns):
            raise RemoteProtocolError("a store request whose columns differ in length")
        response = dht_pb2.StoreResponse(peer=self.node_info)
        for rows in _pieces([len(value) for value in request.values]):
            part = dht_pb2.StoreRequest(**{name: getattr(request, name)[rows] for name in columns})
            if not rows.start and request.HasField("peer"):
                part.peer.CopyFrom(request.peer)  # it is greeted once
            response.store_ok.extend((await super().rpc_store(part, context)).store_ok)
            # Signatures take time, and the same loop carries everybody's activations.
            await asyncio.sleep(0)
        return response

    async def rpc_find(
        self, request: dht_pb2.FindRequest, context: P2PContext
    ) -> dht_pb2.FindResponse:
        if len(request.keys) > MAX_KEYS_PER_REQUEST:
            raise RemoteProtocolError("too many keys in one request")
        response = await super().rpc_find(request, context)
        num_bytes = 0
        for result in response.results:
            num_bytes += len(result.value)
            if num_bytes > _MAX_ANSWER_BYTES:
                result.type, result.value = dht_pb2.NOT_FOUND, b""
        return response

    async def update_routing_table(
        self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True
    ) -> None:
        if node_id is None or node_id == _place_of(peer_id.to_bytes()):
            await super().update_routing_table(node_id, peer_id, responded)

    def get_stub(self, peer: PeerID) -> _Stub:
        return _Stub(super().get_stub(peer), self.bucket_size)

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        # One bad record must not hide the good ones that came with it.
        with dictionary.freeze():
            for subkey, item in list(dictionary.items()):
                shape = self.serializer.dumps(subkey)
                if not self._validate_record(key_bytes, shape, item.value, item.expiration_time):
                    del dictionary[subkey]
            return bool(dictionary)


# DHTNode.create names the class; there is no argument for it.
hivemind.dht.node.DHTProtocol = PlanetServeDHT


class _Stub:
    """Calls to one peer; drops from its answers neighbours that cannot be where it says."""

    def __init__(self, stub: Any, max_neighbours: int):
        self._stub = stub
        self._max_neighbours = max_neighbours

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stub, name)

    async def rpc_find(self, request: dht_pb2.FindRequest, **options: Any) -> dht_pb2.FindResponse:
        response = await self._stub.rpc_find(request, **options)
        if len(response.results) > MAX_KEYS_PER_REQUEST:
            raise RemoteProtocolError("too many results")
        for result in response.results:
            pairs = zip(
                result.nearest_node_ids[: self._max_neighbours],
                result.nearest_peer_ids[: self._max_neighbours],
                strict=False,
            )
            kept = [(node, peer) for node, peer in pairs if node == _place_of(peer).to_bytes()]
            del result.nearest_node_ids[:], result.nearest_peer_ids[:]
            result.nearest_node_ids.extend(node for node, _ in kept)
            result.nearest_peer_ids.extend(peer for _, peer in kept)
        return response


def _pieces(sizes: Sequence[int]) -> Iterator[slice]:
    """Consecutive rows with little in them, or one row."""
    start = num_bytes = 0
    for row, size in enumerate(sizes):
        if row > start and (row - start == _KEYS_AT_ONCE or num_bytes + size > _BYTES_AT_ONCE):
            yield slice(start, row)
            start, num_bytes = row, 0
        num_bytes += size
    if sizes:
        yield slice(start, len(sizes))


def _place_of(peer_id: bytes) -> DHTID:
    return DHTID.generate(peer_id)


def _unwrap_bytes(data: bytes) -> bytes | None:
    """The content of a msgpack `bin` of at most `MAX_RECORD_BYTES`, or None."""
    if len(data) > 1 and data[0] == _BIN8 and data[1] == len(data) - 2:
        return data[2:]
    if len(data) > 2 and data[0] == _BIN16:
        size = int.from_bytes(data[1:3], "big")
        if size == len(data) - 3 and size <= MAX_RECORD_BYTES:
            return data[3:]
    return None


def _unwrap_text(data: bytes) -> str | None:
    """The content of a short msgpack `str`, which every peer id is, or None."""
    if len(data) < 3 or data[0] != _STR8 or data[1] != len(data) - 2:
        return None
    try:
        return data[2:].decode("ascii")
    except UnicodeDecodeError:
        return None


async def create(p2p: P2P, peer_id: PeerId, checker: RecordChecker, client_mode: bool) -> DHTNode:
    """A DHT node on a running daemon. It serves nobody yet; `bootstrap` makes it known to others.

    Raises:
        TransportError: the daemon does not answer.
    """
    return await DHTNode.create(
        p2p=p2p,
        node_id=_place_of(peer_id_bytes(peer_id)),
        client_mode=client_mode,
        record_validator=Validator(checker),
        wait_timeout=_RPC_TIMEOUT_S,
        parallel_rpc=_MAX_PARALLEL_RPC,
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
        reuse_get_requests=False,
    )


async def bootstrap(dht: DHTNode, peers: Collection[PeerId], required: bool) -> None:
    """Greet connected peers and find this node's neighbours through them.

    Raises:
        ConfigError: `required`, and a peer refuses this node (its clock differs, for one).
        PeerUnreachable: `required`, and none of the peers takes part in the DHT.
    """
    answers: list[Any] = []
    for _ in range(_GREETINGS):
        answers = await asyncio.gather(
            *(
                dht.protocol.call_ping(PeerID.from_base58(peer_id), validate=True, strict=True)
                for peer_id in peers
            ),
            return_exceptions=True,
        )
        if any(answer is not None for answer in answers) or not required:
            break
    for peer_id, answer in zip(peers, answers, strict=True):
        if isinstance(answer, ValidationError):
            if required:
                raise ConfigError(f"initial peer {peer_id} refuses this node: {answer}")
            logger.warning("peer %s refuses this node: %s", peer_id, answer)
    if any(isinstance(answer, DHTID) for answer in answers):
        await dht.find_nearest_nodes([dht.node_id])
    elif required:
        raise PeerUnreachable(f"no initial peer takes part in the DHT ({', '.join(peers)})")


def known(dht: DHTNode) -> list[bytes]:
    """Ids, as bytes, of the peers in the routing table."""
    return [peer.to_bytes() for peer in dht.protocol.routing_table.uid_to_peer_id.values()]


def knows(dht: DHTNode, peer_id: PeerId) -> bool:
    """Whether the peer is in the routing table."""
    return _place_of(peer_id_bytes(peer_id)) in dht.protocol.routing_table


async def put(
    dht: DHTNode, key: bytes, owner: PeerId, payload: bytes, expires_at_s: float, timeout_s: float
) -> None:
    """Store a record at the keepers of its key.

    Raises:
        TransportError: none of them took it in time.
    """
    stored = await _within(timeout_s, dht.store(key, payload, expires_at_s, subkey=owner))
    if not stored:
        raise TransportError(
            "no peer took the directory record; if this goes on, check this machine's clock"
        )


async def get(
    dht: DHTNode, keys: Collection[bytes], timeout_s: float
) -> Mapping[bytes, Mapping[PeerId, tuple[bytes, float]]]:
    """All records under `keys`: key -> owner -> (envelope, expiry). Each has been checked once.

    Raises:
        TransportError: no end of the search in time.
    """
    # NaN: no expiry is ever late enough to end the search at the first answer, not even one that
    # claims to be infinite.
    found = await _within(timeout_s, dht.get_many(keys, sufficient_expiration_time=math.nan))
    return {
        key: {owner: (item.value, item.expiration_time) for owner, item in value.value.items()}
        for key, value in found.items()
        if value is not None
    }


async def _within(timeout_s: float, operation: Any) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            return await operation
    except TimeoutError:
        raise TransportError(f"the directory did not answer in {timeout_s:g} s") from None
