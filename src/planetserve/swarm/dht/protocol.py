"""hivemind's DHT protocol under this project's rules: what strangers may ask of a node, what of
their answers counts, and who stands where.

- A peer's place follows from its peer id; hivemind lets everybody choose, and choose many.
- Only records that `records.py` admits are stored or believed; the rest of an answer still counts.
- What is stored is bounded (`storage.py`), and so is what one request or answer may hold: its bytes
  and its fields before it is decoded.
- Requests per peer are limited (`RequestLimiter`); what is refused costs nothing but the answer.
- Nothing is cached or handed on: owners store their records, and renew them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import hivemind.dht.node
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, P2PContext, PeerID
from hivemind.proto import dht_pb2

from planetserve.crypto.identity import is_peer_id
from planetserve.errors import RemoteProtocolError
from planetserve.swarm.dht.field_count import check_num_fields
from planetserve.swarm.dht.search import MAX_NAMED, PeerMemory, place_of
from planetserve.swarm.dht.storage import MAX_KEYS, BoundedStorage
from planetserve.swarm.dht.swarm_clock import SwarmClock
from planetserve.swarm.network import Call
from planetserve.swarm.records import MAX_RECORD_BYTES, RecordChecker
from planetserve.swarm.request_limiter import RequestLimiter
from planetserve.types import PeerId

logger = logging.getLogger(__name__)

MAX_KEYS_PER_REQUEST = 16
"""Maximum number of keys in one request."""
RPC_TIMEOUT_S = 3.0

_KEYS_AT_ONCE = 16
_BYTES_AT_ONCE = 64 * 1024
_STORE_BYTES_PER_KEY = 16 * 1024
"""Bytes of a request that count as one key for the rate limit."""
_KEYS_PER_VALIDATION = 10
"""Keys that a ping counts as if it asks for a ping back, which takes one of this node's calls."""
_MAX_REQUEST_FIELDS = 512
_MAX_ANSWER_BYTES = 3 * 1024 * 1024
_ANSWERS_AT_ONCE = 8
_MAX_SHORT_ANSWER_BYTES = 4096
_MAX_RESULT_FIELDS = 64
_MAX_BAD_RECORDS = 16
"""Maximum number of invalid records in an answer before the rest is ignored; an honest peer checks
records before it stores them."""
_MAX_REPLACEMENTS = 20
"""Maximum number of peers waiting for a place in one bucket of the routing table."""
_BIN8, _BIN16, _STR8 = 0xC4, 0xC5, 0xD9

Choose = Callable[[Mapping[PeerId, float]], Collection[PeerId]]


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


def _num_keys(request: Any) -> int:
    if isinstance(request, dht_pb2.PingRequest):
        return _KEYS_PER_VALIDATION if request.validate else 1
    return 1 + len(request.keys)


