"""What a client makes of its view and of failures: whom it uses, blames, bans and forgives."""

from __future__ import annotations

import asyncio

import pytest
from written_swarm import FACTS, Board, server

from planetserve import errors
from planetserve.client.planning import chain_manager
from planetserve.client.planning.chain_manager import ChainManager
from planetserve.client.planning.server_discovery import ServerDiscovery
from planetserve.config import ClientConfig
from planetserve.errors import (
    EdgeStalled,
    HopTimeout,
    MissingBlocksError,
    ModelMismatchError,
    PeerReportedError,
    PlanetServeError,
    RemoteProtocolError,
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
    manager = ChainManager(ClientConfig(chain_cost_jitter=0.0), FACTS, clock)
    manager.view._directory = board  # type: ignore[assignment]
    await manager.view.refresh_if_stale()
    return manager


async def first_hop(manager: ChainManager) -> str:
    return (await manager.plan(1, 10)).hops[0].peer_id


async def test_two_sessions_may_revive_the_same_server(
    manager: ChainManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answers(_view: ServerDiscovery, _info: ServerInfo) -> bool:
        await asyncio.sleep(0)  # both have asked before either is answered
        return True

    monkeypatch.setattr(ServerDiscovery, "ping", answers)
    manager.peers.ban(["a"], 60.0)
    assert await first_hop(manager) == "b"
    await asyncio.gather(manager._lift_bans_of_reachable(), manager._lift_bans_of_reachable())
    assert await first_hop(manager) == "a"


async def test_bans_that_are_over_keep_no_banned_server_from_its_chance(
    manager: ChainManager, clock: ManualClock, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answers(_view: ServerDiscovery, _info: ServerInfo) -> bool:
        return True

    monkeypatch.setattr(ServerDiscovery, "ping", answers)
    earlier = [server(f"earlier {number}", 0, 4) for number in range(20)]
    board.servers += earlier
    await manager.view.refresh()
    manager.peers.ban([info.peer_id for info in earlier], 5.0)
    clock.now_s += 5.0
    manager.peers.ban(["a", "b"], 60.0)
    await manager._lift_bans_of_reachable()
    assert manager.peers.banned() == []


async def test_a_server_at_fault_is_left_alone_for_a_while(
    manager: ChainManager, clock: ManualClock
) -> None:
    error = StreamClosed("gone")
    error.peer_id = "a"
    assert await manager.report_failure(error, BOTH) == ["a"]
    assert await first_hop(manager) == "b"
    clock.now_s += manager.config.ban_timeout
    assert await first_hop(manager) == "a"


CODES = [
    cls.code for cls in vars(errors).values() if isinstance(cls, type) and hasattr(cls, "code")
]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("wish_s", [0.0, 3600.0])
async def test_whatever_a_server_reports_it_is_left_alone_for_as_long_as_the_client_says(
    manager: ChainManager, clock: ManualClock, code: str, wish_s: float
) -> None:
    error = PeerReportedError.of("a", code, "for a reason", wish_s)
    error.peer_id = "a"
    assert manager.retry_delay_s(error, 1) is not None
    await manager.report_failure(error, BOTH)
    assert manager.has_chain(1, 10)
    assert await first_hop(manager) == "b"
    clock.now_s += manager.config.ban_timeout - 0.1
    assert await first_hop(manager) == "b"
    clock.now_s += 0.1
    assert await first_hop(manager) == "a"


async def test_all_servers_that_refuse_at_once_are_left_alone(manager: ChainManager) -> None:
    error, other = PeerReportedError("no"), PeerReportedError("no")
    error.peer_id, other.peer_id = "a", "b"
    error.others = [other]
    assert await manager.report_failure(error, None) == ["a", "b"]
    assert not manager.has_chain(1, 10)


async def test_the_clients_own_mistake_bans_nobody(manager: ChainManager) -> None:
    error = SessionLengthError("too long")
    error.peer_id = "a"
    assert not await manager.report_failure(error, BOTH)
    assert await first_hop(manager) == "a"


async def test_of_a_chain_that_fell_silent_those_who_answer_no_ping_are_at_fault(
    manager: ChainManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answers(_view: ServerDiscovery, info: ServerInfo) -> bool:
        return info.peer_id != "a"

    monkeypatch.setattr(ServerDiscovery, "ping", answers)
    assert await manager.report_failure(HopTimeout("no answer"), BOTH) == ["a"]
    assert await first_hop(manager) == "b"


async def test_a_way_that_stands_still_bans_neither_end(
    manager: ChainManager, clock: ManualClock
) -> None:
    error = EdgeStalled("nothing passes")
    error.edge = ("a", "b")
    assert not await manager.report_failure(error, BOTH)
    assert set(manager.peers.avoided_edges()) == {("a", "b")}
    assert await first_hop(manager) == "a"
    clock.now_s += manager.config.ban_timeout
    assert not manager.peers.avoided_edges()


@pytest.mark.parametrize("kind", [EdgeStalled, PeerReportedError])
async def test_complaints_take_no_server_out_and_make_it_the_last_choice(
    manager: ChainManager, board: Board, kind: type[PlanetServeError]
) -> None:
    for neighbour in ("c", "d", "e"):
        error = kind("it is the other one's fault")
        error.edge = ("a", neighbour)
        assert not await manager.report_failure(error, None)
    assert not manager.peers.banned()
    assert await first_hop(manager) == "b"
    board.servers = [server("a")]
    await manager.view.refresh()
    assert await first_hop(manager) == "a"


async def test_a_fault_of_a_whole_chain_makes_all_of_it_the_last_choice(
    manager: ChainManager,
) -> None:
    assert not await manager.report_failure(RemoteProtocolError("another step"), BOTH)
    assert set(manager.peers.avoided_edges()) == {("a", "b")}
    alone = Chain((Hop("a", 0, 8),))
    assert await manager.report_failure(RemoteProtocolError("another step"), alone) == ["a"]


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
        (PeerReportedError("full", retry_after_s=0.0), 1, 1.0),
        (PeerReportedError("full", retry_after_s=0.0), 4, 8.0),
        (PeerReportedError("full", retry_after_s=7.0), 1, 7.0),
        (PeerReportedError("full", retry_after_s=3600.0), 1, 8.0),
        (PeerReportedError("full", retry_after_s=3600.0), 5, 60.0),
        (PeerReportedError("full", retry_after_s=0.0), 6, None),
        (MissingBlocksError("nobody"), 1, None),
        (SessionLengthError("too long"), 1, None),
    ],
)
def test_retries_wait_longer_and_longer_and_end(
    error: PlanetServeError, attempt: int, delay_s: float | None
) -> None:
    manager = ChainManager(ClientConfig(), FACTS)
    assert manager.retry_delay_s(error, attempt) == delay_s


async def join(board: Board, monkeypatch: pytest.MonkeyPatch, wait_s: float) -> ChainManager:
    """A client whose view starts with what the board says."""
    config = ClientConfig(wait_for_blocks_timeout=wait_s)
    manager = ChainManager(config, FACTS)
    manager.view._directory = board  # type: ignore[assignment]
    monkeypatch.setattr(manager.view, "start", manager.view.refresh)
    monkeypatch.setattr(manager.view, "_ping_edges", _do_nothing)
    monkeypatch.setattr(chain_manager, "_POLL_S", 0.0)
    await manager.start()
    return manager


async def _do_nothing() -> None:
    await asyncio.sleep(0)


class LateBoard(Board):
    """The client's own servers are found at the third look."""

    async def lookup(self, prefix: str) -> list[ServerInfo]:
        found = await super().lookup(prefix)
        return [*found, server("own")] if self.num_lookups > 2 else found


async def test_another_revision_is_an_error_where_nobody_serves_the_clients_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ModelMismatchError, match="only in another revision"):
        await join(Board(server("other files", fingerprint="0" * 64)), monkeypatch, wait_s=0.0)


async def test_who_announces_another_revision_stops_no_client_whose_servers_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board = LateBoard(server("liar", fingerprint="0" * 64))
    manager = await join(board, monkeypatch, wait_s=60.0)
    assert set(manager.view.servers) == {"own"}


async def test_who_wastes_a_minute_is_left_alone_for_one(
    manager: ChainManager, clock: ManualClock
) -> None:
    """A liar with the best record takes a session and stalls: it must not get the next one soon."""
    error = HopTimeout("no answer from the chain")
    error.peer_id = "a"
    await manager.report_failure(error, BOTH, 60.0)
    clock.now_s += 59.0
    assert await first_hop(manager) == "b"
    clock.now_s += 2.0
    assert await first_hop(manager) == "a"
    await manager.report_failure(error, BOTH, 60.0)
    clock.now_s += 119.0
    assert await first_hop(manager) == "b"
