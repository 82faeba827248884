"""What a client makes of its view and of failures: whom it uses, blames, bans and forgives."""

from __future__ import annotations

import asyncio

import pytest
from written_swarm import FACTS, Board, server

from planetserve.client.chain_manager import ChainManager
from planetserve.client.swarm_view import SwarmView
from planetserve.config import ClientConfig
from planetserve.errors import (
    CapacityError,
    DecryptionFailed,
    EdgeStalled,
    HopTimeout,
    MissingBlocksError,
    PlanetServeError,
    QueueFull,
    RemoteError,
    SessionLengthError,
    StreamClosed,
)
from planetserve.testing.clock import ManualClock
from planetserve.types import Chain, Hop, ServerInfo

BOTH = Chain((Hop("a", 0, 4), Hop("b", 4, 8)))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def board() -> Board:
    return Board(server("a"), server("b", decode_ms_per_block=2.0))


@pytest.fixture
async def manager(clock: ManualClock, board: Board) -> ChainManager:
    manager = ChainManager(ClientConfig(chain_spread=0.0), FACTS, clock)
    manager.view._directory = board  # type: ignore[assignment]
    await manager.view.look_again()
    return manager


async def first_hop(manager: ChainManager) -> str:
    return (await manager.plan(1, 10)).hops[0].peer_id


async def test_two_sessions_may_revive_the_same_server(
    manager: ChainManager, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answers(_view: SwarmView, _info: ServerInfo) -> bool:
        await asyncio.sleep(0)  # both have asked before either is answered
        return True

    monkeypatch.setattr(SwarmView, "ping", answers)
    manager._bans.ban(["a"], clock.now_s + 60.0)
    assert await first_hop(manager) == "b"
    await asyncio.gather(manager._revive(), manager._revive())
    assert await first_hop(manager) == "a"


async def test_bans_that_are_over_keep_no_banned_server_from_its_chance(
    manager: ChainManager, clock: ManualClock, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answers(_view: SwarmView, _info: ServerInfo) -> bool:
        return True

    monkeypatch.setattr(SwarmView, "ping", answers)
    earlier = [server(f"earlier {number}", 0, 4) for number in range(20)]
    board.servers += earlier
    await manager.view.refresh()
    manager._bans.ban([info.peer_id for info in earlier], clock.now_s + 5.0)
    clock.now_s += 5.0
    manager._bans.ban(["a", "b"], clock.now_s + 60.0)
    await manager._revive()
    assert manager._bans.banned() == []


async def test_a_server_at_fault_is_left_alone_until_it_works_again(
    manager: ChainManager, clock: ManualClock
) -> None:
    error = StreamClosed("gone")
    error.peer_id = "a"
    assert await manager.report_failure(error, BOTH) == ["a"]
    assert await first_hop(manager) == "b"
    clock.now_s += manager.config.ban_timeout
    assert await first_hop(manager) == "a"
    await manager.report_failure(error, BOTH)
    manager.report_success(BOTH)
    assert await first_hop(manager) == "a"


async def test_a_full_server_is_left_alone_for_as_long_as_it_says(
    manager: ChainManager, clock: ManualClock
) -> None:
    error = QueueFull("later", retry_after_s=3.0)
    error.peer_id = "a"
    await manager.report_failure(error, BOTH)
    assert await first_hop(manager) == "b"
    clock.now_s += 3.0
    assert await first_hop(manager) == "a"


async def test_the_clients_own_mistake_bans_nobody(manager: ChainManager) -> None:
    error = SessionLengthError("too long")
    error.peer_id = "a"
    assert await manager.report_failure(error, BOTH) == ()
    assert await first_hop(manager) == "a"


async def test_of_a_chain_that_fell_silent_those_who_answer_no_ping_are_at_fault(
    manager: ChainManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answers(_view: SwarmView, info: ServerInfo) -> bool:
        return info.peer_id != "a"

    monkeypatch.setattr(SwarmView, "ping", answers)
    assert await manager.report_failure(HopTimeout("no answer"), BOTH) == ["a"]
    assert await first_hop(manager) == "b"


async def test_a_way_that_stands_still_bans_neither_end(
    manager: ChainManager, clock: ManualClock
) -> None:
    error = EdgeStalled("nothing passes")
    error.edge = ("a", "b")
    assert not await manager.report_failure(error, BOTH)
    assert manager._quarrels.avoided() == {("a", "b")}
    assert await first_hop(manager) == "a"
    clock.now_s += manager.config.ban_timeout
    assert not manager._quarrels.avoided()


def complaint(kind: type[PlanetServeError], edge: tuple[str, str]) -> PlanetServeError:
    error = kind("it is the other one's fault")
    error.edge, error.claimed_by = edge, edge[0]
    return error


@pytest.mark.parametrize("kind", [EdgeStalled, DecryptionFailed, RemoteError, CapacityError])
async def test_a_complaint_takes_no_server_out_until_there_are_several(
    manager: ChainManager, kind: type[PlanetServeError]
) -> None:
    for _ in range(3):
        assert not await manager.report_failure(complaint(kind, ("a", "b")), None)
        assert not manager._bans.banned()
    assert manager._quarrels.avoided() == {("a", "b")}
    assert await manager.report_failure(complaint(kind, ("a", "c")), None) == ["a"]
    assert manager._bans.banned() == ["a"]
    assert await first_hop(manager) == "b"


async def test_servers_that_leave_are_avoided_if_others_can_take_their_place(
    manager: ChainManager,
) -> None:
    assert manager.can_avoid({"a"}, 1, 10)
    assert await first_hop(manager) == "b"
    assert not manager.can_avoid({"b"}, 1, 10)


@pytest.mark.parametrize(
    ("error", "attempt", "delay_s"),
    [
        (StreamClosed("gone"), 1, 0.0),
        (StreamClosed("gone"), 2, 0.0),
        (StreamClosed("gone"), 3, 1.0),
        (StreamClosed("gone"), 5, 4.0),
        (StreamClosed("gone"), 6, None),
        (QueueFull("later", retry_after_s=7.0), 1, 7.0),
        (QueueFull("later", retry_after_s=1e6), 1, 60.0),
        (MissingBlocksError("nobody"), 1, None),
        (SessionLengthError("too long"), 1, None),
    ],
)
def test_retries_wait_longer_and_longer_and_end(
    error: PlanetServeError, attempt: int, delay_s: float | None
) -> None:
    manager = ChainManager(ClientConfig(), FACTS)
    assert manager.retry_delay_s(error, attempt) == delay_s