class PlanetServeDHT(DHTProtocol):
    """hivemind's DHT protocol with the limits above.

    Its name is part of every RPC's name, so that other hivemind networks do not mix with ours.
    """

    _rpc_handlers = None

    clock: SwarmClock
    memory: PeerMemory
    always: tuple[bytes, ...]
    """Initial peers."""
    pings: set[asyncio.Task[Any]]
    """To peers whose place others wait for."""
    building: asyncio.Semaphore
    """For answers to look-ups, until `unary_rpc.py` counts them."""

    @classmethod
    async def create(cls, p2p: P2P, *args: Any, **kwargs: Any) -> PlanetServeDHT:
        self: PlanetServeDHT = await super().create(p2p, *args, **kwargs)
        self.storage, self.cache = BoundedStorage(self.unix), BoundedStorage(self.unix)
        self.pings = set()
        self.building = asyncio.Semaphore(_ANSWERS_AT_ONCE)
        return self

    def unix(self) -> float:
        """The swarm's time."""
        return self.clock.unix()

    async def add_p2p_handlers(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the daemon is not to serve them, the node does (`served`)."""

    def served(self, request_limiter: RequestLimiter) -> dict[str, Call]:
        """What strangers may call, behind a limiter: protocol name -> call."""
        self._collect_rpc_handlers()
        handlers: Any = self._rpc_handlers
        return {
            self._get_handle_name(None, handler.method_name): self._served(handler, request_limiter)
            for handler in handlers
        }

    def _served(self, handler: Any, request_limiter: RequestLimiter) -> Call:
        method = getattr(self, handler.method_name)

        async def call(data: bytes, remote: PeerId) -> bytes:
            num_counted = 1 + len(data) // _STORE_BYTES_PER_KEY
            request_limiter.enter(remote, num_counted)
            check_num_fields(memoryview(data), _MAX_REQUEST_FIELDS)
            request = handler.request_type.FromString(data)
            num_more = _num_keys(request) - num_counted
            if num_more > 0:
                request_limiter.enter(remote, num_more)
            context = P2PContext(
                handle_name=handler.method_name,
                local_id=self.p2p.peer_id,
                remote_id=PeerID.from_base58(remote),
            )
            response = await method(request, context)
            return bytes(response.SerializeToString())

        return call

    async def rpc_ping(
        self, request: dht_pb2.PingRequest, context: P2PContext
    ) -> dht_pb2.PingResponse:
        is_available = False
        if request.validate and self._is_keeper(request, context.remote_id):
            is_available = await self.call_ping(context.remote_id) is not None
        if is_available or not request.validate:
            await self._meet(request, context)
        return dht_pb2.PingResponse(
            peer=self.node_info, dht_time=self.unix(), available=is_available
        )

    async def rpc_store(
        self, request: dht_pb2.StoreRequest, context: P2PContext | None
    ) -> dht_pb2.StoreResponse:
        if len(request.keys) > MAX_KEYS or any(request.in_cache):
            raise RemoteProtocolError("too many keys in one request, or for a cache")
        columns = (request.keys, request.subkeys, request.values, request.expiration_time)
        num_keys = len(request.keys)
        if any(len(column) != num_keys for column in (*columns, request.in_cache)):
            raise RemoteProtocolError("a store request whose columns differ in length")
        await self._meet(request, context)
        sender = context.remote_id.to_base58() if context is not None else ""
        response = dht_pb2.StoreResponse(peer=self.node_info)
        for rows in _pieces([len(value) for value in request.values]):
            for row in zip(*(column[rows] for column in columns), strict=True):
                response.store_ok.append(self._store(sender, *row))
            # Signatures take time, and the same loop carries everybody's activations.
            await asyncio.sleep(0)
        return response

    def _store(
        self, sender: PeerId, key: bytes, subkey: bytes, value: bytes, expires_at_s: float
    ) -> bool:
        if subkey == self.IS_DICTIONARY:
            several = self.serializer.loads(value)
            if not isinstance(several, DictionaryDHTValue):
                raise RemoteProtocolError("not a dictionary of records")
            rows = [
                (owner, item.value, item.expiration_time) for owner, item in several.data.items()
            ]
        else:
            rows = [(_unwrap_text(subkey) or "", value, expires_at_s)]
        good = [
            row
            for row in rows
            if self._validate_record(key, self.serializer.dumps(row[0]), row[1], row[2])
        ]
        return bool(good) and all(
            self.storage.store_subkey(DHTID.from_bytes(key), *row, sender=sender) for row in good
        )

    async def rpc_find(
        self, request: dht_pb2.FindRequest, context: P2PContext
    ) -> dht_pb2.FindResponse:
        if len(request.keys) > MAX_KEYS_PER_REQUEST:
            raise RemoteProtocolError("too many keys in one request")
        await self._meet(request, context)
        async with self.building:
            return await self._find(request, context)

    async def _find(
        self, request: dht_pb2.FindRequest, context: P2PContext
    ) -> dht_pb2.FindResponse:
        response = dht_pb2.FindResponse(peer=self.node_info)
        asker = dht_place(context.remote_id.to_bytes())
        num_bytes = 0
        for key in request.keys:
            if len(key) != DHTID.HASH_NBYTES:
                raise RemoteProtocolError("not a key")
            place, result = DHTID.from_bytes(key), response.results.add()
            found = self.storage.get(place) if num_bytes < _MAX_ANSWER_BYTES else None
            value = self.serializer.dumps(found.value) if found is not None else b""
            if found is not None and num_bytes + len(value) <= _MAX_ANSWER_BYTES:
                result.type, result.value = dht_pb2.FOUND_DICTIONARY, value
                result.expiration_time = found.expiration_time
            num_bytes += len(value)
            for node_id, peer_id in self.routing_table.get_nearest_neighbors(
                place, k=self.bucket_size, exclude=asker
            ):
                result.nearest_node_ids.append(node_id.to_bytes())
                result.nearest_peer_ids.append(peer_id.to_bytes())
            await asyncio.sleep(0)
        return response

    @staticmethod
    def _is_keeper(request: Any, remote: PeerID) -> bool:
        """Whether the sender takes part in the directory, at the place that is its own."""
        return bool(request.peer.node_id == dht_place(remote.to_bytes()).to_bytes())

    async def _meet(self, request: Any, context: P2PContext | None) -> None:
        if context is not None and self._is_keeper(request, context.remote_id):
            await self.update_routing_table(None, context.remote_id)

    async def update_routing_table(
        self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True
    ) -> None:
        place, table = dht_place(peer_id.to_bytes()), self.routing_table
        if node_id not in (None, place):
            return
        if not responded:
            if place in table:
                del table[place]
            return
        if place not in table:
            # hivemind keeps everybody who waits, and hands a newcomer all that it might keep.
            waiting = table.buckets[table.get_bucket_index(place)].replacement_nodes
            if len(waiting) >= _MAX_REPLACEMENTS:
                del table[next(iter(waiting))]
        doubted = table.add_or_update_node(place, peer_id)
        if doubted is not None:
            task = asyncio.create_task(self.call_ping(doubted[1]))
            self.pings.add(task)
            task.add_done_callback(self.pings.discard)

    def get_stub(self, peer: PeerID) -> _Stub:
        return _Stub(self.p2p, peer)

    async def find_at(
        self, peer: bytes, keys: Sequence[int], timeout_s: float
    ) -> dht_pb2.FindResponse | None:
        """What a peer answers, one result for each key; None if that is nothing of use."""
        request = dht_pb2.FindRequest(
            keys=[key.to_bytes(DHTID.HASH_NBYTES, "big") for key in keys], peer=self.node_info
        )
        peer_id = PeerID(peer)
        try:
            response = await self.get_stub(peer_id).rpc_find(request, timeout=timeout_s)
        except Exception as error:  # noqa: BLE001  hivemind's have no common class
            logger.debug("no answer to a look-up: %s", type(error).__name__)
            response = None
        if response is None or len(response.results) != len(keys):
            await self.update_routing_table(None, peer_id, responded=False)
            return None
        if response.peer.node_id:
            await self.update_routing_table(None, peer_id)
        return response

    async def store_at(self, peer: bytes, request: dht_pb2.StoreRequest) -> bool | None:
        """Whether a peer took a record; None if it does not answer."""
        try:
            stub = self.get_stub(PeerID(peer))
            response = await stub.rpc_store(request, timeout=RPC_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001  hivemind's have no common class
            logger.debug("no answer to a record: %s", type(error).__name__)
            return None
        return any(response.store_ok)

    async def good_records(
        self, key: int, value: bytes, choose: Choose
    ) -> dict[PeerId, tuple[bytes, float]]:
        """Those of an answer that may be believed: owner -> (envelope, expiry).

        `choose` gets the expiry of each owner's record, and returns whose are to be checked.
        """
        try:
            records = self.serializer.loads(value)
        except Exception:  # noqa: BLE001  a stranger's bytes in msgpack's decoder
            records = None
        if not isinstance(records, DictionaryDHTValue):
            return {}
        found: dict[PeerId, tuple[bytes, float]] = {}
        num_bad = 0
        digest = key.to_bytes(DHTID.HASH_NBYTES, "big")
        chosen = choose({owner: item.expiration_time for owner, item in records.data.items()})
        for number, owner in enumerate(chosen):
            item = records.data[owner]
            if number % _KEYS_AT_ONCE == _KEYS_AT_ONCE - 1:
                await asyncio.sleep(0)
            subkey = self.serializer.dumps(owner)
            if self._validate_record(digest, subkey, item.value, item.expiration_time):
                found[owner] = _unwrap_bytes(item.value) or b"", item.expiration_time
            elif (num_bad := num_bad + 1) > _MAX_BAD_RECORDS:
                break
        return found


# DHTNode.create names the class; there is no argument for it.
hivemind.dht.node.DHTProtocol = PlanetServeDHT


class _Stub:
    """Calls to one peer, whose answers are bounded before they are decoded."""

    def __init__(self, p2p: P2P, peer: PeerID):
        self._p2p = p2p
        self._peer = peer

    async def rpc_ping(
        self, request: dht_pb2.PingRequest, **options: float
    ) -> dht_pb2.PingResponse:
        return dht_pb2.PingResponse.FromString(
            await self._short("rpc_ping", request, options.get("timeout"))
        )

    async def rpc_store(
        self, request: dht_pb2.StoreRequest, **options: float
    ) -> dht_pb2.StoreResponse:
        return dht_pb2.StoreResponse.FromString(
            await self._short("rpc_store", request, options.get("timeout"))
        )

    async def rpc_find(
        self, request: dht_pb2.FindRequest, **options: float
    ) -> dht_pb2.FindResponse:
        """Without the neighbours that are none, or cannot be where the peer says."""
        data = await self._call("rpc_find", request, options.get("timeout"))
        check_num_fields(memoryview(data), MAX_KEYS_PER_REQUEST + 2, _MAX_RESULT_FIELDS)
        response = dht_pb2.FindResponse.FromString(data)
        for result in response.results:
            pairs = zip(
                result.nearest_node_ids[:MAX_NAMED], result.nearest_peer_ids[:MAX_NAMED],
                strict=False,
            )  # fmt: skip
            kept = [
                (node, peer)
                for node, peer in pairs
                if is_peer_id(peer) and node == dht_place(peer).to_bytes()
            ]
            del result.nearest_node_ids[:], result.nearest_peer_ids[:]
            result.nearest_node_ids.extend(node for node, _ in kept)
            result.nearest_peer_ids.extend(peer for _, peer in kept)
        return response

    async def _short(self, name: str, request: Any, timeout_s: float | None) -> bytes:
        data = await self._call(name, request, timeout_s)
        if len(data) > _MAX_SHORT_ANSWER_BYTES:
            raise RemoteProtocolError(f"an answer of {len(data)} bytes")
        return data

    async def _call(self, name: str, request: Any, timeout_s: float | None) -> bytes:
        client: Any = self._p2p._client  # noqa: SLF001  hivemind has no limiter to undecoded answers
        async with asyncio.timeout(timeout_s):
            data = await client.call_unary_handler(
                self._peer, f"{PlanetServeDHT.__name__}.{name}", request.SerializeToString()
            )
        return bytes(data)


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


def dht_place(peer_id: bytes) -> DHTID:
    return DHTID(place_of(peer_id))


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
