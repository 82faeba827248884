"""What a person is told when no chain exists: which setting, file or server is missing."""

from __future__ import annotations

from typing import Any

import pytest
from written_swarm import FACTS, Board, server

from planetserve.client.planning.chain_diagnosis import explain, other_revision
from planetserve.client.planning.chain_planner import ChainPlanner
from planetserve.client.planning.peer_book import PeerBook
from planetserve.client.planning.server_discovery import ServerDiscovery
from planetserve.config import ClientConfig
from planetserve.errors import MissingBlocksError, ModelMismatchError, NoChainAvailable
from planetserve.testing.clock import ManualClock
from planetserve.types import ServerInfo

MISSING = MissingBlocksError("no usable server holds blocks 2:4", [(2, 4)])


async def look(board: Board, **options: Any) -> tuple[ServerDiscovery, ChainPlanner]:
    config, clock = ClientConfig(**options), ManualClock()
    planner = ChainPlanner(config, FACTS)
    view = ServerDiscovery(config, FACTS, planner.remote, PeerBook(1.0, clock), clock)
    view._directory = board  # type: ignore[assignment]
    await view.refresh_if_stale()
    return view, planner


async def told(board: Board, failure: NoChainAvailable = MISSING, **options: Any) -> Any:
    return await explain(failure, *await look(board, **options))


async def test_lack_of_memory_needs_no_other_words() -> None:
    full = NoChainAvailable("no free cache")
    assert await told(Board(server("a")), full) is full


async def test_nobody_holds_the_blocks() -> None:
    error = await told(Board(server("a", 0, 2)), initial_peers=("/ip4/1.2.3.4",))
    assert type(error) is MissingBlocksError
    assert error.missing == ((2, 4),)
    assert "no live server holds blocks 2:4 of tiny after waiting 10 s" in str(error)
    assert "run_server tiny --block_indices 2:4 --initial_peers" in str(error)
    assert "(joined through: /ip4/1.2.3.4)" in str(error)


async def test_servers_that_hold_the_blocks_and_cannot_be_reached_are_named() -> None:
    holders = [server("b", 2, 4, addresses=("/ip4/203.0.113.7/tcp/31337",)), server("a", 0, 2)]
    error = await told(Board(*holders))
    assert type(error) is MissingBlocksError
    assert "blocks 2:4 of tiny are held by servers that cannot be reached: b at " in str(error)
    assert "b at /ip4/203.0.113.7/tcp/31337; if they run, check their --public_ip" in str(error)
    assert "port is forwarded" in str(error)


async def test_what_a_record_says_reaches_no_terminal_as_it_is() -> None:
    error = await told(Board(server("b", 2, 4, addresses=("\x1b[2J", "\u202e"))))
    assert "b at no address;" in str(error)


async def test_servers_that_answer_but_failed_are_not_called_unreachable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def answers(_self: ServerDiscovery, _info: ServerInfo) -> bool:
        return True

    monkeypatch.setattr(ServerDiscovery, "ping", answers)
    error = await told(Board(server("b", 2, 4)))
    assert "have servers (1 of them) that answer but have just failed or refused" in str(error)


async def test_the_settings_rule_the_only_servers_out() -> None:
    holders = [server("a", 0, 4), server("b", 3, 8), server("c", 4, 8)]
    error = await told(Board(*holders), blocked_servers=("a", "b", "c"))
    assert "are ruled out by blocked_servers (2 of them); change the setting" in str(error)
    error = await told(Board(*holders), allowed_servers=(), blocked_servers=("a",))
    assert "ruled out by allowed_servers and blocked_servers (2 of them)" in str(error)
    assert error.missing == ((2, 4),)


async def test_servers_that_are_not_trusted_are_told_apart_from_blocked_ones() -> None:
    board = Board(server("a", 0, 4), server("b", 0, 8))
    error = await told(board, blocked_servers=("b",), trusted_servers=("c",), trusted_blocks="2:3")
    assert "by blocked_servers (1 of them) and by trusted_servers (1 of them)" in str(error)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"protocol_versions": (2, 3)},
            "speaks protocol version 2 at least, this client 1 at most",
        ),
        ({"not_understood": ("price",)}, "requires what this client does not know (price)"),
    ],
)
async def test_all_servers_speak_another_protocol(fields: dict[str, Any], words: str) -> None:
    error = await told(Board(server("a", **fields), server("b", 4, 8, **fields)))
    assert type(error) is MissingBlocksError
    assert "of tiny are held only by servers that this client cannot talk with (1 of" in str(error)
    assert f"…a {words}; install the same version of planetserve here and there" in str(error)


async def test_all_servers_have_other_files() -> None:
    board = Board(server("a", fingerprint="0" * 64))
    error = await told(board)
    assert type(error) is ModelMismatchError
    assert "(000000000000; yours is ffffffffffff); load the same files" in str(error)
    view, _ = await look(board)
    whole = other_revision([(0, 8)], view)
    assert "blocks 0:8 of tiny are served only in another revision" in str(whole)
    assert whole.missing == ((0, 8),)


async def test_the_swarm_serves_something_else() -> None:
    board = Board()
    board.listed = ["tiny-prefix", "llama-b", "llama-a"]
    error = await told(board)
    assert type(error) is ModelMismatchError
    assert "(tiny-prefix) in this swarm, which serves llama-a, llama-b;" in str(error)
    board.listed = ["tiny-prefix"]
    assert type(await told(board)) is MissingBlocksError


async def test_others_are_not_mentioned_while_the_model_has_servers() -> None:
    board = Board(server("a", 0, 2))
    board.listed = ["tiny-prefix", "llama-a"]
    assert "llama-a" not in str(await told(board))
