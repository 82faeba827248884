"""Searches of a swarm that is made up here: whatever some peers do, the others find each other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Mapping, Sequence

import pytest

from planetserve.swarm.dht import search as searching
from planetserve.swarm.dht.search import NUM_NEAREST, PeerMemory, Search, place_of
from planetserve.testing.clock import ManualClock

Named = Mapping[int, Collection[bytes]] | None
Conduct = Callable[["World", bytes, Sequence[int]], "Named | None"]

KEYS = tuple(random.Random(1).getrandbits(160) for _ in range(8))


def new_ids(rng: random.Random, count: int) -> list[bytes]:
    return [rng.randbytes(38) for _ in range(count)]


class World:
    """Peers with what they know of each other; hostile ones behave as `conduct` says.

    Those that do not answer hang until they are cancelled or, as calls do, time out.
    """

    def __init__(self, rng: random.Random, num_honest: int, hostile: Mapping[bytes, Conduct]):
        self.rng = rng
        self.hostile = hostile
        self.honest = new_ids(rng, num_honest)
        self.peers = [*self.honest, *hostile]
        self.made_up = new_ids(rng, 2000)
        self.asked: list[bytes] = []

    def nearest(self, key: int, among: Collection[bytes]) -> list[bytes]:
        return sorted(among, key=lambda peer: place_of(peer) ^ key)[:NUM_NEAREST]

    async def ask(self, peer: bytes, keys: Sequence[int], _by_name: bool) -> Named:
        self.asked.append(peer)
        await asyncio.sleep(0)
        if peer in self.hostile:
            answer = self.hostile[peer](self, peer, keys)
        elif peer in self.honest:
            answer = {key: self.nearest(key, self.peers) for key in keys}
        else:
            answer = None
        if answer is None:
            await asyncio.sleep(0.05)  # as long as a call may take, here
        return answer

    async def search(
        self, own: bytes, always: Collection[bytes], memory: PeerMemory | None = None
    ) -> Search:
        search = Search(
            KEYS, self.ask, always=always, known=(), own=own,
            memory=memory or PeerMemory(ManualClock()),
        )  # fmt: skip
        await search.run(enough_s=5.0, timeout_s=15.0)
        return search


def hang(_world: World, _peer: bytes, _keys: Sequence[int]) -> Named:
    return None


def name_made_up_ones(world: World, _peer: bytes, keys: Sequence[int]) -> Named:
    return {key: world.nearest(key, world.made_up) for key in keys}


def name_each_other(world: World, _peer: bytes, keys: Sequence[int]) -> Named:
    return {key: world.nearest(key, world.hostile) for key in keys}


def name_the_honest_with_made_up_ones(world: World, _peer: bytes, keys: Sequence[int]) -> Named:
    """So that the word of the liar seems to be needed to find them."""
    return {
        key: [*world.nearest(key, world.made_up)[:8], *world.nearest(key, world.honest)]
        for key in keys
    }


def name_too_many(world: World, _peer: bytes, keys: Sequence[int]) -> Named:
    return {key: world.made_up for key in keys}


def name_itself_and_nobody(_world: World, peer: bytes, keys: Sequence[int]) -> Named:
    return {key: [peer] * 30 for key in keys[:1]}


CONDUCTS: list[Conduct] = [
    hang,
    name_made_up_ones,
    name_each_other,
    name_the_honest_with_made_up_ones,
    name_too_many,
    name_itself_and_nobody,
]


def hostile_ones(
    rng: random.Random, count: int, conducts: Sequence[Conduct]
) -> dict[bytes, Conduct]:
    return {peer: rng.choice(conducts) for peer in new_ids(rng, count)}


@pytest.mark.parametrize("seed", range(12))
async def test_the_honest_find_all_the_honest(seed: int) -> None:
    """Through one honest initial peer, however many of the others are hostile."""
    rng = random.Random(seed)
    world = World(rng, rng.randint(1, 12), hostile_ones(rng, rng.randint(1, 7), CONDUCTS))
    first = world.honest[0]
    also = rng.sample(sorted(world.hostile), k=min(len(world.hostile), rng.randint(0, 2)))
    for own in world.honest[1:] or new_ids(rng, 1):
        search = await world.search(own, [first, *also])
        for key in KEYS:
            missed = set(world.honest) - {own} - set(search.nearest(key))
            assert not missed


@pytest.mark.parametrize("conduct", CONDUCTS)
async def test_one_peer_makes_nobody_dial_much(conduct: Conduct) -> None:
    """A second time even less: who hung, and who named those that did, is remembered."""
    rng = random.Random(0)
    world = World(rng, 5, hostile_ones(rng, 1, [conduct]))
    memory = PeerMemory(ManualClock())
    await world.search(new_ids(rng, 1)[0], world.honest[:1], memory)
    dialled = set(world.asked) - set(world.peers)
    assert len(dialled) <= 2 * searching._PARALLEL_PER_NAMER + len(world.honest)
    world.asked.clear()
    await world.search(new_ids(rng, 1)[0], world.honest[:1], memory)
    assert not set(world.asked) - set(world.peers)


async def test_in_a_large_swarm_the_nearest_are_asked() -> None:
    rng = random.Random(3)
    world = World(rng, 400, {})
    search = await world.search(new_ids(rng, 1)[0], world.honest[:1])
    for key in KEYS:
        assert search.nearest(key)[:NUM_NEAREST] == world.nearest(key, world.honest)
    assert len(set(world.asked)) < 300


async def test_initial_peers_are_asked_even_if_they_were_silent() -> None:
    rng = random.Random(4)
    world = World(rng, 3, {})
    memory = PeerMemory(ManualClock())
    for peer in world.honest:
        memory.note_silent(peer)
    search = await world.search(new_ids(rng, 1)[0], world.honest[:2], memory)
    assert set(search.nearest(KEYS[0])) >= set(world.honest[:2])
    assert not memory.is_silent(world.honest[0])


async def test_a_search_ends_in_time() -> None:
    rng = random.Random(5)
    hostile = hostile_ones(rng, 3, [hang])
    world = World(rng, 1, hostile)
    never = asyncio.Event()

    async def ask(peer: bytes, keys: Sequence[int], by_name: bool) -> Named:
        if peer in hostile:
            await never.wait()
        return await world.ask(peer, keys, by_name)

    options = {"known": (), "own": b"", "memory": PeerMemory(ManualClock())}
    search = Search(KEYS, ask, always=world.peers, **options)
    await search.run(enough_s=0.01, timeout_s=1e6)
    assert search.nearest(KEYS[0]) == world.honest
    search = Search(KEYS, ask, always=hostile, **options)
    await search.run(enough_s=1e6, timeout_s=0.01)
    assert search.nearest(KEYS[0]) == []


async def test_what_fails_here_is_one_peers_failure() -> None:
    world = World(random.Random(7), 3, {})
    bad = world.honest[1]

    async def ask(peer: bytes, keys: Sequence[int], by_name: bool) -> Named:
        if peer == bad:
            raise ZeroDivisionError
        return await world.ask(peer, keys, by_name)

    search = Search(
        KEYS, ask, always=world.honest, known=(), own=b"", memory=PeerMemory(ManualClock())
    )
    await search.run(enough_s=5.0, timeout_s=15.0)
    assert set(search.nearest(KEYS[0])) == set(world.honest) - {bad}


def test_what_is_remembered_is_bounded_and_passes() -> None:
    clock = ManualClock()
    memory = PeerMemory(clock)
    for peer in new_ids(random.Random(6), searching._MAX_REMEMBERED + 100):
        memory.note_silent(peer)
    assert len(memory._silent._until_s) == searching._MAX_REMEMBERED
    memory.note_misleading(b"liar")
    assert memory.is_misleading(b"liar")
    assert not memory.is_silent(b"liar")
    clock.now_s += searching._MISLED_FOR_S + 1
    assert not memory.is_misleading(b"liar")
