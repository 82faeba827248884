"""Who a session may use: how old the view of the directory is, and banned servers that answer."""

from __future__ import annotations

import asyncio

import pytest
import torch

from planetserve.client.chain_manager import ChainManager
from planetserve.client.planning import ModelFacts
from planetserve.config import ClientConfig
from planetserve.errors import PeerUnreachable
from planetserve.types import BlockSpan, ServerInfo, ServerState

FACTS = ModelFacts("tiny", "tiny-prefix", "f" * 64, 8, 16, torch.float32)


def server(name: str, decode_ms: float) -> ServerInfo:
    return ServerInfo(
        peer_id=name, model=FACTS.prefix, fingerprint=FACTS.fingerprint, span=BlockSpan(0, 8),
        num_blocks=8, state=ServerState.ONLINE, dtype="float32", addresses=(),
        decode_ms_per_block=decode_ms, alone_ms_per_block=1.0, tokens_per_s_per_block=1000.0,
        network_bytes_per_s=1e8, free_cache_tokens=4096, max_session_tokens=2048,
    )  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def unix(self) -> float:
        return self.now_s


class Board:
    """A directory whose answers the test writes."""

    def __init__(self) -> None:
        self.servers = [server("a", 1.0), server("b", 2.0)]
        self.num_lookups = 0
        self.is_silent = False
        self.is_broken = False

    async def lookup(self, _prefix: str) -> list[ServerInfo]:
        self.num_lookups += 1
        if self.is_broken:
            raise PeerUnreachable("nobody answers")
        if self.is_silent:
            await asyncio.Event().wait()
        return self.servers


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def board() -> Board:
    return Board()


@pytest.fixture
async def manager(clock: Clock, board: Board) -> ChainManager:
    manager = ChainManager(ClientConfig(chain_spread=0.0), FACTS, clock)
    manager._directory = board  # type: ignore[assignment]
    await manager._look_again()
    return manager


async def first_hop(manager: ChainManager) -> str:
    return (await manager.plan(1, 10)).hops[0].peer_id


async def test_a_session_begins_with_the_loads_of_now(
    manager: ChainManager, clock: Clock, board: Board
) -> None:
    assert await first_hop(manager) == "a"
    board.servers = [server("a", 9.0), server("b", 2.0)]
    clock.now_s += 60.0
    await manager._look_again()
    assert await first_hop(manager) == "b"


async def test_sessions_that_begin_together_read_once(
    manager: ChainManager, clock: Clock, board: Board
) -> None:
    clock.now_s += 60.0
    await asyncio.gather(*(manager._look_again() for _ in range(5)))
    assert board.num_lookups == 2
    clock.now_s += 1.0
    await manager._look_again()
    assert board.num_lookups == 2


@pytest.mark.parametrize("trouble", ["is_silent", "is_broken"])
async def test_a_directory_that_does_not_answer_delays_nobody_for_long(
    manager: ChainManager, clock: Clock, board: Board, trouble: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("planetserve.client.chain_manager._LOOK_AGAIN_S", 0.01)
    setattr(board, trouble, True)
    clock.now_s += 60.0
    await manager._look_again()
    assert board.num_lookups == 2
    assert await first_hop(manager) == "a"


async def test_two_sessions_may_revive_the_same_server(
    manager: ChainManager, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answers(_manager: ChainManager, _info: ServerInfo) -> bool:
        await asyncio.sleep(0)  # both have asked before either is answered
        return True

    monkeypatch.setattr(ChainManager, "_ping", answers)
    manager._banned_until_s["a"] = clock.now_s + 60.0
    assert await first_hop(manager) == "b"
    await asyncio.gather(manager._revive(), manager._revive())
    assert await first_hop(manager) == "a"
