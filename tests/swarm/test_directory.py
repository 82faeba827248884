"""The directory over real nodes: announcing, looking up, and what hostile peers cannot do to it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import time
from pathlib import Path

import msgpack
import pytest
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DictionaryDHTValue
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.proto import dht_pb2
from swarm_helpers import StartNode, make_info, until

from planetserve.clock import SystemClock
from planetserve.crypto.identity import Identity, peer_id_bytes
from planetserve.errors import ConfigError, RemoteProtocolError, TransportError
from planetserve.swarm import records
from planetserve.swarm.dht import hivemind_limits, operations, protocol
from planetserve.swarm.dht.storage import (
    MAX_FOREIGN,
    MAX_FOREIGN_PER_KEY,
    MAX_FOREIGN_PER_PEER,
    MAX_RECORDS_PER_OWNER,
)
from planetserve.swarm.directory import Directory
from planetserve.swarm.libp2p import unary_rpc
from planetserve.swarm.libp2p.node import SwarmNode
from planetserve.types import PeerId, ServerState

CLOCK = SystemClock()
MODEL = "tiny"


async def start_nodes(start_node: StartNode, count: int) -> list[SwarmNode]:
    first = await start_node()
    return [first, *[await start_node(first) for _ in range(count - 1)]]


def signed(identity: Identity, ttl_s: float = 60.0) -> tuple[records.ServerBody, bytes]:
    now = time.time()
    body = records.server_body(make_info(identity), now, now + ttl_s)
    return body, records.sign(identity, body)


def wrapped(envelope: bytes) -> bytes:
    return bytes(msgpack.packb(envelope))


async def test_two_nodes_see_each_other(start_node: StartNode) -> None:
    alice, bob = await start_nodes(start_node, 2)
    info = make_info(alice.identity, next_rtt_ms={bob.peer_id: 3.5})
    await Directory(alice, CLOCK).announce(info, ttl_s=60)
    (found,) = await Directory(bob, CLOCK).lookup(MODEL)
    assert found == dataclasses.replace(info, announced_at_s=found.announced_at_s)
    assert abs(found.announced_at_s - time.time()) < 60
    assert await Directory(bob, CLOCK).lookup("other") == []


async def test_five_servers_and_a_client(start_node: StartNode) -> None:
    servers = await start_nodes(start_node, 5)
    client = await start_node(servers[0], client_mode=True)
    directories = [Directory(server, CLOCK) for server in servers]
    for server, directory in zip(servers, directories, strict=True):
        await directory.announce(make_info(server.identity), ttl_s=60)
    view = Directory(client, CLOCK)
    assert {info.peer_id for info in await view.lookup(MODEL)} == {s.peer_id for s in servers}

    newer = make_info(servers[1].identity, free_cache_tokens=7)
    await directories[1].announce(newer, ttl_s=30)
    await directories[2].withdraw(make_info(servers[2].identity))
    found = {info.peer_id: info for info in await view.lookup(MODEL)}
    assert len(found) == 5
    assert found[servers[1].peer_id].free_cache_tokens == 7
    assert found[servers[2].peer_id].state is ServerState.OFFLINE
    assert found[servers[3].peer_id].state is ServerState.ONLINE

    models = await view.models()
    assert list(models) == [MODEL]
    assert (models[MODEL].num_blocks, models[MODEL].dtype) == (8, "float32")
    index = await operations.get(client.dht, [records.MODELS_KEY], timeout_s=10)
    assert len(index[records.MODELS_KEY]) == 4, "the fifth server sees four vouchers and adds none"
    assert not view.rejected


async def test_a_record_ends(start_node: StartNode) -> None:
    alice, bob = await start_nodes(start_node, 2)
    await Directory(alice, CLOCK).announce(make_info(alice.identity), ttl_s=1.0)
    view = Directory(bob, CLOCK)
    async with asyncio.timeout(20):
        while await view.lookup(MODEL):  # noqa: ASYNC110  time itself gives no signal
            await asyncio.sleep(0.1)


async def test_a_restarted_server_replaces_its_record(
    start_node: StartNode, tmp_path: Path
) -> None:
    """Even if it now announces for a shorter time than the record of before has left."""
    keeper, path = await start_node(), str(tmp_path / "key")
    first = await start_node(keeper, identity_path=path)
    await Directory(first, CLOCK).announce(make_info(first.identity, version="1"), ttl_s=300)
    await first.close()
    again = await start_node(keeper, identity_path=path)
    directory = Directory(again, CLOCK)
    assert [info.version for info in await directory.lookup(MODEL)] == ["1"]
    await directory.announce(make_info(again.identity, version="2"), ttl_s=60)
    for node in (keeper, again):
        assert [info.version for info in await Directory(node, CLOCK).lookup(MODEL)] == ["2"]


async def test_bad_announcements_are_local_errors(start_node: StartNode) -> None:
    node = await start_node()
    directory = Directory(node, CLOCK)
    for ttl_s in (0.0, 601.0, math.nan):
        with pytest.raises(ConfigError, match="a record lives up to 600 s"):
            await directory.announce(make_info(node.identity), ttl_s)
    with pytest.raises(ConfigError, match="free_cache_tokens"):
        await directory.announce(make_info(node.identity, free_cache_tokens=-1), 60)


async def test_a_closed_node_has_no_directory(start_node: StartNode) -> None:
    node = await start_node()
    await node.close()
    with pytest.raises(TransportError, match="closed"):
        await Directory(node, CLOCK).lookup(MODEL)


class TestHostileStores:
    """Raw stores, as a modified node would send them."""

    @pytest.fixture
    async def victim(self, start_node: StartNode) -> SwarmNode:
        return await start_node()

    @pytest.fixture
    async def attacker(self, start_node: StartNode, victim: SwarmNode) -> SwarmNode:
        return await start_node(victim)

    async def store(
        self,
        attacker: SwarmNode,
        victim: SwarmNode,
        key: bytes,
        subkey: bytes,
        value: bytes,
        expires_at_s: float,
        in_cache: bool = False,
    ) -> bool:
        request = dht_pb2.StoreRequest(
            keys=[DHTID.generate(key).to_bytes()],
            subkeys=[subkey],
            values=[value],
            expiration_time=[expires_at_s],
            in_cache=[in_cache],
        )
        stub = attacker.dht.protocol.get_stub(PeerID.from_base58(victim.peer_id))
        response = await stub.rpc_store(request, timeout=5.0)
        return bool(response.store_ok[0])

    async def test_a_good_record_is_taken(self, attacker: SwarmNode, victim: SwarmNode) -> None:
        identity = Identity.generate()
        body, envelope = signed(identity)
        subkey = bytes(msgpack.packb(identity.peer_id))
        ends = body.expires_at_s
        assert await self.store(attacker, victim, body.dht_key(), subkey, wrapped(envelope), ends)
        (found,) = await Directory(victim, CLOCK).lookup(MODEL)
        assert found.peer_id == identity.peer_id

    async def test_bad_records_are_refused_and_counted(
        self, attacker: SwarmNode, victim: SwarmNode
    ) -> None:
        identity, other = Identity.generate(), Identity.generate()
        body, envelope = signed(identity)
        key, ends = body.dht_key(), body.expires_at_s
        mine, theirs = (bytes(msgpack.packb(who.peer_id)) for who in (identity, other))
        good = wrapped(envelope)
        far = time.time() + 31e6
        deep = b"\x91" * 900 + b"\xc0"
        attempts = [
            (key, mine, wrapped(envelope.replace(b"4096", b"4097")), ends),
            (key, theirs, good, ends),
            (b"elsewhere", mine, good, ends),
            (key, mine, good, far),
            (key, mine, wrapped(bytes(5000)), ends),
            (key, mine, b"\xc4\x03\x00\x00\x00", ends),
            (key, mine, b"", ends),
            (key, mine, deep, ends),
            (key, deep, good, ends),
            (key, b"\x01", good, ends),
            (key, msgpack.packb(None), good, ends),  # a plain value, without a subkey
        ]
        for attempt in attempts:
            assert not await self.store(attacker, victim, *attempt)
        assert len(victim.dht.protocol.storage) == 0
        rejected = Directory(victim, CLOCK).rejected
        assert rejected["bad signature"] == 1
        assert rejected["wrong owner"] == 1
        assert rejected["wrong key"] == 1
        assert rejected["altered expiry"] == 1
        assert rejected.total() == len(attempts)

    async def test_of_a_dictionary_only_the_good_records_are_taken(
        self, attacker: SwarmNode, victim: SwarmNode
    ) -> None:
        identity = Identity.generate()
        body, envelope = signed(identity)
        poisoned = DictionaryDHTValue()
        poisoned.store(identity.peer_id, wrapped(envelope), body.expires_at_s)
        poisoned.store(Identity.generate().peer_id, wrapped(envelope), body.expires_at_s)
        poisoned.store("x", b"junk", time.time() + 1e6)
        data = attacker.dht.protocol.serializer.dumps(poisoned)
        assert await self.store(attacker, victim, body.dht_key(), b"", data, body.expires_at_s)
        (found,) = await Directory(victim, CLOCK).lookup(MODEL)
        assert found.peer_id == identity.peer_id

    async def test_nothing_is_cached_for_others(
        self, attacker: SwarmNode, victim: SwarmNode
    ) -> None:
        identity = Identity.generate()
        body, envelope = signed(identity)
        subkey, value = bytes(msgpack.packb(identity.peer_id)), wrapped(envelope)
        with pytest.raises(Exception, match="protocol"):
            await self.store(
                attacker, victim, body.dht_key(), subkey, value, body.expires_at_s, in_cache=True
            )

    async def test_a_long_request_leaves_the_loop_to_others(self, victim: SwarmNode) -> None:
        """Each of its records costs a signature check."""
        identity = Identity.generate()
        body, envelope = signed(identity)
        wrong = wrapped(envelope.replace(b"4096", b"4097"))
        count = operations.MAX_KEYS
        request = dht_pb2.StoreRequest(
            keys=[DHTID.generate(body.dht_key()).to_bytes()] * count,
            subkeys=[bytes(msgpack.packb(identity.peer_id))] * count,
            values=[wrong] * count,
            expiration_time=[body.expires_at_s] * count,
            in_cache=[False] * count,
        )
        storing = asyncio.create_task(victim.dht.protocol.rpc_store(request, None))
        num_turns = 0
        while not storing.done():
            await asyncio.sleep(0)
            num_turns += 1
        response = await storing
        assert list(response.store_ok) == [False] * count
        assert Directory(victim, CLOCK).rejected["bad signature"] == count
        assert num_turns > count / 32

    async def test_a_dictionary_holds_no_more_than_a_key_may(
        self, attacker: SwarmNode, victim: SwarmNode
    ) -> None:
        """All of it is checked in one go. On the network it would be too long a request as well."""
        identity = Identity.generate()
        body, envelope = signed(identity)
        wide = DictionaryDHTValue()
        for number in range(hivemind_limits.MAX_RECORDS_PER_KEY + 1):
            wide.store(str(number), wrapped(envelope), body.expires_at_s)
        data = attacker.dht.protocol.serializer.dumps(wide)
        assert len(data) > unary_rpc.MAX_REQUEST_BYTES
        request = dht_pb2.StoreRequest(
            keys=[DHTID.generate(body.dht_key()).to_bytes()], subkeys=[b""], values=[data],
            expiration_time=[body.expires_at_s], in_cache=[False],
        )  # fmt: skip
        with pytest.raises(RemoteProtocolError, match="too large"):
            await victim.dht.protocol.rpc_store(request, None)
        with pytest.raises(P2PDaemonError):
            await self.store(attacker, victim, body.dht_key(), b"", data, body.expires_at_s)
        assert not Directory(victim, CLOCK).rejected

    def test_little_is_checked_in_one_go(self) -> None:
        def pieces(*sizes: int) -> list[list[int]]:
            return [list(sizes[rows]) for rows in protocol._pieces(sizes)]

        most = 64 * 1024
        assert pieces() == []
        assert pieces(*range(40)) == [[*range(16)], [*range(16, 32)], [*range(32, 40)]]
        assert pieces(1, most, 5 * most, 1, 2) == [[1], [most], [5 * most], [1, 2]]

    async def test_columns_of_different_length_are_refused(self, victim: SwarmNode) -> None:
        request = dht_pb2.StoreRequest(keys=[bytes(20)] * 2, subkeys=[b""], values=[b"v"])
        with pytest.raises(RemoteProtocolError, match="columns"):
            await victim.dht.protocol.rpc_store(request, None)

    async def test_a_long_request_is_refused(self, attacker: SwarmNode, victim: SwarmNode) -> None:
        stub = attacker.dht.protocol.get_stub(PeerID.from_base58(victim.peer_id))
        with pytest.raises(Exception, match="protocol"):
            await stub.rpc_find(dht_pb2.FindRequest(keys=[bytes(20)] * 17), timeout=5.0)

    async def test_nobody_chooses_a_place(self, attacker: SwarmNode, victim: SwarmNode) -> None:
        near = DHTID.generate(records.server_key(MODEL, 0))
        info = dht_pb2.NodeInfo(node_id=near.to_bytes())
        stub = attacker.dht.protocol.get_stub(PeerID.from_base58(victim.peer_id))
        await stub.rpc_ping(dht_pb2.PingRequest(peer=info), timeout=5.0)
        await asyncio.sleep(0.05)
        table = victim.dht.protocol.routing_table
        assert near not in table
        assert operations.knows(victim.dht, attacker.peer_id)
        own_place = DHTID.generate(peer_id_bytes(attacker.peer_id))
        assert table[PeerID.from_base58(attacker.peer_id)] == own_place


class TestManyRequests:
    """A peer that asks for more than its part."""

    @pytest.fixture
    async def victim(self, start_node: StartNode) -> SwarmNode:
        return await start_node(max_peer_lookups=60.0, peer_lookup_burst=100)

    @staticmethod
    async def find(node: SwarmNode, victim: SwarmNode, num_keys: int) -> dht_pb2.FindResponse:
        stub = node.dht.protocol.get_stub(PeerID.from_base58(victim.peer_id))
        info = node.dht.protocol.node_info
        request = dht_pb2.FindRequest(keys=[os.urandom(20)] * num_keys, peer=info)
        return await stub.rpc_find(request, timeout=10.0)

    async def test_are_refused_and_counted_while_others_are_served(
        self, start_node: StartNode, victim: SwarmNode
    ) -> None:
        greedy, modest = [await start_node(victim, client_mode=True) for _ in range(2)]
        first = await asyncio.gather(
            *(self.find(greedy, victim, 9) for _ in range(200)), return_exceptions=True
        )
        num_served = sum(isinstance(item, dht_pb2.FindResponse) for item in first)
        # Ten a piece; a few of a hundred have gone for joining, one comes back every second.
        assert 5 <= num_served <= 12
        assert victim.refused["lookup"] == len(first) - num_served
        assert all("queue_full" in str(item) for item in first if isinstance(item, Exception))
        await Directory(victim, CLOCK).announce(make_info(victim.identity), ttl_s=60)
        (found,) = await Directory(modest, CLOCK).lookup(MODEL)
        assert found.peer_id == victim.peer_id
        assert victim.refused["lookup"] == len(first) - num_served

    async def test_records_count_by_their_number_and_size(
        self, start_node: StartNode, victim: SwarmNode
    ) -> None:
        """Each of them may cost a signature check."""
        for num_keys, size in ((80, 10), (60, 900)):
            request = dht_pb2.StoreRequest(
                keys=[bytes(20)] * num_keys, subkeys=[b""] * num_keys,
                values=[bytes(size)] * num_keys, expiration_time=[0.0] * num_keys,
                in_cache=[False] * num_keys,
            )  # fmt: skip
            attacker = await start_node(victim, client_mode=True)
            stub = attacker.dht.protocol.get_stub(PeerID.from_base58(victim.peer_id))
            with contextlib.suppress(P2PHandlerError):  # what it holds is no record
                await stub.rpc_store(request, timeout=10.0)
            with pytest.raises(P2PHandlerError, match="queue_full"):
                await stub.rpc_store(request, timeout=10.0)
        assert victim.refused["lookup"] == 2

    async def test_pings_that_are_left_hanging_do_not_stop_the_own_look_ups(
        self, start_node: StartNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A ping may ask for one back, which takes one of the calls that a node has under way."""
        victim = await start_node()
        keeper, attacker = [await start_node(victim) for _ in range(2)]
        await Directory(keeper, CLOCK).announce(make_info(keeper.identity), ttl_s=60)
        num_hanging = 0

        async def hang(data: bytes, remote: PeerId) -> bytes:
            nonlocal num_hanging
            num_hanging += 1
            await asyncio.Event().wait()
            return b""

        monkeypatch.setitem(attacker.calls, "PlanetServeDHT.rpc_ping", hang)
        stub = attacker.dht.protocol.get_stub(PeerID.from_base58(victim.peer_id))
        info = attacker.dht.protocol.node_info
        request = dht_pb2.PingRequest(peer=info, validate=True)
        pings = [asyncio.create_task(stub.rpc_ping(request, timeout=10.0)) for _ in range(300)]
        await until(lambda: num_hanging > 0 and victim.refused["lookup"] > 0)
        started_s = time.monotonic()
        await Directory(victim, CLOCK).lookup(MODEL)
        assert time.monotonic() - started_s < protocol.RPC_TIMEOUT_S / 2
        assert num_hanging < operations._MAX_PARALLEL_RPC / 2
        await asyncio.gather(*pings, return_exceptions=True)


