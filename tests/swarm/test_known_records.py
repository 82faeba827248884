"""What a directory goes on knowing when a look-up finds less than the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pytest
from swarm_helpers import make_info

from planetserve.crypto.identity import Identity
from planetserve.swarm import directory, records
from planetserve.swarm.dht.swarm_clock import SwarmClock
from planetserve.swarm.directory import Directory
from planetserve.testing.clock import ManualClock
from planetserve.types import PeerId, ServerState

MODEL = "tiny"
Found = dict[bytes, dict[PeerId, tuple[bytes, float]]]


class Keepers:
    """What the peers that answer hold."""

    def __init__(self, clock: ManualClock):
        self.clock = clock
        self.found: Found = {}

    def hold(
        self, identity: Identity, ttl_s: float = 300.0, state: ServerState = ServerState.ONLINE
    ) -> None:
        now = self.clock.unix()
        body = records.server_body(make_info(identity, state=state), now, now + ttl_s)
        envelope = records.sign(identity, body)
        self.found.setdefault(body.dht_key(), {})[identity.peer_id] = envelope, body.expires_at_s

    async def get_records(
        self, keys: Sequence[bytes], _timeout_s: float
    ) -> Mapping[bytes, Mapping[PeerId, tuple[bytes, float]]]:
        return {key: dict(self.found.get(key, {})) for key in keys}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def keepers(clock: ManualClock) -> Keepers:
    return Keepers(clock)


@pytest.fixture
def view(clock: ManualClock, keepers: Keepers) -> Directory:
    swarm_clock = SwarmClock(clock)
    node = SimpleNamespace(
        clock=swarm_clock,
        records=records.RecordChecker(swarm_clock),
        peer_id="me",
        get_records=keepers.get_records,
    )
    return Directory(node, clock)  # type: ignore[arg-type]


async def seen(view: Directory) -> dict[PeerId, ServerState]:
    return {info.peer_id: info.state for info in await view.lookup(MODEL)}


async def test_what_a_look_up_misses_is_known_until_it_ends(
    clock: ManualClock, keepers: Keepers, view: Directory
) -> None:
    """Peers answer late, or hide a record: its server is there all the same."""
    alice, bob = Identity.generate(), Identity.generate()
    keepers.hold(alice)
    keepers.hold(bob, ttl_s=600.0)
    assert set(await seen(view)) == {alice.peer_id, bob.peer_id}
    keepers.found.clear()
    assert set(await seen(view)) == {alice.peer_id, bob.peer_id}
    clock.now_s += 301.0
    assert set(await seen(view)) == {bob.peer_id}
    clock.now_s += 300.0
    assert await seen(view) == {}


async def test_a_newer_record_counts_and_an_older_one_does_not_come_back(
    clock: ManualClock, keepers: Keepers, view: Directory
) -> None:
    alice = Identity.generate()
    keepers.hold(alice)
    await seen(view)
    old = keepers.found
    keepers.found = {}
    clock.now_s += 10.0
    keepers.hold(alice, state=ServerState.DRAINING)
    assert await seen(view) == {alice.peer_id: ServerState.DRAINING}
    keepers.found = old
    assert await seen(view) == {alice.peer_id: ServerState.DRAINING}


async def test_a_crowd_of_new_records_pushes_no_known_one_out(
    keepers: Keepers, view: Directory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_MAX_UNSEEN_PER_KEY", 2)
    alice = Identity.generate()
    keepers.hold(alice)
    await seen(view)
    for _ in range(3):
        keepers.found.clear()
        for _ in range(40):
            keepers.hold(Identity.generate())
        found = await seen(view)
        assert alice.peer_id in found
        assert len(found) <= 40 + 2 * records.NUM_SHARDS
