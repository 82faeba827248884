"""What a person is told when no chain exists: which setting, file or server is missing."""

from __future__ import annotations

from typing import Any

from written_swarm import FACTS, Board, server

from planetserve.client.no_chain import explain, other_revision
from planetserve.client.planning import ChainPlanner
from planetserve.client.swarm_view import SwarmView
from planetserve.config import ClientConfig
from planetserve.errors import MissingBlocksError, ModelMismatchError, NoChainAvailable
from planetserve.testing.clock import ManualClock

MISSING = MissingBlocksError("no usable server holds blocks 2:4", [(2, 4)])


async def look(board: Board, **options: Any) -> tuple[SwarmView, ChainPlanner]:
    config, clock = ClientConfig(**options), ManualClock()
    planner = ChainPlanner(config, FACTS, rtt=None)  # type: ignore[arg-type]
    view = SwarmView(config, FACTS, planner.remote, rtt=None, clock=clock)  # type: ignore[arg-type]
    view._directory = board  # type: ignore[assignment]
    await view.look_again()
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