async def test_an_answer_with_poison_does_not_hide_the_rest(
    start_node: StartNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One keeper of the key adds junk that never ends, another one is honest."""
    hostile, honest = await start_nodes(start_node, 2)
    client = await start_node(honest, client_mode=True)
    await Directory(honest, CLOCK).announce(make_info(honest.identity), ttl_s=60)

    async def poisoned(data: bytes, remote: PeerId) -> bytes:
        junk = DictionaryDHTValue()
        junk.store(Identity.generate().peer_id, b"junk", time.time() + 1e9)
        response = dht_pb2.FindResponse(peer=hostile.dht.protocol.node_info)
        for _ in dht_pb2.FindRequest.FromString(data).keys:
            result = response.results.add()
            result.type = dht_pb2.FOUND_DICTIONARY
            result.value = hostile.dht.protocol.serializer.dumps(junk)
            result.expiration_time = math.inf
            result.nearest_node_ids.append(bytes(20))
            result.nearest_peer_ids.append(peer_id_bytes(Identity.generate().peer_id))
        return bytes(response.SerializeToString())

    assert "PlanetServeDHT.rpc_find" in hostile.calls
    monkeypatch.setitem(hostile.calls, "PlanetServeDHT.rpc_find", poisoned)
    view = Directory(client, CLOCK)
    found = await view.lookup(MODEL)
    assert [info.peer_id for info in found] == [honest.peer_id]
    assert view.rejected["malformed"] > 0


class TestBoundedStorage:
    """The limits, on the storage alone."""

    def test_a_key_holds_so_many_records(self) -> None:
        storage, key, ends = operations.BoundedStorage(), DHTID(1), time.time() + 60
        for number in range(hivemind_limits.MAX_RECORDS_PER_KEY):
            assert storage.store(key, b"v", ends, subkey=f"{number}")
        assert not storage.store(key, b"v", ends, subkey="one more")
        assert storage.store(key, b"w", ends + 1, subkey="7"), "known owners may renew"
        assert storage.get(key).value.get("7").value == b"w"

    def test_an_owner_has_so_many_records(self) -> None:
        storage, ends = operations.BoundedStorage(), time.time() + 60
        taken = [storage.store(DHTID(n), b"v", ends, subkey="me") for n in range(20)]
        assert sum(taken) == MAX_RECORDS_PER_OWNER
        assert storage.store(DHTID(19), b"v", ends, subkey="other")

    def test_there_are_so_many_keys(self) -> None:
        storage, ends = operations.BoundedStorage(), time.time() + 60
        for number in range(operations.MAX_KEYS):
            assert storage.store(DHTID(number), b"v", ends, subkey=f"{number}")
        assert not storage.store(DHTID(operations.MAX_KEYS), b"v", ends, subkey="one more")

    def test_renewing_does_not_grow_it(self) -> None:
        storage, key, ends = operations.BoundedStorage(), DHTID(1), time.time() + 60
        for number in range(1000):
            assert storage.store(key, b"v", ends + number, subkey="me")
        assert len(storage.expiration_heap) < 50
        assert len(storage.data[key].value.expiration_heap) < 50

    def test_an_older_record_does_not_replace_a_newer_one(self) -> None:
        storage, key, ends = operations.BoundedStorage(), DHTID(1), time.time() + 60
        assert storage.store(key, b"new", ends, subkey="me")
        assert not storage.store(key, b"old", ends - 1, subkey="me")
        assert storage.store(key, b"new", ends, subkey="me"), "the same again is no failure"
        assert storage.get(key).value.get("me").value == b"new"

    def test_what_it_returns_is_a_copy(self) -> None:
        storage, key, ends = operations.BoundedStorage(), DHTID(1), time.time() + 60
        storage.store(key, b"v", ends, subkey="me")
        storage.get(key).value.store("forged", b"v", ends)
        assert storage.get(key).value.get("forged") is None

    def test_plain_values_are_not_stored(self) -> None:
        storage = operations.BoundedStorage()
        assert not storage.store(DHTID(1), b"v", time.time() + 60)
        assert storage.get(DHTID(1)) is None


class TestCrowding:
    """What one peer, or one owner, can take of a node's storage."""

    def test_of_others_records_a_peer_stores_few(self) -> None:
        storage, ends = operations.BoundedStorage(), time.time() + 60
        taken = [
            storage.store_subkey(DHTID(key), f"{key} {n}", b"v", ends, sender="crowder")
            for key in range(8)
            for n in range(50)
        ]
        assert sum(taken) == MAX_FOREIGN_PER_PEER
        assert len(storage.get(DHTID(0)).value) == MAX_FOREIGN_PER_KEY
        assert storage.store_subkey(DHTID(0), "0 0", b"w", ends + 1, sender="crowder"), "renewed"

    def test_of_others_records_all_peers_store_a_bounded_number(self) -> None:
        storage, ends = operations.BoundedStorage(), time.time() + 60
        taken = [
            storage.store_subkey(DHTID(n % 900), f"{n}", b"v", ends, sender=f"crowder {n % 500}")
            for n in range(3000)
        ]
        assert sum(taken) == MAX_FOREIGN

    def test_what_owners_bring_comes_first(self) -> None:
        storage, key, ends = operations.BoundedStorage(), DHTID(1), time.time() + 60
        for number in range(4):
            storage.store_subkey(key, f"guest {number}", b"v", ends, sender="crowder")
        for number in range(hivemind_limits.MAX_RECORDS_PER_KEY):
            assert storage.store_subkey(key, f"{number}", b"v", ends, sender=f"{number}")
        assert not storage.store_subkey(key, "one more", b"v", ends, sender="one more")
        assert {*storage.get(key).value.data} == {
            f"{number}" for number in range(hivemind_limits.MAX_RECORDS_PER_KEY)
        }

    def test_an_owner_of_many_keys_gives_way_when_there_are_no_more(self) -> None:
        storage, ends = operations.BoundedStorage(), time.time() + 60
        for number in range(operations.MAX_KEYS):
            owner = f"crowder {number // MAX_RECORDS_PER_OWNER}"
            assert storage.store_subkey(DHTID(number), owner, b"v", ends)
        for number in range(100):
            key = DHTID(operations.MAX_KEYS + number)
            assert storage.store_subkey(key, f"server {number}", b"v", ends)
        assert len(storage) == operations.MAX_KEYS
        kept = [
            f"server {n}" in storage.data[DHTID(operations.MAX_KEYS + n)].value for n in range(100)
        ]
        assert all(kept)

    def test_owners_of_few_records_do_not_give_way(self) -> None:
        storage, ends = operations.BoundedStorage(), time.time() + 60
        for number in range(operations.MAX_KEYS):
            assert storage.store_subkey(DHTID(number), f"server {number // 2}", b"v", ends)
        assert not storage.store_subkey(DHTID(operations.MAX_KEYS), "crowder", b"v", ends)

    async def test_one_peer_crowds_nobody_out(self, start_node: StartNode) -> None:
        """It signs records of made-up owners, as many as a key holds."""
        victim = await start_node(peer_lookup_burst=100_000)
        attacker, honest = await start_node(victim), await start_node(victim)
        stub = attacker.dht.protocol.get_stub(PeerID.from_base58(victim.peer_id))
        for _ in range(hivemind_limits.MAX_RECORDS_PER_KEY // 16):
            request = dht_pb2.StoreRequest()
            for _ in range(16):
                identity = Identity.generate()
                body, envelope = signed(identity)
                request.keys.append(DHTID.generate(body.dht_key()).to_bytes())
                request.subkeys.append(bytes(msgpack.packb(identity.peer_id)))
                request.values.append(wrapped(envelope))
                request.expiration_time.append(body.expires_at_s)
                request.in_cache.append(False)
            await stub.rpc_store(request, timeout=30.0)
        await Directory(honest, CLOCK).announce(make_info(honest.identity), ttl_s=60)
        kept = [len(found.value) for found in victim.dht.protocol.storage.data.values()]
        assert sum(kept) <= MAX_FOREIGN_PER_PEER + 2
        found = {info.peer_id for info in await Directory(victim, CLOCK).lookup(MODEL)}
        assert honest.peer_id in found


class TestNewPeers:
    """What it costs a node that peer ids cost nothing."""

    @staticmethod
    async def meet(node: SwarmNode, count: int) -> None:
        for _ in range(count):
            peer = PeerID.from_base58(Identity.generate().peer_id)
            await node.dht.protocol.update_routing_table(None, peer)

    async def test_newcomers_are_handed_nothing(
        self, start_node: StartNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All that they might keep would be a full directory for each."""
        node = await start_node()
        await Directory(node, CLOCK).announce(make_info(node.identity), ttl_s=60)
        sent: list[object] = []

        async def send(*args: object, **_options: object) -> None:
            sent.append(args)

        monkeypatch.setattr(node.dht.protocol, "call_store", send)
        await self.meet(node, 5)
        await asyncio.sleep(0)
        assert not sent

    async def test_those_that_wait_for_a_place_are_bounded(
        self, start_node: StartNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = await start_node()

        async def ping(*_args: object, **_options: object) -> None:
            return None

        monkeypatch.setattr(node.dht.protocol, "call_ping", ping)
        await self.meet(node, 3000)
        table = node.dht.protocol.routing_table
        assert len(table.uid_to_peer_id) <= 40 * len(table.buckets)
        assert len(table.peer_id_to_uid) == len(table.uid_to_peer_id)
        assert all(len(bucket.replacement_nodes) <= 20 for bucket in table.buckets)


async def test_those_that_vouch_for_other_files_keep_a_model_out_of_no_index(
    start_node: StartNode,
) -> None:
    """Under the same name, and before its own servers."""
    liars = await start_nodes(start_node, 5)
    for liar in liars:
        await Directory(liar, CLOCK).announce(make_info(liar.identity, fingerprint="0" * 64), 60)
    honest = await start_node(liars[0])
    await Directory(honest, CLOCK).announce(make_info(honest.identity), ttl_s=60)
    index = await operations.get(honest.dht, [records.MODELS_KEY], timeout_s=10)
    assert honest.peer_id in index[records.MODELS_KEY]


def test_the_node_uses_our_protocol() -> None:
    """`DHTNode.create` must find the bounded protocol under the name that it looks up."""
    assert DHTNode.create.__func__.__globals__["DHTProtocol"] is protocol.PlanetServeDHT
