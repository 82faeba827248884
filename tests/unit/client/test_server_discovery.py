"""Which servers a client knows of, and how old what it knows may be."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from typing import Any

import pytest
from written_swarm import FACTS, Board, server

from planetserve.client.planning import server_discovery
from planetserve.client.planning.chain_planner import ModelFacts
from planetserve.client.planning.peer_book import PeerBook
from planetserve.client.planning.server_discovery import ServerDiscovery
from planetserve.config import ClientConfig
from planetserve.errors import NoChainAvailable, PeerUnreachable
from planetserve.model.manifest import Manifest
from planetserve.testing.clock import ManualClock
from planetserve.types import BlockSpan, PeerId, ServerState


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def board() -> Board:
    return Board(server("a"), server("b"))


def view_of(
    board: Board, clock: ManualClock, facts: ModelFacts = FACTS, **options: Any
) -> ServerDiscovery:
    view = ServerDiscovery(
        ClientConfig(**options), facts, BlockSpan(0, 8), PeerBook(1.0, clock), clock
    )
    view._directory = board  # type: ignore[assignment]
    return view


async def test_records_are_sorted_by_what_they_are_good_for(clock: ManualClock) -> None:
    board = Board(
        server("fine"),
        server("blocked"),
        server("other files", fingerprint="0" * 64),
        server("gone", state=ServerState.OFFLINE),
        server("later", protocol_versions=(2, 3)),
        server("both", protocol_versions=(1, 3), capabilities=("later",)),
        server("demanding", not_understood=("price",)),
    )
    view = view_of(board, clock, blocked_servers=("blocked",))
    await view.refresh_if_stale()
    assert set(view.servers) == {"fine", "both"}
    assert [info.peer_id for info in view.incompatible] == ["later", "demanding"]
    assert [info.peer_id for info in view.excluded] == ["blocked"]
    assert set(view.strangers) == {"other files"}


async def test_only_allowed_servers_are_used(clock: ManualClock, board: Board) -> None:
    view = view_of(board, clock, allowed_servers=("a",))
    await view.refresh_if_stale()
    assert set(view.servers) == {"a"}


async def test_a_session_begins_with_the_loads_of_now(clock: ManualClock, board: Board) -> None:
    view = view_of(board, clock)
    await view.refresh_if_stale()
    board.servers = [server("a", decode_ms_per_block=9.0)]
    clock.now_s += 60.0
    await view.refresh_if_stale()
    assert view.servers == {"a": board.servers[0]}


async def test_sessions_that_begin_together_read_once(clock: ManualClock, board: Board) -> None:
    view = view_of(board, clock)
    await asyncio.gather(*(view.refresh_if_stale() for _ in range(5)))
    assert board.num_lookups == 1
    clock.now_s += 1.0
    await view.refresh_if_stale()
    assert board.num_lookups == 1


@pytest.mark.parametrize("trouble", ["is_silent", "is_broken"])
async def test_a_directory_that_does_not_answer_delays_nobody_for_long(
    clock: ManualClock, board: Board, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = view_of(board, clock)
    await view.refresh_if_stale()
    monkeypatch.setattr(server_discovery, "_MAX_REFRESH_WAIT_S", 0.01)
    setattr(board, trouble, True)
    clock.now_s += 60.0
    await view.refresh_if_stale()
    assert board.num_lookups == 2
    assert set(view.servers) == {"a", "b"}


async def test_ends_of_chains_are_measured_and_the_silent_are_found(
    clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(_node: object, peer_id: PeerId, *_: object, timeout_s: float) -> float:
        if peer_id == "dead":
            raise PeerUnreachable("no answer")
        return 7.0

    monkeypatch.setattr(server_discovery, "ping", answer)
    board = Board(server("first", 0, 3), server("middle", 3, 6), server("dead", 5, 8))
    view = view_of(board, clock)
    view._node = object()  # type: ignore[assignment]
    await view.refresh()
    assert view._peers.plan_inputs(()).rtt_ms == {"first": 7.0}
    assert await view.silent(["first", "dead", "dead", "unknown"]) == ["dead"]


async def test_before_it_has_joined_there_is_nothing(clock: ManualClock) -> None:
    view = ServerDiscovery(ClientConfig(), FACTS, BlockSpan(0, 8), PeerBook(1.0, clock), clock)
    await view.refresh()
    assert view.servers == {}
    assert await view.other_models() == []
    with pytest.raises(NoChainAvailable, match="has not joined"):
        _ = view.node
    await view.close()


MANIFEST, OTHER = "a" * 64, "b" * 64


async def test_servers_of_other_weights_are_refused_whatever_they_call_them(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    board = Board(
        server("same", manifest=MANIFEST),
        server("otherwise obtained", manifest=MANIFEST, fingerprint="hub-1"),
        server("of before manifests"),
        server("changed", manifest=OTHER),
        server("other", manifest=OTHER, fingerprint="hub-2"),
        server("other of before manifests", fingerprint="hub-2"),
    )
    view = view_of(board, clock)
    view.weights.manifest = MANIFEST
    await view.refresh_if_stale()
    assert set(view.servers) == {"same", "otherwise obtained", "of before manifests"}
    assert set(view.strangers) == {"changed", "other", "other of before manifests"}
    clock.now_s += 60.0
    await view.refresh_if_stale()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "server changed is not used" in line
    assert "manifest bbbbbbbbbbbb, here aaaaaaaaaaaa" in line


async def test_a_client_without_all_files_takes_the_manifest_that_servers_of_them_agree_on(
    clock: ManualClock,
) -> None:
    board = Board(
        server("same", manifest=MANIFEST),
        server("otherwise obtained", manifest=MANIFEST, fingerprint="hub-1"),
        server("other", manifest=OTHER, fingerprint="hub-2"),
    )
    view = view_of(board, clock)
    await view.refresh_if_stale()
    assert set(view.servers) == {"same", "otherwise obtained"}
    # One that says otherwise has nobody of its name left out.
    board.servers.append(server("liar", manifest=OTHER))
    clock.now_s += 60.0
    await view.refresh_if_stale()
    assert set(view.servers) == {"same", "liar"}


async def test_servers_are_sorted_again_once_the_manifest_is_known(clock: ManualClock) -> None:
    board = Board(server("same"), server("changed", manifest=OTHER))
    found = threading.Event()

    def read(_stop: threading.Event) -> Manifest:
        found.wait(60)
        return Manifest(b"", {})

    view = view_of(board, clock, facts=dataclasses.replace(FACTS, read_manifest=read))
    learning = asyncio.create_task(view._learn_manifest())
    await view.refresh_if_stale()
    assert set(view.servers) == {"same", "changed"}
    found.set()
    await learning
    assert view.weights.manifest == Manifest(b"", {}).hash
    assert set(view.servers) == {"same"}
